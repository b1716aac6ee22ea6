"""Plain decoding is the empty draft."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outrider.types import Draft, Evidence


class NoDraft:
    """Proposes nothing."""

    name = "none"
    layers: tuple[int, ...] = ()
    max_nodes = 0
    max_depth = 0
    trees = False

    def __init__(self) -> None:
        self._drafts: dict[tuple[int, torch.device], Draft] = {}
        """One for each number of sequences: what a step derives from an empty draft is derived once."""

    def bind(self, slots: int, length: int) -> None:
        """Nothing to allocate."""

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """The empty draft."""
        key = len(evidence.sequences), evidence.scores.logits.device
        if key not in self._drafts:
            self._drafts[key] = Draft.empty(*key)
        return self._drafts[key]

    def release(self, slots: Sequence[int]) -> None:
        """Nothing to forget."""
