"""Draft lengths per sequence: the rows that a common length would take, given to the sequences that gain most by them.

`Adaptive` chooses a length L for the load, by trials against its neighbours and against plain decoding. Here L is a budget: L rows
for each of b sequences, which are shared out where the expected gain per row is largest (`theory.shared_rows`), from each
sequence's own acceptance, drawn towards that of all (`theory.shrinkage`). Everything else is `Adaptive`: the trials measure a step
with rows shared out, and the tokens of such a step are the model's, scaled by what such steps have really accepted lately. So
budgets are compared as lengths are, and plain decoding is taken up where it is faster.

Lengths depend on counts of earlier steps alone, never on tokens that are still to be judged, and every exact rule stays exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from outrider.control.adaptive import Adaptive
from outrider.control.own_acceptance import OwnAcceptance
from outrider.control.seeds import pinned
from outrider.records import StepRecord
from outrider.theory.shared_rows import Share, SharedRows
from outrider.types import SequenceView


class _Present:
    """The sequences that share rows in a step. slots: theirs. rows: what rows gain. seconds: of a step, by budget and depth; None
    where nothing near was measured. ratio: of accepted to expected tokens."""

    def __init__(
        self, slots: list[int], rows: SharedRows, seconds: Callable[[int, int], float | None], ratio: float
    ) -> None:
        self.slots, self.rows, self.seconds, self.ratio = slots, rows, seconds, ratio
        self._shares: dict[int, Share] = {}

    def share(self, budget: int) -> Share:
        """The best use of `budget` rows for each sequence.

        Deeper drafts gain more by the same rows and take longer to make; until it is known how long, none is deeper than `budget`.
        """
        if budget not in self._shares:
            self._shares[budget] = self._best(budget)
        return self._shares[budget]

    def _best(self, budget: int) -> Share:
        sequences, total = len(self.slots), budget * len(self.slots)
        found, least = self.rows.share(total, budget), None
        for deepest in range(budget, self.rows.depth + 1) if total else ():
            seconds, share = self.seconds(budget, deepest), self.rows.share(total, deepest)
            if seconds is None:
                break
            needed = seconds / (sequences + self.ratio * share.gain)
            if least is None or needed < least:
                found, least = share, needed
        return found


class PerSequence(Adaptive):
    """A budget of rows for each load, and each sequence's share of it. Arguments: see `Adaptive`; no draft is longer than
    `longest`, and no budget more than `longest` rows a sequence."""

    def __init__(self, first: int, longest: int, *, margin: float = 0.03, invariant: bool = False) -> None:
        super().__init__(first, longest, margin=margin, invariant=invariant)
        self._own = OwnAcceptance()
        self._present = _Present([], SharedRows([[]]), lambda *_: None, 1.0)

    # ------------------------------------------------------------------ the protocol
    def budget(self, sequences: Sequence[SequenceView]) -> list[int]:
        """Each sequence's share; `first` for a sampled request with its own seed unless lengths are `invariant`."""
        self._own.notice(sequences)
        ready = {v.slot for v in sequences if len(v.tokens) - v.cached == 1}
        sharing = [v for v in sequences if v.slot in ready and not pinned(v, self.invariant)]
        slots, depths = [v.slot for v in sharing], [_most(v, self.longest) for v in sharing]
        seconds = lambda budget, deepest: self._forecast.seconds(len(sharing), budget, deepest)  # noqa: E731
        now = self._present = _Present(slots, self._own.rows(slots, depths), seconds, self._own.ratio)
        out = super().budget(sequences)
        asked = {v.slot: (x, 0.0) for v, x in zip(sequences, out, strict=True) if v.slot in ready}
        asked |= {slot: (asked[slot][0], now.rows.gain(i, asked[slot][0])) for i, slot in enumerate(slots)}
        self._own.ask(asked)
        return out

    def observe(self, record: StepRecord) -> None:
        """Learn from a step, and decide again if it can be compared with its neighbour."""
        self._own.learn(record.each)
        super().observe(record)

    # ------------------------------------------------------------------ estimates
    def tokens_per_step(self, length: int) -> float:
        """Tokens of a sequence in a step whose budget is `length` rows for each of the present sequences."""
        now = self._present
        if not now.slots or not length:
            return super().tokens_per_step(length)
        return 1.0 + now.ratio * now.share(length).gain / len(now.slots)

    # ------------------------------------------------------------------ inside
    def _shared(self, sequences: Sequence[SequenceView], length: int) -> list[int]:
        now = self._present
        mine = dict(zip(now.slots, now.share(length).lengths, strict=True))
        return [mine.get(v.slot, length if pinned(v, self.invariant) else 0) for v in sequences]

    def _depth(self, length: int) -> int:
        now = self._present
        return max(now.share(length).lengths) if now.slots else length


def _most(view: SequenceView, longest: int) -> int:
    """The longest draft that a sequence has a use for: its request's own limit, and the tokens that it may still emit."""
    own, left = view.params.draft_length, view.params.max_tokens - (len(view.tokens) - view.prompt) - 1
    return max(0, min(longest, left, longest if own is None else own))
