"""Draft length from the clock: as deep as it pays for this load, and not at all where it does not.

With b sequences in a step and a draft length L, a step takes T(b, L) seconds and emits E(L) tokens per sequence, so a length is
worth E(L) / T(b, L). Both are measured: E from the steps that were accepted at each depth, ratios of T by trials in which two
lengths take turns, step by step. Speculation gains over plain decoding exactly when E(L) > T(b, L) / T(b, 0) (Leviathan et al.
2023, Theorem 3.8, with the cost of drafting and of the wider verification measured instead of modelled). A ratio of neighbouring
steps is needed because the speed of a machine changes by more, and for longer, than lengths differ. In heavy traffic such
neighbours are rare: until a load has had a trial, and again whenever it has been without such neighbours for a while, T is foretold
from whatever steps came by (`control.step_times`), so that no choice outlives the evidence for it. What the drafter takes to
read prompts, which no trial sees, is laid on the steps of every length but 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from outrider.control.acceptance import AcceptanceByDepth, break_even
from outrider.control.length_search import LAST_PAUSE, MAX_TRIAL_STEPS, PAIRS, SETTLE, LengthSearch
from outrider.control.row_times import load_class
from outrider.control.step_times import StepTimes
from outrider.errors import ConfigError
from outrider.records import StepRecord
from outrider.types import SequenceView

AGREE, AGREE_PLAIN = 0.7, 0.5
"""Share of the pairs that must agree with a move, and with one to plain decoding, beside the means."""
EARLY_STOP_PAIRS, EARLY_STOP_MARGIN = 6, 0.1
"""Pairs after which a trial ends early if all of them say that its length gains or loses at least this share."""
SKIP_TRIAL_BELOW = 0.9
"""A trial is put off, to the longest pause at most, when its length is foretold to be worth less than this share of the choice."""
REQUIRED_PREFILL_RETURN = 2.0
"""Drafting is taken up again where it is foretold to bring this many times what reading costs: the load may fall before it does."""


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
        self._loads: dict[int, LengthSearch] = {}
        self._accepted = AcceptanceByDepth(longest)
        self._before: tuple[int, int] | None = None  # sequences and length of the draft that this step verified
        self._now: tuple[int, int] | None = None  # and of the draft that it made; None where lengths differ
        self._last = self._steps = 0
        self._judged: list[int] = []  # lengths of the drafts that this step verified
        self._ready: list[int] = []  # and of those that it made, for sequences whose prompt was through
        self._prompts = False  # whether the latest step read prompts
        self._forecast = StepTimes()

    # ------------------------------------------------------------------ the protocol
    def budget(self, sequences: Sequence[SequenceView]) -> list[int]:
        """The choice for this load; `first` for a sampled request with its own seed unless lengths are `invariant`."""
        length = self.choice(sequences)
        out = [self.first if self._pinned(v) else length for v in sequences]
        own = any(v.params.draft_length is not None for v in sequences)
        self._now = None if own or any(x != length for x in out) else (len(sequences), length)
        self._last = len(sequences)
        pairs = zip(out, sequences, strict=True)
        self._ready = [_at_most(x, v) for x, v in pairs if len(v.tokens) - v.cached == 1]
        self._forecast.reading.notice(sequences, length > 0)
        return out

    def observe(self, record: StepRecord) -> None:
        """Learn from a step whose sequences all had one length, and decide again."""
        before, now = self._before, self._now
        self._before, self._now = now, None
        self._steps += 1
        if record.scored:
            self._accepted.learn(record, self._judged)
        self._judged = self._ready
        self._forecast.learn(record, before, now)
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
        cost, usual = load.cost.get(load.length), load.usual()
        if cost is None or usual is None or not load.known:
            return Outlook(self._last, load.length, None, None, None)
        plain = self._charged(usual, self._last, load.length) / cost
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
        params = view.params
        return not self.invariant and params.seed is not None and not params.greedy

    def _load(self, sequences: int) -> LengthSearch:
        return self._loads.setdefault(load_class(sequences), LengthSearch(self.first, self.longest, self.first))

    def _charged(self, seconds: float, sequences: int, length: int) -> float:
        """A step of this load with drafts of this length, and its share of the drafter's reading."""
        return seconds + (self._forecast.reading.share(sequences * self.tokens_per_step(length)) if length else 0.0)

    def choice(self, sequences: Sequence[SequenceView]) -> int:
        """The length for this load; in a trial the two lengths in turn; what is foretold before the first trial and while there can
        be none.

        A trial pauses while prompts are read: such steps prove nothing, and its length would be paid for them all.
        """
        load = self._load(len(sequences))
        if load.trial >= 0 and (load.turn >= MAX_TRIAL_STEPS or load.blind):
            load.abandon()
        if load.trial >= 0:
            length = load.length if self._prompts else load.take_turn()
            load.spent += self._forecast.reading.behind(sequences) if length and not load.length else 0.0
            return length
        if load.blind or not load.known:
            if load.asked % SETTLE == 0:
                load.choose(self.predicted(len(sequences), load.length))
            load.asked += 1
        return load.length if self._saving_exceeds_prefill(sequences, load.length) else 0

    def _saving_exceeds_prefill(self, sequences: Sequence[SequenceView], length: int) -> bool:
        """Whether drafts of this length will earn, while these sequences last, what the drafter must read of them first."""
        if length == 0:
            return True
        plain, drafted = (self._forecast.seconds(len(sequences), x) for x in (0, length))
        if plain is None or drafted is None:
            return True
        saved = (plain - drafted / self.tokens_per_step(length)) / len(sequences)  # seconds a token
        reading = self._forecast.reading
        return saved <= 0 or reading.ahead(sequences) * saved >= REQUIRED_PREFILL_RETURN * reading.behind(sequences)

    def _worth(self, sequences: int, length: int, *, beside: bool = False) -> float | None:
        """Foretold tokens of a sequence per second of this load, beside the prompts that are read lately or alone; None if nothing
        like it has been seen."""
        forecast = self._forecast
        alone = not beside or forecast.prompts < 1.0
        seconds = forecast.seconds(sequences, length) if alone else forecast.beside(sequences, length, self.longest)
        return None if not seconds else self.tokens_per_step(length) / self._charged(seconds, sequences, length)

    def predicted(self, sequences: int, length: int) -> int:
        """The length of the best foretold speed if that gains the margin over `length`; plain decoding if it gains at all.

        Plain decoding that has never been seen is what all else is held against: a few steps of it come first.
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
        """At the end of a pause begin a trial; at the end of a trial judge it."""
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
        """Whether a trial would only cost: at the very best its length is much worse than the choice."""
        its, present = self._forecast.least(self._last, trial), self._worth(self._last, load.length)
        if its is None or present is None:
            return False
        return self.tokens_per_step(trial) < SKIP_TRIAL_BELOW * present * self._charged(its, self._last, trial)

    def _gains(self, load: LengthSearch) -> list[float]:
        """Speed of the trial's length over that of the choice, pair by pair."""
        gain = self.tokens_per_step(load.trial) / self.tokens_per_step(load.length)
        return [
            gain * self._charged(y, self._last, load.length) / self._charged(x, self._last, load.trial)
            for x, y in load.pairs
        ]

    def _needed(self, load: LengthSearch) -> float:
        """The gain that the trial's length must show: plain decoding is taken up for any."""
        return 1.0 if load.trial == 0 else 1.0 + self.margin

    def _agreed(self, load: LengthSearch) -> bool:
        """Whether a trial need not go on: every pair so far says the same, and clearly."""
        gains, needed = self._gains(load), self._needed(load)
        return len(gains) >= EARLY_STOP_PAIRS and (
            min(gains) > needed * (1.0 + EARLY_STOP_MARGIN) or max(gains) < needed * (1.0 - EARLY_STOP_MARGIN)
        )

    def _judge(self, load: LengthSearch) -> None:
        """Move to the trial's length if it is better by the margin, to plain decoding also if it is better at all."""
        gains, needed = self._gains(load), self._needed(load)
        gain, agree = median(gains), sum(g > needed for g in gains) / len(gains)
        moved = gain > needed and agree >= (AGREE_PLAIN if load.trial == 0 else AGREE)
        ratio = self.tokens_per_step(load.trial) / self.tokens_per_step(load.length) / gain
        load.close(ratio, moved, abs(gain / needed - 1.0) > EARLY_STOP_MARGIN)


def _at_most(length: int, view: SequenceView) -> int:
    """What a sequence drafts where its own request may ask for less."""
    own = view.params.draft_length
    return length if own is None else min(length, own)
