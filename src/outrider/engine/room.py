"""Room in the cache: beginnings that sequences share, who may enter, and who goes back to the queue when there is no more.

Works with any cache. One without pages has room for every slot's whole context, and shares nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from outrider.engine.parts import Parts
from outrider.engine.scheduler import Scheduler, StepWork
from outrider.engine.sequence import Sequence
from outrider.protocols import PagedCache, SharingCache, Target


@dataclass(slots=True)
class Reuse:
    """Sums. asked: tokens of the prompts that entered. reused: those of them that were in the cache. preempted: sequences that went
    back to the queue because pages had run out."""

    asked: int = 0
    reused: int = 0
    preempted: int = 0


def root_of(target: Target, salt: str | None = None) -> tuple[str | None, int]:
    """With whom a text shares beginnings: those of its salt that the target computes with the weights that it has now."""
    return salt, getattr(target, "weights", 0)


class Room:
    """The cache's pages, for the scheduler and the step.

    share: whether sequences may use each other's pages. chunk: rows of a prompt chunk. Where the numbers of an entry depend on how
    many rows were fed with it, only whole chunks of prompts are shared, so that no text depends on what was in the cache.
    """

    def __init__(self, parts: Parts, chunk: int, share: bool) -> None:
        kv, most = parts.kv, parts.drafter.max_nodes
        self._paged: PagedCache | None = kv if hasattr(kv, "lacking") else None  # type: ignore[assignment]
        self._sharing: SharingCache | None = kv if share and hasattr(kv, "share") else None  # type: ignore[assignment]
        self._nodes, self._chunk, self._target = most, chunk, parts.target
        self._any = getattr(parts.target, "uniform_rows", 0) >= max(chunk, 1 + most)
        self.sums = Reuse()

    # ------------------------------------------------------------------ pages
    def admission(self, running: list[Sequence]) -> Callable[[Sequence], bool]:
        """Whether there are pages for a waiting sequence's tokens beside those that the running ones still need for theirs.

        For one round, in which `running` grows by those who enter and pages stay where they are: each is counted once.
        """
        kv = self._paged
        if kv is None:
            return lambda sequence: True
        counted, promised = 0, 0

        def admits(sequence: Sequence) -> bool:
            nonlocal counted, promised
            if not running:
                return True
            promised += sum(kv.lacking(s.slot, len(s.tokens) + 1 + self._nodes) for s in running[counted:])
            counted = len(running)
            root = root_of(self._target, sequence.params.cache_salt)
            return promised + kv.needed(sequence.keyed, 1 + self._nodes, root) <= kv.spare

        return admits

    def short(self, works: list[StepWork]) -> bool:
        """Whether a step needs more pages than there are."""
        kv = self._paged
        if kv is None:
            return False
        ends = ((w.sequence, w.sequence.cached + w.fed + (self._nodes if w.scored else 0)) for w in works)
        return sum(kv.lacking(s.slot, end) for s, end in ends) > kv.spare

    # ------------------------------------------------------------------ sharing
    def share(self, scheduler: Scheduler) -> None:
        """Let every sequence that has prompt tokens to feed use what the cache knows of them."""
        # in every step: a target that was moved is refused there
        kv, (_, weights) = self._sharing, root_of(self._target)
        if kv is None:
            return
        for s in scheduler.running:
            if not s.cached:
                s.root = (s.params.cache_salt, weights)
            if len(s.tokens) - s.cached > 1:
                had, step = s.cached, 1 if self._any else self._chunk
                s.cached = kv.share(s.slot, s.keyed, s.root, step)
                if s.pictured is not None and (end := s.pictured.before(s.cached)) < s.cached:
                    s.cached = max(had, end // step * step)  # where a chunk ends, also without what was shared
                    kv.truncate(s.slot, s.cached)
                s.reused += 0 if s.output else s.cached - had

    def publish(self, works: list[StepWork]) -> None:
        """Make what a step has computed known to others; count prompts that are complete."""
        kv = self._sharing
        for w in works:
            s = w.sequence
            if w.scored and s.counts.steps == 1:  # not the chunks of one that was sent back after its first step
                self.sums.asked += s.prompt
                self.sums.reused += s.reused
            if kv is not None and s.error is None:
                end = len(s.tokens) if self._any else s.entered // self._chunk * self._chunk
                tokens = s.keyed
                kv.publish(s.slot, tokens[:end] if end < len(tokens) else tokens, s.root)
