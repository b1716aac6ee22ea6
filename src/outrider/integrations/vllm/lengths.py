"""Draft lengths inside vLLM: `control.Adaptive`, fed with what can be seen from outside of a step.

Our engine measures the seconds of verifying and of drafting apart; vLLM's scheduler sees only when a step ends. A step that
verifies drafts of one length and makes drafts of another mixes the two, so a length is held until enough *clean* steps were seen:
no prompt rows, the same length verified and drafted, and time that follows directly on the step before. The mean of these is one
measurement for the controller, reported with its next one, because the controller expects that a draft is verified in the step
after. In a trial, where lengths alternate, one clean step is enough: the step between two lengths is lost each time, and a trial
has many pairs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

from outrider.control import Adaptive
from outrider.control.row_times import load_class
from outrider.integrations.vllm.settings import Settings
from outrider.params import SamplingParams
from outrider.records import Counts, SequenceStep, StepRecord
from outrider.types import SequenceView

CLEAN, NAMES = 3, 4096
"""Clean steps that make a measurement of a length that stays, and requests that are told apart."""


@dataclass(frozen=True, slots=True)
class SeenStep:
    """A finished step as it is seen from outside.

    sequences: sequences that decoded. verified, drafted: draft length that this step's drafts were made with, and that it asked of
    the drafter. prompts: whether it read prompts. seconds: since the end of the step before; None if the engine was idle in
    between. accepted: accepted draft tokens of each sequence. names: of the sequences, in the same order; none: not known.
    """

    sequences: int
    verified: int
    drafted: int
    prompts: bool
    seconds: float | None
    accepted: Sequence[int]
    names: Sequence[str] = ()


@runtime_checkable
class Lengths(Protocol):
    """What sets the draft length of a step."""

    def next(self, sequences: int) -> int:
        """Draft length for a step of so many sequences."""
        ...

    def saw(self, step: SeenStep) -> None:
        """Learn from a finished step."""
        ...


@dataclass(slots=True)
class Cycle:
    """Given lengths one after another, whatever happens: for tests, and with one entry a fixed length."""

    lengths: Sequence[int]
    _turn: int = 0

    def next(self, sequences: int) -> int:
        """The next of `lengths`."""
        self._turn += 1
        return self.lengths[(self._turn - 1) % len(self.lengths)]

    def saw(self, step: SeenStep) -> None:
        """Steps change nothing."""


class LiveLengths:
    """One length for each load, 0 to `longest`, the fastest one; 0 stops at once where drafts are slower (see
    `control.Adaptive`)."""

    def __init__(self, first: int, longest: int, margin: float = 0.03) -> None:
        self.control = Adaptive(first, longest, margin=margin, invariant=True)  # vLLM's seeds do not fix a text anyway
        self.measured = 0
        """Measurements so far: estimates change with them only."""
        self._load, self._length, self._enough = 0, first, CLEAN
        self._clean: list[SeenStep] = []
        self._measured: StepRecord | None = None
        self._views: dict[int, tuple[SequenceView, ...]] = {}
        self._slots, self._next = dict[str, int](), -1

    def next(self, sequences: int) -> int:
        """The length of the present measurement; a new one begins when the load's class changes."""
        load = load_class(max(1, sequences))
        if load != self._load:
            self._begin(load)
        return self._length

    def saw(self, step: SeenStep) -> None:
        """Count the step if it is clean, and end the measurement when it has enough of them."""
        mine = load_class(max(1, step.sequences)) == self._load and step.verified == step.drafted == self._length
        if not mine or step.prompts or step.seconds is None or not step.sequences:
            return
        self._clean.append(step)
        if len(self._clean) < self._enough:
            return
        measured, self._measured = self._measured, self._record()
        self.control.observe(measured or _record_of(0, 0.0, Counts()))
        self.measured += 1
        self._begin(self._load)

    def _begin(self, load: int) -> None:
        before, self._load = (self._load, self._length), load
        if load not in self._views:
            self._views[load] = tuple(_view(slot) for slot in range(load))
        self._length = self.control.budget(self._views[load])[0]
        self._enough = CLEAN if load != before[0] or self._length == before[1] else 1
        self._clean.clear()

    def _record(self) -> StepRecord:
        """The mean of the clean steps, as one step of `_load` sequences."""
        steps, counts = self._clean, Counts()
        total = sum(s.sequences for s in steps)
        hits = [sum(n > d for s in steps for n in s.accepted) for d in range(self._length)]
        # shares of the sequences, so that steps of 5 and of 6 of them count alike; the controller only adds them up
        counts.accepted_at = cast(list[int], [self._load * n / total for n in hits])
        each = tuple(self._one(name, n) for s in steps for name, n in zip(s.names, s.accepted, strict=False))
        return _record_of(self._load, sum(s.seconds or 0.0 for s in steps) / len(steps), counts, each)

    def _one(self, name: str, accepted: int) -> SequenceStep:
        if name not in self._slots:
            if len(self._slots) >= NAMES:
                self._slots.clear()  # texts of before count as ended, since no number is given twice
            # below 0: the views that the controller is shown have slots from 0 on, and say nothing of texts
            self._slots[name], self._next = self._next, self._next - 1
        return SequenceStep(self._slots[name], self._length, accepted + (accepted < self._length), accepted)


def _record_of(scored: int, seconds: float, counts: Counts, each: tuple[SequenceStep, ...] = ()) -> StepRecord:
    """rows = 0: times of passes by rows are not learnt, since these contain the drafting too."""
    phases = {"target": seconds, "rule": 0.0, "draft": 0.0, "host": 0.0}
    return StepRecord(0, scored, scored, 0, phases, counts, each=each)


def _view(slot: int) -> SequenceView:
    return SequenceView(slot, 0, [0], 1, 0, SamplingParams())


def lengths_of(settings: Settings, longest: int) -> Lengths:
    """What the settings ask for. longest: vLLM's `num_speculative_tokens`."""
    if settings.lengths == "fixed":
        return Cycle([longest])
    if settings.lengths == "adaptive":
        return LiveLengths(
            min(longest, longest if settings.first is None else settings.first), longest, settings.margin
        )
    return Cycle([min(longest, int(x)) for x in settings.lengths])


# ------------------------------------------------------------------------------------------------- one request
WINDOW, FEWEST, PAUSE = 16, 0.03, 64
"""A request whose latest WINDOW drafts had fewer than this share of their tokens accepted is not drafted for in its next PAUSE
steps. On its way back one window is tried."""


@dataclass(slots=True)
class Request:
    """Limits of one request. most: its own (`outrider_length` in `vllm_xargs`); None: no limit."""

    most: int | None = None
    _latest: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _pause: int = 0

    def cut(self, length: int) -> int:
        """The draft length of this request, where the step has `length`."""
        if self._pause:
            self._pause -= 1
            return 0
        return length if self.most is None else min(length, self.most)

    def saw(self, drafted: int, accepted: int) -> None:
        """A draft of so many tokens was verified."""
        if not drafted:
            return
        self._latest.append((drafted, accepted))
        if len(self._latest) == WINDOW and sum(a for _, a in self._latest) < FEWEST * sum(d for d, _ in self._latest):
            self._latest.clear()
            self._pause = PAUSE


def own_limit(extra: object) -> int | None:
    """`outrider_length` of a request's `vllm_xargs`: a whole number of at least 0; anything else counts as no limit."""
    value = extra.get("outrider_length") if isinstance(extra, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 2**31:  # JSON has 1e999 too
        return None
    return int(value)
