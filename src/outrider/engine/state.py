"""What a step reads and changes: the parts, the queue, the pending draft, the sums, and who is told."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from outrider.contained import Contained
from outrider.engine.defects import Watchers
from outrider.engine.emit import Emission
from outrider.engine.parts import CoreOptions, Hooks, Parts
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
        """The draft in the order of a step's scored sequences; who has none gets the empty tree."""
        where = {s.key: b for b, s in enumerate(self.sequences) if s.slot >= 0}
        return self.draft.take([where.get(w.sequence.key, -1) for w in works if w.scored])


class StepState:
    """Everything that steps share. Whoever calls its methods has the engine's turn."""

    def __init__(self, parts: Parts, hooks: Hooks, options: CoreOptions) -> None:
        self.parts, self.hooks, self.options = parts, hooks, options
        self.scheduler = Scheduler(options.slots, chunk=options.chunk)
        self.watchers = Watchers(hooks)
        self.drafter = Contained(parts.drafter, lambda told: self.watchers.defect("drafter", told))
        self.pending = self._nothing = PendingDraft(Draft.empty(0, parts.target.device), [])
        self.counts, self.seconds, self.steps = Counts(), dict.fromkeys(PHASES, 0.0), 0
        self.live: dict[tuple[str, int], Sequence] = {}
        self.readers: dict[str, deque[Event]] = {}
        self._sealed = False
        self._doomed: list[str] = []

    def sequences(self, request: str) -> list[Sequence]:
        """The live sequences of a request, by index; each object stays readable after the engine has let go of it."""
        return [s for key, s in self.live.items() if key[0] == request]

    # ------------------------------------------------------------------ what ends
    def forget(self, sequence: Sequence) -> None:
        """Let go of a sequence; its slot is free before the next step."""
        self.scheduler.drop(sequence, self.release)
        self.live.pop(sequence.key, None)

    def release(self, slots: list[int]) -> None:
        """Every part forgets these slots."""
        self.parts.kv.release(slots)
        self.parts.pipeline.release(slots)
        self.drafter.release(slots)

    def drop(self, request: str) -> bool:
        """Forget a request; in the middle of a forward, as soon as that is over, for its rows are on their way. Was it there?"""
        found = self.sequences(request)
        if self._sealed:
            self._doomed.append(request)
        else:
            for sequence in found:
                self.forget(sequence)
        return bool(found)

    def seal(self) -> None:
        """From here on no request may go."""
        self._sealed = True

    def unseal(self) -> None:
        """From here on requests may go at once; those that were to go in the meantime go now."""
        self._sealed = False
        while self._doomed:
            self.drop(self._doomed.pop())

    # ------------------------------------------------------------------ inside a step
    def take_pending(self, works: list[StepWork]) -> Draft:
        """The pending draft, which is looked at once: should this step fail, the next must not judge tokens that have been seen."""
        draft = self.pending.ordered(works)
        self.pending = self._nothing
        return draft

    def settle(self, emission: Emission, defects: int) -> None:
        """Let go of what has ended, and hand events to those who wait for them. defects: sequences whose draft had one."""
        for _ in range(defects):
            self.watchers.defect("draft", "a draft had tokens outside the vocabulary, or a distribution that is none")
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
        """Add a step to the sums and tell those who look on."""
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
            )
        )
