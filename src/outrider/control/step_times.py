"""Seconds of a step for any load and draft length, put together from whatever steps came by.

A step of b sequences with drafts of length L is a pass of b (1 + L) rows and the drafting of L levels. Both are learnt apart, from
steps of any kind, so a load and length that never ran can be foretold. What a drafter needs to read prompts is kept apart
(`outrider.control.prefill_cost`).
"""

from __future__ import annotations

from outrider.control.prefill_cost import PrefillCost
from outrider.control.row_times import EXTRAPOLATION_FACTOR, RowTimes
from outrider.records import StepRecord

USUAL = 1.0 / 32.0
"""Weight of the newest step in the rows of prompts that a step usually reads."""


NEAR = 0.9 * EXTRAPOLATION_FACTOR
"""How many times fewer rows a slope is taken over where half of them have never been seen."""


class _Drafting:
    """Seconds of drafting to one length, by sequences."""

    def __init__(self) -> None:
        self.alone, self.loaded = RowTimes(), RowTimes()  # nothing else being read, and whatever was read beside it

    def seconds(self, sequences: int) -> float | None:
        alone = self.alone.seconds(sequences)
        return self.loaded.seconds(sequences) if alone is None else alone


class StepTimes:
    """What a step takes, by load and draft length, and what the drafter's reading adds."""

    def __init__(self) -> None:
        self._passes = RowTimes()  # of the target, by rows
        self._drafts: dict[int, _Drafting] = {}  # by length
        self.reading = PrefillCost()
        self.prompts = 0.0
        """Rows of prompts that a step reads lately, on average."""

    def learn(self, record: StepRecord, before: tuple[int, int] | None, now: tuple[int, int] | None) -> None:
        """A step. before, now: sequences and length of the draft it verified and of the one it made; None if lengths differed."""
        drafting = record.seconds["draft"]
        prompts = max(0, record.rows - record.scored - record.counts.proposed)
        self.prompts += USUAL * (prompts - self.prompts)
        if record.rows > 0:
            self._passes.learn(record.rows, sum(record.seconds.values()) - drafting)
        if now is None or now[1] == 0 or (before is not None and before[1] == 0):
            return  # after a plain step the drafter reads what that step emitted
        sequences, length = now
        mine = self._drafts.setdefault(length, _Drafting())
        mine.loaded.learn(sequences, drafting)
        alone = mine.alone.seconds(sequences)
        if not prompts:
            mine.alone.learn(sequences, drafting)
        elif alone is not None:
            self.reading.learn(prompts, drafting - alone)

    def seconds(self, sequences: int, length: int) -> float | None:
        """A step of so many sequences with drafts of this length, reading aside; None where nothing near has been seen."""
        return self._step(sequences, length, self._passes.seconds(sequences * (1 + length)))

    def beside(self, sequences: int, length: int, longest: int) -> float | None:
        """The same for steps that read as many prompts as they do lately, less what those rows take by themselves: they must be
        read at any length. longest: of all lengths that are compared."""
        rows, most = sequences * (1 + length), self.prompts + sequences * (1 + longest)
        judging, above = self._passes.seconds(self.prompts + rows), self._passes.seconds(most)
        less = next((x for x in (0.5 * most, most / NEAR) if self._passes.seconds(x) is not None), most)
        below = self._passes.seconds(less)
        if judging is None or above is None or below is None or less == most:
            return None
        row = (above - below) / (most - less)
        least = judging * rows / (self.prompts + rows)  # of a pass that is bound by arithmetic, and none is worse
        return self._step(sequences, length, max(least, judging - row * self.prompts))

    def _step(self, sequences: int, length: int, judging: float | None) -> float | None:
        """Drafting laid on a pass."""
        if length == 0 or judging is None:
            return judging
        for other in sorted(self._drafts, key=lambda x: abs(x - length)):
            drafting = self._drafts[other].seconds(sequences)
            if drafting is not None:
                return judging + drafting * length / other
        return None

    def least(self, sequences: int, length: int) -> float | None:
        """The same from below: drafting to a length that was never drafted to may take no time at all."""
        judging = self._passes.seconds(sequences * (1 + length))
        own = self._drafts[length].seconds(sequences) if length in self._drafts else None
        return None if judging is None else judging + (own or 0.0)
