"""Which sequences, and which part of their prompts, enter the next step."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from outrider.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepWork:
    """One sequence's part of a step: `fed` tokens to feed; `scored` if they reach the newest token."""

    sequence: Sequence
    fed: int
    scored: bool


class Scheduler:
    """First come, first served, over a fixed set of slots; prefill in chunks beside the decoding of the others.

    chunk: rows of a prompt chunk. Chunks end at multiples of `chunk` whatever else is running, so that a prompt's entries in
    the KV cache do not depend on the batch; only an image whose rows see each other moves an end behind it. Each step takes every
    decoding sequence and at most `prefill` prompt rows (always at least one chunk), so a long prompt delays the others by one
    chunk at a time.
    admission: asked once a round with the running ones: whether there is room for a waiting sequence beside them; until then it
    waits, and all behind it do.
    """

    def __init__(
        self,
        slots: int,
        *,
        chunk: int = 256,
        prefill: int | None = None,
        admission: Callable[[list[Sequence]], Callable[[Sequence], bool]] = lambda running: lambda sequence: True,
    ) -> None:
        self._admission = admission
        self.chunk, self.prefill = chunk, max(chunk, prefill or chunk)
        self.slots = slots
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free = list(range(slots - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def admit(self) -> list[Sequence]:
        """Give free slots to waiting sequences, oldest first."""
        admitted: list[Sequence] = []
        if not self.waiting:
            return admitted
        admits = self._admission(self.running)
        while self.waiting and self._free and admits(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.slot, sequence.cached, sequence.entered = self._free.pop(), 0, len(sequence.tokens)
            sequence.reused = sequence.reused if sequence.output else 0
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def share(self, owner: Callable[[Sequence], Hashable]) -> None:
        """Let owners take turns in the queue: every owner's n-th sequence, counting running ones, precedes anyone's (n + 1)-th."""
        turns = Counter(owner(s) for s in self.running)
        ranked: list[tuple[int, Sequence]] = []
        for sequence in self.waiting:
            ranked.append((turns[owner(sequence)], sequence))
            turns[owner(sequence)] += 1
        self.waiting = deque(s for _, s in sorted(ranked, key=lambda pair: pair[0]))  # stable: the oldest first

    def plan(self) -> list[StepWork]:
        """The next step: scored sequences and prompt chunks, in the order of admission."""
        budget, works = self.prefill, []
        for sequence in self.running:
            missing = len(sequence.tokens) - sequence.cached
            if missing == 1:
                works.append(StepWork(sequence, 1, True))
                continue
            part = min(missing, self.chunk - sequence.cached % self.chunk)
            if sequence.pictured is not None:
                part = sequence.pictured.whole(sequence.cached + part) - sequence.cached
            if part <= budget or budget == self.prefill:
                budget -= part
                works.append(StepWork(sequence, part, part == missing))
        return works

    def send_back(self, sequence: Sequence, release: Callable[[list[int]], None]) -> None:
        """Put a running sequence back in front of the queue; it resumes with the same tokens and the same noise."""
        self.drop(sequence, release)
        self.waiting.appendleft(sequence)

    def drop(self, sequence: Sequence, release: Callable[[list[int]], None]) -> None:
        """Remove a sequence, waiting or running; its slot is free again before the next step."""
        if sequence.slot < 0:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        release([sequence.slot])
        self._free.append(sequence.slot)
        sequence.slot, sequence.cached = -1, 0
