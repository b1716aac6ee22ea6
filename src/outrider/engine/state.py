"""What a step reads and changes: the parts, the queue, the pending draft, the sums, and the observers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from outrider.contained import Contained
from outrider.engine.defects import Watchers
from outrider.engine.emit import Emission
from outrider.engine.parts import CoreOptions, Hooks, Parts
from outrider.engine.room import Room
from outrider.engine.rows import VerifiedStep
from outrider.engine.scheduler import Scheduler, StepWork
from outrider.engine.sequence import Event, Sequence
from outrider.records import PHASES, Counts, StepRecord
from outrider.types import Draft


@dataclass(frozen=True, slots=True)
class PendingDraft:
    """A draft that the next step verifies, and the sequences that its trees belong to."""

    draft: Draft
    sequences: list[Sequence]

    def ordered(self, works: list[StepWork]) -> Draft:
        """The draft in the order of a step's scored sequences; a sequence without one gets the empty tree."""
        where = {s.key: b for b, s in enumerate(self.sequences) if s.slot >= 0}
        return self.draft.take([where.get(w.sequence.key, -1) for w in works if w.scored])


class StepState:
    """Everything that steps share. Callers of its methods hold the engine's turn."""

    def __init__(self, parts: Parts, hooks: Hooks, options: CoreOptions) -> None:
        self.parts, self.hooks, self.options = parts, hooks, options
        self.room = Room(parts, options.chunk, options.prefix_cache)
        self.scheduler = Scheduler(options.slots, chunk=options.chunk, admission=self.room.admission)
        self.watchers = Watchers(hooks)
        self.drafter = Contained(parts.drafter, lambda message: self.watchers.defect("drafter", message))
        self.pending = self._nothing = PendingDraft(Draft.empty(0, parts.target.device), [])
        self.counts, self.seconds, self.steps = Counts(), dict.fromkeys(PHASES, 0.0), 0
        self.live: dict[str, dict[int, Sequence]] = {}  # request -> index of the sample -> its sequence
        self.readers: dict[str, deque[Event]] = {}
        self._sealed = False
        self._aborted_in_step: list[str] = []

    def sequences(self, request: str) -> list[Sequence]:
        """The live sequences of a request, by index; each object stays readable after the engine has dropped it."""
        return list(self.live.get(request, {}).values())

    # ------------------------------------------------------------------ what ends
    def forget(self, sequence: Sequence) -> None:
        """Drop a sequence; its slot is free before the next step."""
        self.scheduler.drop(sequence, self.release)
        samples = self.live.get(sequence.request, {})
        samples.pop(sequence.index, None)
        if not samples:
            self.live.pop(sequence.request, None)

    def release(self, slots: list[int]) -> None:
        """Clear these slots in every part."""
        self.parts.kv.release(slots)
        self.parts.pipeline.release(slots)
        self.drafter.release(slots)

    def drop(self, request: str) -> bool:
        """Drop a request, or, while a forward uses its rows, mark it to be dropped afterwards. Returns whether it existed."""
        found = self.sequences(request)
        if self._sealed:
            self._aborted_in_step.append(request)
        else:
            for sequence in found:
                self.forget(sequence)
        return bool(found)

    def seal(self) -> None:
        """Defer all drops until `unseal`."""
        self._sealed = True

    def unseal(self) -> None:
        """Allow drops again, and drop the requests that were aborted in the meantime."""
        self._sealed = False
        while self._aborted_in_step:
            self.drop(self._aborted_in_step.pop())

    # ------------------------------------------------------------------ inside a step
    def plan(self) -> list[StepWork]:
        """Who takes part in the next step. Where pages would not do for all, the youngest go back to the queue: they are computed
        again later, with the same text."""
        self.scheduler.admit()
        self.room.share(self.scheduler)
        works = self.scheduler.plan()
        while self.room.short(works) and len(self.scheduler.running) > 1:
            self.scheduler.send_back(self.scheduler.running[-1], self.release)
            self.room.sums.preempted += 1
            works = self.scheduler.plan()
        return works

    def take_pending(self, works: list[StepWork]) -> Draft:
        """Take the pending draft. It is used once: if this step fails, the next must not verify tokens that were already seen."""
        draft = self.pending.ordered(works)
        self.pending = self._nothing
        return draft

    def settle(self, emission: Emission, defects: int) -> None:
        """Drop the sequences that ended, and pass events to waiting streams. defects: sequences whose draft had a defect."""
        for _ in range(defects):
            self.watchers.defect("draft", "a draft had tokens outside the vocabulary, or an invalid distribution")
        if defects:
            self.watchers.notice(
                f"drafts of {type(self.parts.drafter).__name__} had tokens outside the vocabulary, or distributions that do not "
                "sum to "
                "one: they were used without those; outrider.testing.check_drafter says what is wrong"
            )
        for event in emission.events:
            if event.blame == "request":
                self.watchers.defect("request", event.error or "")
        for sequence in emission.ended:
            self.forget(sequence)
        self.unseal()
        for event in emission.events:
            if event.request in self.readers:
                self.readers[event.request].append(event)

    def record(self, verified: VerifiedStep, emission: Emission, seconds: dict[str, float]) -> None:
        """Add a step to the sums and pass its record to the observers."""
        self.steps += 1
        self.counts.merge(emission.counts)
        for phase in PHASES:
            self.seconds[phase] += seconds[phase]
        self.watchers.tell(
            StepRecord(
                verified.rows.count,
                len(verified.draft.counts),
                len(self.scheduler.running),
                len(self.scheduler.waiting),
                seconds,
                emission.counts,
                emission.engine_seeded,
                verified.scores.replayed,
                tuple(emission.each),
                sum(s.cached for s in verified.rows.segments),
                sum(s.cached * s.count for s in verified.rows.segments),
            )
        )
