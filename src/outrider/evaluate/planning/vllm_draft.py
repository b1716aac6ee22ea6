"""A drafter and its lengths as vLLM's `speculative_config` says them; see `drafters.vllm_versions` for the keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outrider.drafters.checkpoint import read_config
from outrider.drafters.registry import LEARNED, carries, companion_folder
from outrider.drafters.vllm_versions import NEWEST, version
from outrider.errors import OutriderError


def drafter_config(
    draft: str, models: Mapping[str, str], target: str | None = None, release: str = NEWEST
) -> dict[str, Any] | None:
    """What vLLM's `speculative_config` says of a drafter, without lengths; None for one that this release does not have.

    draft: as after --draft. models: the draft model behind the name of a drafter. target: the target's folder, beside which
    `eagle` and its like are looked for.
    """
    if draft == "ngram" or draft.startswith("ngram:"):
        low, _, high = draft.partition(":")[2].partition("-")
        sizes = (
            {"prompt_lookup_min": int(low), "prompt_lookup_max": int(high or low)} if low else {"prompt_lookup_max": 4}
        )
        return {"method": "ngram", **sizes}
    greedy = draft.startswith("greedy:")
    kind, _, folder = draft.removeprefix("greedy:").partition(":")
    how = {"draft_sample_method": "greedy" if greedy else "probabilistic"}
    if kind in LEARNED and carries(kind, folder or target):  # vLLM reads it from the target, under one name
        return {"method": LEARNED[kind].vllm_methods[0], **how}
    if kind in LEARNED and LEARNED[kind].carried:
        return None  # a trained head alone is nothing that vLLM loads
    if kind in LEARNED:
        found = folder or companion_folder(target, kind)
        method = None if found is None else method_of(kind, found)
        return {"method": method, "model": found, **how} if method in version(release).methods else None
    if draft in models:
        return {"method": "draft_model", "model": models[draft], **how}
    return None


def method_of(kind: str, folder: str) -> str | None:
    """vLLM's method for a folder of a learned drafter; None if vLLM has none. The folder says which EAGLE it is, if it is here."""
    methods = LEARNED[kind].vllm_methods
    try:
        config, said = read_config(Path(folder).expanduser())
    except OutriderError:
        config, said = {}, None  # a Hub name: nothing is downloaded for a command line
    if config.get("sequential"):
        return None  # its Medusa heads see no tokens
    near = (said or "").replace("-", "")
    return near if near in methods else methods[0] if methods else None


def schedule(lengths: Mapping[int, int]) -> list[list[int]]:
    """vLLM's [first, last, length]: a batch size takes the length that was planned for the next larger one, so that no load gets
    more draft tokens than was measured to pay; neighbours of equal length are one range.

    >>> schedule({1: 4, 4: 2, 8: 2, 16: 0})
    [[1, 1, 4], [2, 8, 2], [9, 16, 0]]
    """
    out: list[list[int]] = []
    first = 1
    for batch, length in sorted(lengths.items()):
        if out and out[-1][2] == length:
            out[-1][1] = batch
        else:
            out.append([first, batch, length])
        first = batch + 1
    return out
