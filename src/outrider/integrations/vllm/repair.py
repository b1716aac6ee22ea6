"""One fault of vLLM on CPUs without Triton, undone where a probe shows it (found by our audit: docs/audit.md).

Its stand-in for the kernel that spreads the values of requests (temperature, top-k, top-p) over their draft tokens fills a
converted copy and drops it, so the target's logits of every draft token are divided by uninitialised memory. Greedy requests skip
that step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger("vllm.outrider")  # below vLLM's logger, so that its log shows it

Expand = Callable[..., None]
NAME = "_expand_kernel_impl"
PROBE = (0.5, 1.0, 0.25)
"""Temperatures of three requests, with 1, 2 and 1 draft tokens."""


def is_faulty(expand: Expand) -> bool:
    """Whether this stand-in leaves its output as it was, or fills it wrongly. False if it cannot be called at all."""
    out = torch.full((4,), -7.0)  # what uninitialised memory may hold
    try:
        expand(out, torch.tensor(PROBE), torch.tensor([1, 3, 4], dtype=torch.int32), 0, 1)
    except Exception:
        return False
    return out.tolist() != [0.5, 1.0, 1.0, 0.25]


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    ends: torch.Tensor,
    old: float,
    new: float,
    most: int | None = None,
) -> None:
    """What the kernel does: output[i] = the value of the request that draft token i belongs to, `new` where it is `old`.

    values: [B]. ends: [B] cumulative numbers of draft tokens. output: [their sum], in place.
    """
    counts = torch.diff(ends.long(), prepend=ends.new_zeros(1).long())
    output.copy_(torch.where(values == old, torch.full_like(values, new), values).repeat_interleave(counts))


def found() -> str:
    """What a probe finds in this process: "unused" (Triton, or no CPU), "sound", "faulty", or "repaired" by us."""
    stand_ins = _stand_ins()
    present = getattr(stand_ins, NAME, None)
    if present is None:
        return "unused"
    if present is expand:
        return "repaired"
    return "faulty" if is_faulty(present) else "sound"


def repair() -> bool:
    """Replace the stand-in in this process if it is faulty; whether that was done.

    To be called before vLLM installs its stand-ins (its general plug-ins are loaded before that).
    """
    if found() != "faulty":
        return False
    setattr(_stand_ins(), NAME, expand)
    return True


def _stand_ins() -> Any:
    """vLLM's module of stand-ins; None where it uses none."""
    from vllm.platforms import current_platform  # type: ignore[reportMissingImports]
    from vllm.triton_utils import HAS_TRITON  # type: ignore[reportMissingImports]

    if HAS_TRITON or not current_platform.is_cpu():
        return None
    try:
        import vllm._custom_ops  # type: ignore[reportMissingImports]  # noqa: F401 - loads the kernels
        from vllm.utils import cpu_triton_utils  # type: ignore[reportMissingImports]
    except ImportError:
        return None
    return cpu_triton_utils
