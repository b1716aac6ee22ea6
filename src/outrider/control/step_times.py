"""Seconds of a step for any load and draft length, estimated from all steps.

A step of b sequences with drafts of length L is a pass of b (1 + L) rows and the drafting of L levels. Both are learnt
separately, from steps of any kind, so a load and length that never ran can be predicted. A target whose state cannot be cut
reads tokens again after rejections; they are rows of the next step's pass, and a cost of the length that was rejected. The
drafter's prefill is kept separately (`outrider.control.prefill_cost`).

Both grow with what is cached: W + B k S bytes instead of W (Chen et al., "MagicDec", ICLR 2025). A verification reads a
cached token once for all rows of its sequence, and every further row of them adds the arithmetic of a few per cent of that;
a draft model's own cache is read in every level, a view of the target's is not, which the slopes of the two, learnt apart,
show.
"""

from __future__ import annotations

from collections.abc import Callable

from outrider.control.prefill_cost import PrefillCost
from outrider.control.row_times import EXTRAPOLATION_FACTOR, RowTimes
from outrider.records import StepRecord
from outrider.theory.context_times import FURTHER_ROW

USUAL = 1.0 / 32.0
"""Weight of the newest step in the average number of prompt rows per step."""


NEAR = 0.9 * EXTRAPOLATION_FACTOR
"""The lower end of a slope is this many times fewer rows, if half of them were never measured."""


class _Drafting:
    """Seconds of drafting to one length, by number of sequences."""

    def __init__(self) -> None:
        self.alone, self.loaded = RowTimes(), RowTimes()  # in steps without prefill, and in all steps

    def seconds(self, sequences: int, cached: float | None) -> float | None:
        alone = self.alone.seconds(sequences, cached)
        return self.loaded.seconds(sequences, cached) if alone is None else alone


class StepTimes:
    """Seconds of a step by load and draft length, and of the drafter's prefill.

    read_again: tokens of one sequence that a step with drafts of this length reads again on average, from acceptance; it counts
    once a step has read any.
    """

    def __init__(
        self,
        read_again: Callable[[int], float] = lambda length: 0.0,
        work: Callable[[float], float] | None = None,
    ) -> None:
        self._read_again, self._reads_again = read_again, False
        self._passes = RowTimes(work)  # of the target, by rows
        self._drafts: dict[int, _Drafting] = {}  # by length
        self.reading = PrefillCost()
        self.prompts = 0.0
        """Recent average of prompt rows per step."""
        self.cached: float | None = None
        """Tokens that the present sequences have cached, in all: what predictions are made for; None: what was measured last."""

    def learn(self, record: StepRecord, before: tuple[int, int] | None, now: tuple[int, int] | None) -> None:
        """Learn from a step. before, now: sequences and deepest length of the draft it verified and of the one it made; None if
        requests or seeds set lengths of their own."""
        drafting = record.seconds["draft"]
        prompts = max(0, record.rows - record.scored - record.counts.proposed)
        self.prompts += USUAL * (prompts - self.prompts)
        if record.rows > 0:
            seen = record.cached + FURTHER_ROW * (record.attended - record.cached)
            self._passes.learn(record.rows + record.replayed, sum(record.seconds.values()) - drafting, seen)
        self._reads_again |= record.replayed > 0
        if now is None or now[1] == 0 or (before is not None and before[1] == 0):
            return  # after a plain step the drafter also reads the tokens of that step
        sequences, length = now
        mine = self._drafts.setdefault(length, _Drafting())
        mine.loaded.learn(sequences, drafting, record.cached)
        alone = mine.alone.seconds(sequences, record.cached)
        if not prompts:
            mine.alone.learn(sequences, drafting, record.cached)
        elif alone is not None:
            self.reading.learn(prompts, drafting - alone)

    def rows(self, sequences: int, length: int) -> float:
        """Rows of a pass, with those read again that such steps cause."""
        return sequences * (1 + length + (self._read_again(length) if self._reads_again else 0.0))

    def _pass(self, rows: float, sequences: int) -> float | None:
        """Seconds of a pass of `rows` rows for these sequences at the present context."""
        if self.cached is None:
            return self._passes.seconds(rows)
        return self._passes.seconds(rows, self.cached * (1.0 + FURTHER_ROW * max(0.0, rows / max(1, sequences) - 1.0)))

    def own_share(self, record: StepRecord, length: int) -> float:
        """Seconds to add to those of a step that verified drafts of this length, so that it bears the tokens that its own
        rejections have read again, in the next step, and not those of the step before."""
        if not self._reads_again:
            return 0.0
        found = self._passes.seconds(record.rows + record.replayed)
        own = self._passes.seconds(record.rows + self.rows(record.scored, length) - record.scored * (1 + length))
        return 0.0 if found is None or own is None else own - found

    def seconds(self, sequences: int, length: int, depth: int | None = None) -> float | None:
        """Predicted seconds of a step with drafts of this mean length, without the drafter's prefill; None if nothing near is
        known. depth: of the deepest draft, None: all have one length."""
        return self._step(
            sequences, length if depth is None else depth, self._pass(self.rows(sequences, length), sequences)
        )

    def beside(self, sequences: int, length: int, longest: int, depth: int | None = None) -> float | None:
        """The same for steps with the recent amount of prefill, minus the time of those rows alone, which is due at any length.
        longest: of all compared lengths."""
        rows, most = self.rows(sequences, length), self.prompts + self.rows(sequences, longest)
        verifying, above = (
            self._passes.seconds(self.prompts + rows, self.cached),
            self._passes.seconds(most, self.cached),
        )
        less = next((x for x in (0.5 * most, most / NEAR) if self._passes.seconds(x) is not None), most)
        below = self._passes.seconds(less, self.cached)
        if verifying is None or above is None or below is None or less == most:
            return None
        row = (above - below) / (most - less)
        least = verifying * rows / (self.prompts + rows)  # the share of a pass bound by arithmetic, the lower bound
        deepest = length if depth is None else depth
        return self._step(sequences, deepest, max(least, verifying - row * self.prompts))

    def _step(self, sequences: int, length: int, verifying: float | None) -> float | None:
        """Seconds of a pass plus those of drafting."""
        if length == 0 or verifying is None:
            return verifying
        for other in sorted(self._drafts, key=lambda x: abs(x - length)):
            drafting = self._drafts[other].seconds(sequences, self.cached)
            if drafting is not None:
                return verifying + drafting * length / other
        return None

    def least(self, sequences: int, length: int, depth: int | None = None) -> float | None:
        """A lower bound of the same: drafting to a depth that was never measured counts as no time."""
        verifying, deepest = self._pass(self.rows(sequences, length), sequences), length if depth is None else depth
        own = self._drafts[deepest].seconds(sequences, self.cached) if deepest in self._drafts else None
        return None if verifying is None else verifying + (own or 0.0)
