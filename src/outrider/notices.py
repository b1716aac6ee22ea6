"""Why an engine is slower than this machine allows, one sentence each with the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from outrider.errors import ConfigError
from outrider.protocols import Target
from outrider.threads import thread_notice
from outrider.verify import native

GPU = Path("/dev/nvidia0")
"""Exists where the driver of an NVIDIA GPU is installed."""


def notices_of(targets: Iterable[Target], device: torch.device, drafts: bool, asked: str = "auto") -> list[str]:
    """The notices of `targets` and of the machine, each once. drafts: whether drafts are verified. asked: the requested device."""
    found = [notice for target in targets for notice in target.notices]
    return list(dict.fromkeys([*found, *machine_notices(device, drafts, asked)]))


def machine_notices(device: torch.device, drafts: bool, asked: str = "auto") -> list[str]:
    """The notices that do not depend on a model."""
    if device.type != "cpu":
        return []
    verified = native.notice() if drafts else None
    idle = asked == "auto" and GPU.exists() and not torch.cuda.is_available()
    unused = (
        "this machine has a GPU that PyTorch cannot use: install a CUDA build of PyTorch, or choose --device cpu if that is meant"
        if idle
        else None
    )
    return [n for n in (verified, thread_notice(torch.get_num_threads()), unused) if n is not None]


def vocabulary_without_model(vocabulary: int | str | None, draft: str, restricted: bool) -> list[str]:
    """A notice if `draft_vocabulary` is "auto" and the drafter has no draft model's head to restrict.

    Raises ConfigError if a number of tokens was asked for.
    """
    if vocabulary is None or restricted:
        return []
    told = f"draft_vocabulary={vocabulary!r} restricts the head of a draft model, and the drafter {draft!r} has none"
    if vocabulary == "auto":
        return [f"{told}: it does nothing"]
    raise ConfigError(f"{told}: name a draft model, or leave draft_vocabulary out")


def wasted_option(quantize: str | None, used: bool) -> list[str]:
    """A notice if a draft was to be quantised and nothing was."""
    if quantize is None or used:
        return []
    return [
        f"draft_quantize={quantize!r} does nothing: it is for draft models, and for trained drafters that the compiled decoder "
        "runs; leave it out, or name one"
    ]
