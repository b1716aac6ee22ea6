"""BASS's rule for the draft length of a batch, for comparison: longer after a draft that was accepted whole, else shorter.

Source: Qian et al., "BASS: Batched Attention-optimized Speculative Sampling", 2024 (arXiv 2404.15778), Algorithm 1, with its
constants. It looks at the luckiest sequence of the batch, never at the time of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from outrider.control.seeds import pinned
from outrider.errors import ConfigError
from outrider.records import StepRecord
from outrider.types import SequenceView

START, LONGER, SHARE, LIMIT = 7, 2, 10, 32
"""The first length; what is added to it; the part of it (1 / SHARE) that is taken away; the largest."""


class Bass:
    """One length for all, 1 to `longest`; a sampled request with its own seed gets `first`, so that its text depends on the seed
    alone, unless lengths are `invariant` (see `Adaptive`)."""

    def __init__(self, first: int, longest: int = LIMIT, *, invariant: bool = False) -> None:
        if not 0 <= first <= longest or longest < 1:
            raise ConfigError(f"draft lengths must be 0 <= first <= longest, got first {first} and longest {longest}")
        self.first, self.longest, self.invariant = first, longest, invariant
        self.length = min(START, longest)
        self._shortened = 0
        self._before = self._now = -1  # the length of the drafts that this step verified and made; -1: several

    def budget(self, sequences: Sequence[SequenceView]) -> list[int]:
        """The present length for each of `sequences`."""
        out = [self.first if pinned(v, self.invariant) else self.length for v in sequences]
        own = any(v.params.draft_length is not None for v in sequences)
        self._now = -1 if own or any(x != self.length for x in out) else self.length
        return out

    def observe(self, record: StepRecord) -> None:
        """Change the length after a step that verified drafts of the present one; those of an older one say nothing about it."""
        verified, self._before = self._before, self._now
        accepted = [one.accepted for one in record.each if one.proposed]
        if verified != self.length or not accepted:
            return
        if max(accepted) >= self.length:
            self.length, self._shortened = min(self.length + LONGER, self.longest), 0
        else:
            less = self.length - math.ceil(self.length / SHARE) - self._shortened
            self.length, self._shortened = max(1, max(accepted), less), 1
