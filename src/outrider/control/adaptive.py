"""Draft length from measured times: the fastest length for the present load, which may be none.

With b sequences in a step and a draft length L, a step takes T(b, L) seconds and emits E(L) tokens per sequence, so the speed
of a length is E(L) / T(b, L). Both are measured: E from the acceptance at each depth, ratios of T by trials in which two
lengths alternate, step by step. Speculation is faster than plain decoding exactly when E(L) > T(b, L) / T(b, 0) (Leviathan et
al. 2023, Theorem 3.8, with the cost of drafting and of the wider verification measured instead of modelled). Trials compare
neighbouring steps because the speed of a machine changes by more, and for longer, than lengths differ. In heavy traffic such
neighbours are rare: until a load has had a trial, and again when it has had no such neighbours for a while, T is predicted from
all other steps (`control.step_times`), so that no choice outlives the evidence for it. Where a target reads tokens again after
rejections, a trial charges them to the length that was rejected, not to the step that read them. The drafter's own prefill
time, which no trial measures, is added to the steps of every length except 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from outrider.control.acceptance import AcceptanceByDepth, break_even
from outrider.control.length_search import LAST_PAUSE, MAX_TRIAL_STEPS, PAIRS, SETTLE, LengthSearch
from outrider.control.row_times import context_class, load_class
from outrider.control.seeds import pinned
from outrider.control.step_times import StepTimes
from outrider.errors import ConfigError
from outrider.records import StepRecord
from outrider.types import SequenceView

AGREE, AGREE_CLOSE, AGREE_PLAIN = 0.7, 0.6, 0.5
"""Share of the pairs that must agree, besides the median, with a beginning of drafts (each of these shows the margin), with another
draft length and with plain decoding (each shows any gain: with 5% noise on each half of a pair, of a gain of 2% six in ten do)."""
CLOSE = 1.0 / 3.0
"""Share of the margin that one draft length must show over another: of two that are close neither is a loss."""
EARLY_STOP_PAIRS, EARLY_STOP_MARGIN = 6, 0.1
"""A trial ends early after this many pairs if each shows that its length gains or loses at least this share."""
SKIP_TRIAL_BELOW = 0.9
"""A trial is postponed, to the longest pause at most, if the predicted speed of its length is below this share of the choice's."""
REQUIRED_PREFILL_RETURN = 2.0
"""Drafting starts again if the predicted saving is this many times the prefill cost: the load may change before it is repaid."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """The controller's estimates for the present load.

    sequences: the load. length: the chosen draft length; where no sequence follows it, as all have seeds, theirs. speedup: of
    that choice over plain decoding. plain_seconds: of a plain step. break_even: rejection probability per judged token at which
    the choice would break even. None: not measured yet.
    """

    sequences: int
    length: int
    speedup: float | None
    plain_seconds: float | None
    break_even: float | None


@dataclass(frozen=True, slots=True)
class Speed:
    """Measurements of a draft length: tokens per step, step time relative to a plain step, and speedup over plain decoding."""

    length: int
    tokens_per_step: float
    cost: float
    speedup: float


class Adaptive:
    """One draft length for each load (sequences, and a class of their mean context), 0 to `longest`, the fastest one, changed
    with hysteresis.

    first:     length before anything is measured. longest: the largest length (both >= 0, first <= longest).
    margin:    gain over the present choice below which nothing changes, and that speculation must show over plain
               decoding to start again; it stops at once when it is slower than plain decoding.
    invariant: the rule gives the same text for every length (`match`). Otherwise a sampled request with its own seed
               always gets `first`, so that its text depends on the seed and not on measurements.
    work:      what so many rows of the target read, relative to one; None for a dense target. It is the shape by which the time of
               lengths that were not tried is predicted from those that were.
    """

    def __init__(
        self,
        first: int,
        longest: int,
        *,
        margin: float = 0.03,
        invariant: bool = False,
        work: Callable[[float], float] | None = None,
    ) -> None:
        if not 0 <= first <= longest:
            raise ConfigError(f"draft lengths must be 0 <= first <= longest, got first {first} and longest {longest}")
        if not 0 <= margin < 1:
            raise ConfigError(f"the margin must be at least 0 and below 1, got {margin}")
        self.first, self.longest, self.margin, self.invariant = first, longest, margin, invariant
        self._loads: dict[tuple[int, int], LengthSearch] = {}  # by classes of sequences and of their context
        self._context = 0
        self._accepted = AcceptanceByDepth(longest)
        self._before: tuple[int, int] | None = None  # sequences and length of the draft that this step verified
        self._now: tuple[int, int] | None = None  # and of the draft that it made; None where lengths differ
        self._last = self._steps = self._deepest = 0
        self._judged: list[int] = []  # lengths of the drafts that this step verified
        self._all_pinned = False  # whether no sequence of the latest step follows the choice
        self._ready: list[int] = []  # and of those that it made, for sequences whose prompt was through
        self._prompts = False  # whether the latest step read prompts
        self._forecast = StepTimes(self._accepted.read_again, work)
        self.compared = self.plain = 0.0
        """Sums since the start: seconds of the steps whose load and length were measured (without prompts), and the seconds that
        plain decoding would have taken for their tokens at the same loads."""

    # ------------------------------------------------------------------ the protocol
    def budget(self, sequences: Sequence[SequenceView]) -> list[int]:
        """The choice for this load; `first` for a sampled request with its own seed unless lengths are `invariant`."""
        self._forecast.cached = sum(v.cached for v in sequences)
        self._context = context_class(self._forecast.cached / max(1, len(sequences)))
        length = self.choice(sequences)
        shared = self._shared(sequences, length)
        kept = [pinned(v, self.invariant) for v in sequences]
        self._all_pinned = all(kept)
        out = [self.first if keep else x for keep, x in zip(kept, shared, strict=True)]
        own = any(v.params.draft_length is not None for v in sequences)
        self._now = None if own or out != shared else (len(sequences), length)
        self._deepest = max(out, default=0)
        self._last = len(sequences)
        pairs = zip(out, sequences, strict=True)
        self._ready = [_at_most(x, v) for x, v in pairs if len(v.tokens) - v.cached == 1]
        self._forecast.reading.notice(sequences, length > 0)
        self._accepted.texts.notice(sequences)
        return out

    def observe(self, record: StepRecord) -> None:
        """Learn from a step, and decide again if its sequences all had one length."""
        before, now = self._before, self._now
        self._before, self._now = now, None
        self._steps += 1
        if record.scored:
            self._accepted.learn(record, self._judged)
            self._compare(record)
        self._judged = self._ready
        self._forecast.learn(record, before, None if now is None else (now[0], self._deepest))
        self._prompts = record.rows > record.scored + record.counts.proposed
        load = self._load(self._last)
        comparable = before is not None and now is not None and record.scored == before[0] == now[0]
        load.see(comparable and not self._prompts)
        if before is None or now is None or not comparable or self._prompts or load.blind:
            return
        if load.trial < 0 and not before[1] == now[1] == load.length:
            return
        if load.at != self._steps - 1:
            load.halves.clear()  # halves of a pair must be neighbours
        load.at = self._steps
        verify = sum(s for phase, s in record.seconds.items() if phase != "draft")
        verify = max(0.0, verify + self._forecast.own_share(record, before[1]))
        if load.trial < 0:
            load.recent.append(verify + record.seconds["draft"])
        else:
            load.halves["verify", before[1]], load.halves["draft", now[1]] = verify, record.seconds["draft"]
            load.pair()
        self._decide(load)

    # ------------------------------------------------------------------ estimates
    def tokens_per_step(self, length: int) -> float:
        """E(L) from recent acceptance."""
        return self._accepted.tokens_per_step(length)

    def outlook(self) -> Outlook:
        """The estimates for the load of the latest step."""
        load = self._loads.get((load_class(self._last), self._context)) if self._last else None
        if load is None or self._all_pinned:
            return Outlook(self._last, self.first, None, None, None)
        cost, usual = load.cost.get(load.length), load.usual()
        if cost is None or usual is None or not load.known:
            return Outlook(self._last, load.length, None, None, None)
        plain = self._charged(usual, self._last, load.length) / cost
        return Outlook(
            self._last, load.length, self.tokens_per_step(load.length) / cost, plain, break_even(load.length, cost)
        )

    def speeds(self) -> list[Speed]:
        """The lengths whose cost was measured at the load of the latest step, shortest first, including plain decoding."""
        load = self._loads.get((load_class(self._last), self._context)) if self._last else None
        if load is None:
            return []
        known = [(x, self.tokens_per_step(x), cost) for x, cost in sorted(load.cost.items())]
        return [Speed(x, tokens, cost, tokens / cost) for x, tokens, cost in known]

    # ------------------------------------------------------------------ inside
    def _compare(self, record: StepRecord) -> None:
        """Add a step to the sums of both ways of decoding."""
        load = self._loads.get((load_class(record.scored), self._context))
        drafted = sum(length > 0 for length in self._judged)
        cost = load.charged(record.counts.proposed / max(1, drafted)) if load else None
        if cost is None or record.rows > record.scored + record.counts.proposed:
            return
        seconds, share = sum(record.seconds.values()), min(1.0, drafted / record.scored)
        self.compared += seconds
        self.plain += record.counts.emitted / record.scored * seconds / (1.0 + share * (cost - 1.0))

    def _shared(self, sequences: Sequence[SequenceView], length: int) -> list[int]:
        """The draft length of each sequence where the choice is `length`."""
        return [length] * len(sequences)

    def _depth(self, length: int) -> int:
        """The deepest draft where the choice is `length`."""
        return length

    def _load(self, sequences: int) -> LengthSearch:
        """The state of the present load. A new one begins with the choice at the nearest context, not yet confirmed."""
        key = load_class(sequences), self._context
        found = self._loads.get(key)
        if found is None:
            near = min((c for n, c in self._loads if n == key[0]), key=lambda c: abs(c - key[1]), default=None)
            length = self.first if near is None else self._loads[key[0], near].length
            found = self._loads[key] = LengthSearch(self.first, self.longest, length)
        return found

    def _charged(self, seconds: float, sequences: int, length: int) -> float:
        """Seconds of a step of this load with drafts of this length, plus its share of the drafter's prefill."""
        return seconds + (self._forecast.reading.share(sequences * self.tokens_per_step(length)) if length else 0.0)

    def choice(self, sequences: Sequence[SequenceView]) -> int:
        """The length for this load: in a trial the two lengths alternately; the predicted one before the first trial and while no
        trial is possible.

        A trial pauses while prompts are read: such steps cannot be compared, and all of them would run with the trial's length. It
        also waits for the second step of a load: one that comes for a step at a time would be tried and never compared.
        """
        load = self._load(len(sequences))
        if not load.known and load_class(self._last) != load_class(len(sequences)):
            self._follow(load, len(sequences))
        if load.trial >= 0 and (load.turn >= MAX_TRIAL_STEPS or load.blind):
            load.abandon()
        if load.trial >= 0:
            arrived = load_class(self._last) != load_class(len(sequences))
            length = load.length if self._prompts or arrived else load.take_turn()
            load.spent += self._forecast.reading.behind(sequences) if length and not load.length else 0.0
            return length
        if load.blind or not load.known:
            if load.asked % SETTLE == 0:
                load.choose(self.predicted(len(sequences), load.length))
            load.asked += 1
        return load.length if self._saving_exceeds_prefill(sequences, load.length) else 0

    def _follow(self, load: LengthSearch, sequences: int) -> None:
        """Where passes are not timed by their rows, and so nothing is predicted: a load that comes for a step at a time, never
        compared, does what the nearest one does that was."""
        known = [(abs(n - sequences), one.length) for (n, _), one in self._loads.items() if one.known]
        if known and self._forecast.seconds(sequences, 0) is None and min(known)[1] != load.length:
            load.trial = -1
            load.choose(min(known)[1])

    def _saving_exceeds_prefill(self, sequences: Sequence[SequenceView], length: int) -> bool:
        """Whether drafts of this length will save more time over these sequences than the drafter's prefill of them costs."""
        if length == 0:
            return True
        plain, drafted = (self._forecast.seconds(len(sequences), x, self._depth(x)) for x in (0, length))
        if plain is None or drafted is None:
            return True
        saved = (plain - drafted / self.tokens_per_step(length)) / len(sequences)  # seconds per token
        reading = self._forecast.reading
        return saved <= 0 or reading.ahead(sequences) * saved >= REQUIRED_PREFILL_RETURN * reading.behind(sequences)

    def _worth(self, sequences: int, length: int, *, beside: bool = False) -> float | None:
        """Predicted tokens per second of a sequence at this load, with (`beside`) or without the recent amount of prefill; None if
        nothing similar was measured."""
        forecast = self._forecast
        alone = not beside or forecast.prompts < 1.0
        depth, most = self._depth(length), self.longest
        seconds = (
            forecast.seconds(sequences, length, depth) if alone else forecast.beside(sequences, length, most, depth)
        )
        return None if not seconds else self.tokens_per_step(length) / self._charged(seconds, sequences, length)

    def predicted(self, sequences: int, length: int) -> int:
        """The length of the best predicted speed if it beats that of `length` by the margin; plain decoding if it is faster at all.

        Plain decoding is the baseline: if it was never measured, a few steps of it come first.
        """
        if not self._accepted.known:
            return length
        predicted = {x: self._worth(sequences, x, beside=True) for x in range(self.longest + 1)}
        worth = {x: w for x, w in predicted.items() if w is not None}
        if length not in worth:
            return 0 if self._load(sequences).blind else length
        if 0 not in worth:
            return 0
        best = max(worth, key=lambda x: worth[x])
        if worth[best] > worth[length] * (1.0 + self.margin):
            return best
        return 0 if worth[0] > worth[length] else length

    def _decide(self, load: LengthSearch) -> None:
        """At the end of a pause begin a trial; at the end of a trial decide it."""
        if load.trial >= 0:
            if len(load.pairs) >= PAIRS or self._agreed(load):
                self._judge(load)
            return
        load.left -= 1
        if load.left > 0:
            return
        trial = load.next_trial()
        if trial > 0 and load.pause < LAST_PAUSE and self._doubtful(load, trial):
            load.put_off(trial)
        else:
            load.begin(trial)

    def _doubtful(self, load: LengthSearch, trial: int) -> bool:
        """Whether a trial is not worthwhile: even at best its length is much slower than the choice."""
        its, present = self._forecast.least(self._last, trial, self._depth(trial)), self._worth(self._last, load.length)
        if its is None or present is None:
            return False
        return self.tokens_per_step(trial) < SKIP_TRIAL_BELOW * present * self._charged(its, self._last, trial)

    def _gains(self, load: LengthSearch) -> list[float]:
        """Speed of the trial's length relative to the choice, pair by pair."""
        gain = self.tokens_per_step(load.trial) / self.tokens_per_step(load.length)
        return [
            gain * self._charged(y, self._last, load.length) / self._charged(x, self._last, load.trial)
            for x, y in load.pairs
        ]

    def _needed(self, load: LengthSearch) -> float:
        """The gain that the trial's length must show; for plain decoding any gain is enough."""
        return 1.0 if load.trial == 0 else 1.0 + self.margin * (CLOSE if load.length else 1.0)

    def _agreed(self, load: LengthSearch) -> bool:
        """Whether a trial can end early: every pair so far clearly shows the same result."""
        gains, needed = self._gains(load), self._needed(load)
        return len(gains) >= EARLY_STOP_PAIRS and (
            min(gains) > needed * (1.0 + EARLY_STOP_MARGIN) or max(gains) < needed * (1.0 - EARLY_STOP_MARGIN)
        )

    def _judge(self, load: LengthSearch) -> None:
        """Change to the trial's length if it is faster by the margin, or to plain decoding if it is faster at all."""
        gains, needed = self._gains(load), self._needed(load)
        bar = 1.0 if load.length else needed
        gain, agree = median(gains), sum(g > bar for g in gains) / len(gains)
        least = AGREE_PLAIN if load.trial == 0 else AGREE_CLOSE if load.length else AGREE
        moved = gain > needed and agree >= least
        ratio = self.tokens_per_step(load.trial) / self.tokens_per_step(load.length) / gain
        load.close(ratio, moved, abs(gain / needed - 1.0) > EARLY_STOP_MARGIN)


def _at_most(length: int, view: SequenceView) -> int:
    """The draft length of a sequence, limited by its own request."""
    own = view.params.draft_length
    return length if own is None else min(length, own)
