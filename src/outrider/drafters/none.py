"""Plain decoding is the empty draft."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.types import Draft, Evidence


class NoDraft:
    """Proposes nothing."""

    name = "none"
    layers: tuple[int, ...] = ()
    max_nodes = 0
    max_depth = 0
    trees = False

    def bind(self, slots: int, length: int) -> None:
        """Nothing to allocate."""

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """The empty draft."""
        return Draft.empty(len(evidence.sequences), evidence.scores.logits.device)

    def release(self, slots: Sequence[int]) -> None:
        """Nothing to forget."""
