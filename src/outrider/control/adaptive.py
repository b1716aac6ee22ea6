"""Draft length from the clock: as deep as it pays for this load, and not at all where it does not.

With b sequences in a step and a draft length L, a step takes T(b, L) seconds and emits E(L) tokens per sequence, so a length is
worth E(L) / T(b, L). Both are measured: E from the steps that were accepted at each depth, T as the medians of the latest steps.
Speculation gains over plain decoding exactly when E(L) > T(b, L) / T(b, 0) (Leviathan et al. 2023, Theorem 3.8, with the cost
of drafting and of the wider verification measured instead of modelled).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol, cast, runtime_checkable

from outrider.errors import ConfigError
from outrider.types import SequenceView, StepRecord

SAMPLES = 15
"""Latest step times of which the median is taken."""
ENOUGH = 4
"""Step times without which a length is not judged."""
PROBE = 6
"""Steps of a probe of another length; the first of them draws a catch-up of the drafter and is not timed."""
FIRST_PAUSE, LAST_PAUSE = 48, 1536
"""Steps between two probes: doubled while nothing changes, so that probing costs below one per cent in the long run."""
MEMORY = 400.0
"""Sequence-steps after which evidence about acceptance has lost 63% of its weight."""


@runtime_checkable
class _Params(Protocol):
    """What this controller reads of a request's sampling parameters."""

    @property
    def seed(self) -> int | None: ...
    @property
    def greedy(self) -> bool: ...
    @property
    def draft_length(self) -> int | None: ...


def load_class(sequences: int) -> int:
    """Loads that share measurements: 1, 2, 3, 4 sequences by themselves, then 6, 8, 12, 16, 24, ... as upper ends."""
    if sequences <= 4:
        return sequences
    top = 4
    while True:
        for upper in (top * 3 // 2, top * 2):
            if sequences <= upper:
                return upper
        top *= 2


@dataclass(slots=True)
class _Load:
    """What is known of one load class.

    verify[L], draft[L]: seconds of the latest steps that verified, and that drafted, with length L. length: the choice.
    pause, left: steps between two probes, and until the next one. probing: the length on trial, or -1.
    """

    length: int
    verify: dict[int, deque[float]] = field(default_factory=dict)
    draft: dict[int, deque[float]] = field(default_factory=dict)
    pause: int = FIRST_PAUSE
    left: int = PROBE
    probing: int = -1
    turn: int = 0

    def seconds(self, length: int) -> float | None:
        """T(b, length): median verification plus median drafting; None until both were seen often enough."""
        verify, draft = self.verify.get(length, ()), self.draft.get(length, ())
        if len(verify) < ENOUGH or len(draft) < ENOUGH:
            return None
        return median(verify) + median(draft)


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
        self._hits, self._tries = [0.0] * longest, [0.0] * longest
        self._before: tuple[int, int] | None = None  # sequences and length of the draft that this step verified
        self._now: tuple[int, int] | None = None  # and of the draft that it made
        self._last = 0

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
        prompts = record.rows > record.scored + record.counts.proposed
        if before is not None and record.scored:
            self._learn_acceptance(record, before[1])
        if before is None or now is None or prompts or record.scored != before[0]:
            return
        load, length = self._load(before[0]), before[1]
        _keep(load.verify, length, sum(s for phase, s in record.seconds.items() if phase != "draft"))
        if not (now[1] and not length):  # after a stretch of plain steps the drafter first reads what it has missed
            _keep(self._load(now[0]).draft, now[1], record.seconds["draft"])
        self._decide(load)

    # ------------------------------------------------------------------ what it knows
    def tokens_per_step(self, length: int) -> float:
        """E(L) = 1 + sum over depths of the share of steps that were accepted there; deeper ones continue geometrically."""
        total, share, fall = 1.0, 1.0, 0.7
        for depth in range(length):
            if self._tries[depth] >= 1.0:
                new = self._hits[depth] / self._tries[depth]
                fall, share = min(1.0, new / share) if share > 0 else 0.0, new
            else:
                share *= fall
            total += share
        return total

    def outlook(self) -> Outlook:
        """What it believes about the load of the latest step."""
        load = self._loads.get(load_class(self._last)) if self._last else None
        if load is None:
            return Outlook(self._last, self.first, None, None, None)
        plain, mine = load.seconds(0), load.seconds(load.length)
        if plain is None or mine is None:
            return Outlook(self._last, load.length, None, plain, None)
        gain = self.tokens_per_step(load.length) * plain / mine
        return Outlook(self._last, load.length, gain, plain, break_even(load.length, mine / plain))

    # ------------------------------------------------------------------ inside
    def _pinned(self, view: SequenceView) -> bool:
        params = cast(_Params, view.params)
        return not self.invariant and params.seed is not None and not params.greedy

    def _load(self, sequences: int) -> _Load:
        return self._loads.setdefault(load_class(sequences), _Load(self.first))

    def _choice(self, sequences: int) -> int:
        load = self._load(sequences)
        return load.length if load.probing < 0 else load.probing

    def _learn_acceptance(self, record: StepRecord, length: int) -> None:
        keep = max(0.0, 1.0 - record.scored / MEMORY)
        accepted = record.counts.accepted_at
        for depth in range(min(length, self.longest)):
            hits = accepted[depth] if depth < len(accepted) else 0
            self._hits[depth] = keep * self._hits[depth] + hits
            self._tries[depth] = keep * self._tries[depth] + record.scored

    def _decide(self, load: _Load) -> None:
        """Count down; at the end of a pause start a probe, at the end of a probe judge."""
        load.left -= 1
        if load.left > 0:
            return
        if load.probing < 0:
            trial = self._trial(load)
            if trial is None:
                load.left = load.pause
                return
            load.probing, load.left = trial, PROBE
            for times in (load.verify.get(trial), load.draft.get(trial)):
                if times is not None:  # what was measured long ago was another traffic: this probe shall outvote it
                    while len(times) >= ENOUGH:
                        times.popleft()
            return
        load.probing = -1
        changed = self._choose(load)
        fresh = any(load.seconds(x) is None for x in self._neighbours(load))
        load.pause = FIRST_PAUSE if changed else min(LAST_PAUSE, load.pause * 2)
        load.left = PROBE if fresh else load.pause

    def _neighbours(self, load: _Load) -> list[int]:
        """Lengths worth knowing beside the choice: plain decoding, one less, one more; from plain, one and the first."""
        near = (0, load.length - 1, load.length + 1) if load.length else (min(1, self.longest), self.first)
        return [x for x in dict.fromkeys(near) if 0 <= x <= self.longest and x != load.length]

    def _trial(self, load: _Load) -> int | None:
        """The next length to try: an unknown neighbour first, otherwise all neighbours in turn."""
        near = self._neighbours(load)
        if not near:
            return None
        unknown = [x for x in near if load.seconds(x) is None]
        load.turn += 1
        return unknown[0] if unknown else near[load.turn % len(near)]

    def _choose(self, load: _Load) -> bool:
        """Move to the best known length if it is better by the margin, and to plain decoding if the choice loses to it."""
        worth = {
            x: self.tokens_per_step(x) / seconds
            for x in range(self.longest + 1)
            if (seconds := load.seconds(x)) is not None
        }
        if load.length not in worth:
            return False
        best = max(worth, key=worth.__getitem__)
        loses = load.length > 0 and 0 in worth and worth[0] > worth[load.length]
        if best == load.length or not (loses or worth[best] > (1 + self.margin) * worth[load.length]):
            return False
        if best and 0 in worth and worth[best] <= (1 + self.margin) * worth[0]:
            best = 0
        moved, load.length = best != load.length, best
        return moved


def _keep(table: dict[int, deque[float]], length: int, seconds: float) -> None:
    table.setdefault(length, deque(maxlen=SAMPLES)).append(seconds)


def break_even(length: int, cost: float) -> float | None:
    """Rejection probability r per judged token at which `length` gains nothing: 1 + sum over d <= length of (1 - r)^d = cost.

    cost: seconds of a speculative step over those of a plain one. 1.0 if even certain rejection loses nothing, 0.0 if even
    certain acceptance would not pay, None for length 0.
    """
    if length == 0:
        return None
    if cost <= 1.0:
        return 1.0
    if cost >= 1.0 + length:
        return 0.0
    low, high = 0.0, 1.0  # of the acceptance probability: the sum rises with it
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if 1.0 + sum(middle**d for d in range(1, length + 1)) < cost else (low, middle)
    return 1.0 - (low + high) / 2
