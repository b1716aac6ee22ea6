"""Draft length from the clock: as deep as it pays for this load, and not at all where it does not.

With b sequences in a step and a draft length L, a step takes T(b, L) seconds and emits E(L) tokens per sequence, so a length is
worth E(L) / T(b, L). Both are measured: E from the steps that were accepted at each depth, ratios of T by trials in which two
lengths take turns, step by step. Speculation gains over plain decoding exactly when E(L) > T(b, L) / T(b, 0) (Leviathan et al.
2023, Theorem 3.8, with the cost of drafting and of the wider verification measured instead of modelled). A ratio of neighbouring
steps is needed because the speed of a machine changes by more, and for longer, than lengths differ. In heavy traffic such
neighbours are rare: until a load has had a trial, T is put together from whatever passes came by (`outrider.control.rows`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol, cast, runtime_checkable

from outrider.control.acceptance import Depths, break_even
from outrider.control.rows import RowTimes, load_class
from outrider.errors import ConfigError
from outrider.types import SequenceView, StepRecord

PAIRS, TRIM = 16, 4
"""Paired step times of a trial of two lengths, and how many of each length's slowest are left out of its mean."""
AGREE, AGREE_PLAIN = 0.7, 0.5
"""Share of the pairs that must agree with a move, and with one to plain decoding, beside the means."""
SETTLE, FIRST_PAUSE, LAST_PAUSE = 8, 64, 2048
"""Steps before a trial while a neighbouring length is unknown, and otherwise: doubled while nothing changes, so that trials
cost below half a per cent in the long run."""
HOPELESS, SURE = 0.8, 5
"""A trial ends early when its first SURE pairs all say that it is worth less than HOPELESS of the choice."""


@runtime_checkable
class _Params(Protocol):
    """What this controller reads of a request's sampling parameters."""

    @property
    def seed(self) -> int | None: ...
    @property
    def greedy(self) -> bool: ...
    @property
    def draft_length(self) -> int | None: ...


@dataclass(slots=True)
class _Load:
    """What is known of one load class.

    length: the choice. trial: the length that takes turns with it, or -1. turn: steps of the trial so far.
    pairs: T(trial) and T(length), pair by pair. halves: step times of the pair being measured, by part and length.
    cost[L]: latest T(L) / T(0). step: median seconds of the latest steps of the choice. at: the step it was last seen in.
    """

    length: int
    trial: int = -1
    turn: int = 0
    pairs: list[tuple[float, float]] = field(default_factory=list)
    halves: dict[tuple[str, int], float] = field(default_factory=dict)
    cost: dict[int, float] = field(default_factory=lambda: {0: 1.0})
    known: set[int] = field(default_factory=set)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=PAIRS))
    pause: int = FIRST_PAUSE
    left: int = SETTLE
    tried: int = 0
    at: int = -1

    def pair(self) -> None:
        """Complete a pair when both lengths have been verified and drafted once."""
        sums = [
            self.halves.get(("verify", x), math.nan) + self.halves.get(("draft", x), math.nan)
            for x in (self.trial, self.length)
        ]
        if not any(math.isnan(x) for x in sums) and sums[1] > 0:
            self.pairs.append((sums[0], sums[1]))
            self.halves.clear()

    def ratio(self) -> float:
        """T(trial) / T(length): a ratio of means, since throughput is one, without the slowest steps of either."""
        keep = max(1, len(self.pairs) * (PAIRS - TRIM) // PAIRS)
        return sum(sorted(x for x, _ in self.pairs)[:keep]) / sum(sorted(y for _, y in self.pairs)[:keep])


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the controller believes about the present load.

    sequences: the load. length: its choice. speedup: of that choice over plain decoding. plain_seconds: a plain step.
    break_even: rejection probability per judged token at which the choice would gain nothing. None: not measured yet.
    """

    sequences: int
    length: int
    speedup: float | None
    plain_seconds: float | None
    break_even: float | None


@dataclass(frozen=True, slots=True)
class Speed:
    """A draft length as measured: tokens per step, seconds of a step over those of a plain one, and speed over plain decoding."""

    length: int
    tokens_per_step: float
    cost: float
    speedup: float


class Adaptive:
    """One draft length for each load, 0 to `longest`, kept where it pays and changed with hysteresis.

    first:     length before anything is known. longest: most it may use (both >= 0, first <= longest).
    margin:    gain over the present choice below which nothing changes, and that speculation must show over plain
               decoding to be taken up again; it is dropped at once when it is slower than plain decoding.
    invariant: the rule gives the same text whatever the length (`match`). Otherwise a sampled request with a seed of its
               own always gets `first`, so that its text depends on the seed and on nothing that was measured.
    """

    def __init__(self, first: int, longest: int, *, margin: float = 0.03, invariant: bool = False) -> None:
        if not 0 <= first <= longest:
            raise ConfigError(f"draft lengths must be 0 <= first <= longest, got first {first} and longest {longest}")
        if not 0 <= margin < 1:
            raise ConfigError(f"the margin must be at least 0 and below 1, got {margin}")
        self.first, self.longest, self.margin, self.invariant = first, longest, margin, invariant
        self._loads: dict[int, _Load] = {}
        self._accepted = Depths(longest)
        self._before: tuple[int, int] | None = None  # sequences and length of the draft that this step verified
        self._now: tuple[int, int] | None = None  # and of the draft that it made
        self._last = self._steps = 0
        self._passes = RowTimes()  # of the target, by rows
        self._levels = RowTimes()  # of one level of drafts, by sequences

    # ------------------------------------------------------------------ the protocol
    def budget(self, sequences: Sequence[SequenceView]) -> list[int]:
        """The choice for this load; `first` for a sampled request with its own seed unless lengths are `invariant`."""
        length = self._choice(len(sequences))
        out = [self.first if self._pinned(v) else length for v in sequences]
        own = any(cast(_Params, v.params).draft_length is not None for v in sequences)
        self._now = None if own or any(x != length for x in out) else (len(sequences), length)
        self._last = len(sequences)
        return out

    def observe(self, record: StepRecord) -> None:
        """Learn from a step whose sequences all had one length, and decide again."""
        before, now = self._before, self._now
        self._before, self._now = now, None
        self._steps += 1
        if before is not None and record.scored:
            self._accepted.learn(record, before[1])
        self._learn_times(record, now)
        prompts = record.rows > record.scored + record.counts.proposed
        if before is None or now is None or prompts or not record.scored == before[0] == now[0]:
            return
        load = self._load(now[0])
        if load.at != self._steps - 1:
            load.halves.clear()  # halves of a pair must be neighbours
        load.at = self._steps
        verify = sum(s for phase, s in record.seconds.items() if phase != "draft")
        if load.trial < 0:
            load.recent.append(verify + record.seconds["draft"])
        else:
            load.halves["verify", before[1]], load.halves["draft", now[1]] = verify, record.seconds["draft"]
            load.pair()
        self._decide(load)

    # ------------------------------------------------------------------ what it knows
    def tokens_per_step(self, length: int) -> float:
        """E(L) by what was accepted lately."""
        return self._accepted.tokens_per_step(length)

    def outlook(self) -> Outlook:
        """What it believes about the load of the latest step."""
        load = self._loads.get(load_class(self._last)) if self._last else None
        if load is None:
            return Outlook(self._last, self.first, None, None, None)
        cost = load.cost.get(load.length)
        if cost is None or not load.recent or not load.known:
            return Outlook(self._last, load.length, None, None, None)
        plain = median(load.recent) / cost
        return Outlook(
            self._last, load.length, self.tokens_per_step(load.length) / cost, plain, break_even(load.length, cost)
        )

    def speeds(self) -> list[Speed]:
        """The lengths whose cost was measured at the load of the latest step, shortest first; plain decoding is among them."""
        load = self._loads.get(load_class(self._last)) if self._last else None
        if load is None:
            return []
        known = [(x, self.tokens_per_step(x), cost) for x, cost in sorted(load.cost.items())]
        return [Speed(x, tokens, cost, tokens / cost) for x, tokens, cost in known]

    # ------------------------------------------------------------------ inside
    def _pinned(self, view: SequenceView) -> bool:
        params = cast(_Params, view.params)
        return not self.invariant and params.seed is not None and not params.greedy

    def _load(self, sequences: int) -> _Load:
        return self._loads.setdefault(load_class(sequences), _Load(self.first))

    def _choice(self, sequences: int) -> int:
        """The length for this load; in a trial the two lengths in turn; before the first trial what the passes so far foretell."""
        load = self._load(sequences)
        if load.trial < 0:
            if not load.known and self._steps % SETTLE == 0:
                load.length = self._foretold(sequences, load.length)
            return load.length
        load.turn += 1
        return load.trial if load.turn % 2 else load.length

    def _foretold(self, sequences: int, length: int) -> int:
        """The length of the best foretold speed if that gains the margin over `length`; plain decoding if it gains at all."""
        if not self._accepted.known:
            return length
        level = self._levels.seconds(sequences)
        worth = {}
        for x in range(self.longest + 1):
            judging = self._passes.seconds(sequences * (1 + x))
            if judging is not None and (level is not None or x == 0):
                worth[x] = self.tokens_per_step(x) / (judging + x * (level or 0.0))
        if 0 not in worth or length not in worth:
            return length
        best = max(worth, key=lambda x: worth[x])
        if worth[best] > worth[length] * (1.0 + self.margin):
            return best
        return 0 if worth[0] > worth[length] else length

    def _learn_times(self, record: StepRecord, now: tuple[int, int] | None) -> None:
        """What a pass of so many rows took, and a level of drafts for so many sequences, whatever else the step did."""
        drafting = record.seconds["draft"]
        if record.rows > 0:
            self._passes.learn(record.rows, sum(record.seconds.values()) - drafting)
        if now is not None and now[1] > 0:
            self._levels.learn(now[0], drafting / now[1])

    def _decide(self, load: _Load) -> None:
        """At the end of a pause begin a trial; at the end of a trial judge it."""
        if load.trial >= 0:
            if len(load.pairs) >= PAIRS or self._hopeless(load):
                self._judge(load)
            return
        load.left -= 1
        if load.left <= 0:
            load.trial, load.turn = self._next_trial(load), 0
            load.pairs.clear()
            load.halves.clear()
            if load.trial < 0:
                load.left = LAST_PAUSE

    def _neighbours(self, load: _Load) -> list[int]:
        """Lengths worth trying against the choice: plain decoding, one less, one more; against plain, the first and one."""
        near = (0, load.length - 1, load.length + 1) if load.length else (self.first, min(1, self.longest))
        return [x for x in dict.fromkeys(near) if 0 <= x <= self.longest and x != load.length]

    def _next_trial(self, load: _Load) -> int:
        """An unknown neighbour first, otherwise all neighbours in turn; -1 if there is none."""
        near = self._neighbours(load)
        load.tried += 1
        unknown = [x for x in near if x not in load.known]
        return unknown[0] if unknown else near[load.tried % len(near)] if near else -1

    def _hopeless(self, load: _Load) -> bool:
        """Whether a trial need not go on: every pair so far says that the length on trial is much worse."""
        gain = self.tokens_per_step(load.trial) / self.tokens_per_step(load.length)
        return len(load.pairs) >= SURE and all(gain * y < HOPELESS * x for x, y in load.pairs)

    def _judge(self, load: _Load) -> None:
        """Move to the trial's length if it is better by the margin, to plain decoding also if it is better at all."""
        trial, length = load.trial, load.length
        ratio = load.ratio()
        gain = self.tokens_per_step(trial) / self.tokens_per_step(length)
        needed = 1.0 if trial == 0 else 1.0 + self.margin
        agree = sum(gain * y > needed * x for x, y in load.pairs) / len(load.pairs)
        if length == 0:
            load.cost[trial] = ratio
        elif trial == 0:
            load.cost[length] = 1.0 / ratio
        elif length in load.cost:
            load.cost[trial] = ratio * load.cost[length]
        moved = gain > needed * ratio and agree >= (AGREE_PLAIN if trial == 0 else AGREE)
        load.known = {length} if moved else load.known | {trial}
        load.trial = -1
        if moved:
            load.length = trial
            load.recent.clear()
        load.pause = FIRST_PAUSE if moved else min(LAST_PAUSE, 2 * load.pause)
        unknown = any(x not in load.known for x in self._neighbours(load))
        load.left = SETTLE if unknown else load.pause
