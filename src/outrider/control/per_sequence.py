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
from dataclasses import dataclass, field

from outrider.control.adaptive import Adaptive
from outrider.control.own_acceptance import OwnAcceptance
from outrider.control.seeds import pinned
from outrider.records import StepRecord
from outrider.theory.shared_rows import Share, SharedRows
from outrider.types import SequenceView

EVERY = 4
"""Steps after which shares are decided again while the same sequences are there."""


@dataclass(frozen=True, slots=True)
class _Present:
    """The sequences that share rows. slots: theirs. rows: what rows gain. ratio: of accepted to expected tokens. shares: what
    they get, by budget."""

    slots: tuple[int, ...] = ()
    rows: SharedRows = field(default_factory=lambda: SharedRows([[]]))
    ratio: float = 1.0
    shares: dict[int, Share] = field(default_factory=dict)


class PerSequence(Adaptive):
    """A budget of rows for each load, and each sequence's share of it. Arguments: see `Adaptive`; no draft is longer than
    `longest`, and no budget more than `longest` rows a sequence."""

    def __init__(
        self,
        first: int,
        longest: int,
        *,
        margin: float = 0.03,
        invariant: bool = False,
        work: Callable[[float], float] | None = None,
    ) -> None:
        super().__init__(first, longest, margin=margin, invariant=invariant, work=work)
        self._own = OwnAcceptance()
        self._present = _Present()

    # ------------------------------------------------------------------ the protocol
    def budget(self, sequences: Sequence[SequenceView]) -> list[int]:
        """Each sequence's share; `first` for a sampled request with its own seed unless lengths are `invariant`."""
        others = self._own.notice(sequences)
        ready = {v.slot for v in sequences if len(v.tokens) - v.cached == 1}
        sharing = [v for v in sequences if v.slot in ready and not pinned(v, self.invariant)]
        slots, now = tuple(v.slot for v in sharing), self._present
        if others or slots != now.slots or self._steps % EVERY == 0:
            now = self._present = _Present(slots, self._own.rows(sharing, self.longest), self._own.ratio)
        out = super().budget(sequences)
        asked = {v.slot: (x, 0.0) for v, x in zip(sequences, out, strict=True) if x and v.slot in ready}
        asked |= {s: (asked[s][0], now.rows.gain(i, asked[s][0])) for i, s in enumerate(slots) if s in asked}
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
        return 1.0 + now.ratio * self._share(now, length).gain / len(now.slots)

    # ------------------------------------------------------------------ inside
    def _shared(self, sequences: Sequence[SequenceView], length: int) -> list[int]:
        now = self._present
        if not length:
            return [0] * len(sequences)
        mine = dict(zip(now.slots, self._share(now, length).lengths, strict=True))
        return [mine.get(v.slot, length if pinned(v, self.invariant) else 0) for v in sequences]

    def _depth(self, length: int) -> int:
        now = self._present
        return max(self._share(now, length).lengths) if now.slots and length else length

    def _share(self, now: _Present, budget: int) -> Share:
        """The best use of `budget` rows for each sequence."""
        if budget not in now.shares:
            now.shares[budget] = now.rows.share(budget * len(now.slots), self._limit(now, budget))
        return now.shares[budget]

    def _limit(self, now: _Present, budget: int) -> int:
        """How deep drafts may be. Deeper ones gain more by the same rows, and take longer to make; until it is known how long,
        none is deeper than `budget`."""
        sequences = len(now.slots)
        tokens = sequences + now.ratio * now.rows.gains(budget * sequences)
        found, least = budget, None
        for deepest in range(budget, self.longest + 1):
            seconds = self._forecast.seconds(sequences, budget, deepest)
            if seconds is None:
                break
            if least is None or seconds / tokens[deepest] < least:
                found, least = deepest, seconds / tokens[deepest]
        return found
