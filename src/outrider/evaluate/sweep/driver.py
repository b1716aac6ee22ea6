"""The driver: hands cells to an executor and writes what comes back. It alone writes; what is done is asked of the store alone.

Executions are at least once, records exactly once: an answer that comes twice is compared with the first and dropped. Retries are
the driver's, so that a machine that kills its workers is seen and counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from outrider.evaluate.sweep.book import Book
from outrider.evaluate.sweep.cells import Cell
from outrider.evaluate.sweep.executor import Event, Executor

TICK = 1.0
"""Seconds the driver waits for news at most."""
TOUCH = 60.0
"""Seconds between two signs of life in the store: well below `store.LEASE`."""


@dataclass(frozen=True, slots=True)
class Rules:
    """attempts: tries of a cell. limit: seconds of one try. stall: seconds without a place after which a cell is reported."""

    attempts: int = 3
    limit: float = 3600.0
    stall: float = 45.0


@dataclass(slots=True)
class Flight:
    """A submitted cell. began: when it started to run; None: it waits for a place, or its worker is being started."""

    cell: Cell
    submitted: float
    began: float | None = None
    where: str = ""


@dataclass(slots=True)
class Progress:
    """Where a sweep stands. known: cells whose record was there before. unplaced: cell number -> why it has no place."""

    total: int
    known: int = 0
    done: int = 0
    failed: int = 0
    running: int = 0
    lost: int = 0
    unplaced: dict[int, str] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return self.total - self.known - self.done - self.failed - len(self.unplaced)


class Driver:
    """One run of a plan. say: gets sentences about what went wrong; look: gets the progress after every piece of news."""

    def __init__(
        self,
        cells: Sequence[Cell],
        executor: Executor,
        book: Book,
        rules: Rules,
        *,
        retry: bool = False,
        say: Callable[[str], None] = lambda _: None,
        look: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        missing = [cell for cell in cells if not book.has(cell, retry)]
        self.executor, self.book, self.rules, self.say, self.look = executor, book, rules, say, look
        self.retry = retry
        self.progress = Progress(len(cells), len(cells) - len(missing))
        self.waiting = {alone: deque(c for c in missing if c.alone == alone) for alone in (True, False)}
        self.attempts = dict.fromkeys((c.identity for c in missing), 0)
        self.given_up: set[str] = set()
        self.flying: dict[int, Flight] = {}
        self.landed: dict[int, Cell] = {}  # their answers may come once more
        self._ticket = 0
        self._since: dict[str, float] = {}  # since when a cell could not be placed
        self._touched = monotonic()

    def run(self) -> Progress:
        """Until every cell has a record, or cannot be placed. Raises Disagreement, and what the store raises."""
        while any(self.waiting.values()) or self.flying:
            self._submit()
            for event in self.executor.wait(TICK if self.flying else 0.2):
                self._take(event)
            self._late()
            self.progress.running = sum(f.began is not None for f in self.flying.values())
            self.look(self.progress)
            if monotonic() - self._touched > TOUCH:
                self.book.touch()
                self._touched = monotonic()
        return self.progress

    # ------------------------------------------------------------------ out
    def _submit(self) -> None:
        """Fill what is free: first cells that need a machine alone, which others would keep waiting for ever."""
        for alone in (True, False):
            queue = self.waiting[alone]
            for _ in range(len(queue)):
                cell = queue[0]
                if (why := self.executor.never(cell)) is not None:
                    queue.popleft()
                    self._unplaceable(cell, why, queue)
                    continue
                if not self.executor.room(cell):
                    break
                queue.popleft()
                self._since.pop(cell.identity, None)
                self._ticket += 1
                self.flying[self._ticket] = Flight(cell, monotonic())
                self.executor.submit(self._ticket, cell)
            if any(cell.identity not in self._since for cell in queue):
                return

    def _unplaceable(self, cell: Cell, why: str, queue: deque[Cell]) -> None:
        """Wait for a machine that may still join; after `stall` seconds report it and go on without the cell."""
        since = self._since.setdefault(cell.identity, monotonic())
        if monotonic() - since < self.rules.stall:
            queue.append(cell)
            return
        self.progress.unplaced[cell.number] = why
        self.say(f"cell {cell.number} ({cell.label}) has no place: {why}")

    # ------------------------------------------------------------------ in
    def _take(self, event: Event) -> None:
        flight = self.flying.get(event.ticket)
        cell = flight.cell if flight else self.landed.get(event.ticket)
        if cell is None:
            return
        if event.what == "started":
            if flight:
                flight.began, flight.where = monotonic(), str(event.value)
            return
        if flight:
            self.landed[event.ticket] = self.flying.pop(event.ticket).cell
        if event.what == "answer":
            self._answer(cell, event.value)
        elif flight and event.what == "refused" and not event.value["again"]:
            self._fail(cell, event.value["error"])
        elif flight:
            self._again(cell, event.value["error"] if event.what == "refused" else str(event.value))

    def _answer(self, cell: Cell, found: dict[str, Any]) -> None:
        attempts = self.attempts[cell.identity] + 1
        beside = {"measured": found["measured"], "where": found["where"], "attempts": attempts}
        if self.book.put(cell, found["record"], beside):
            self.progress.done += 1
            self.progress.failed -= cell.identity in self.given_up
            for queue in self.waiting.values():  # a lost worker's answer came after all: its cell needs no second try
                if cell in queue:
                    queue.remove(cell)

    def _again(self, cell: Cell, reason: str) -> None:
        """Another try, up to `attempts`."""
        if self.book.has(cell, self.retry):
            return
        self.progress.lost += 1
        self.attempts[cell.identity] += 1
        if (tried := self.attempts[cell.identity]) >= self.rules.attempts:
            self._fail(cell, f"given up after {tried} attempt{'s' * (tried > 1)}: {reason}")
            return
        self.say(f"cell {cell.number} ({cell.label}): {reason}; trying again")
        self.waiting[cell.alone].append(cell)

    def _fail(self, cell: Cell, reason: str) -> None:
        if self.book.has(cell, self.retry):
            return
        self.book.fail(cell, reason, max(1, self.attempts[cell.identity]))
        self.progress.failed += 1
        self.given_up.add(cell.identity)
        self.say(f"cell {cell.number} ({cell.label}) failed: {reason}")

    def _late(self) -> None:
        """End cells that run longer than a try may take, and report those that found no place after all."""
        now = monotonic()
        for ticket, flight in list(self.flying.items()):
            if flight.began is None:
                if now - flight.submitted > self.rules.stall:
                    self._unbegun(ticket, flight, now)
            elif now - flight.began > self.rules.limit:
                self._abandon(ticket)
                self._again(flight.cell, f"it ran longer than the plan's limit of {self.rules.limit:g} s")

    def _unbegun(self, ticket: int, flight: Flight, now: float) -> None:
        """A cell without a place is reported if none of ours keeps it waiting; one that has a worker may have to wait for that."""
        cell = flight.cell
        why = self.executor.never(cell) or self.executor.waits(cell)
        if why is None and now - flight.submitted > self.rules.limit + self.rules.stall:
            self._abandon(ticket)
            self._again(cell, "its worker was started and did not begin")
        elif why is not None and self._stuck():
            self._abandon(ticket)
            self.progress.unplaced[cell.number] = why
            self.say(f"cell {cell.number} ({cell.label}) has no place: {why}")

    def _stuck(self) -> bool:
        """Whether nothing of ours runs: what waits then, waits for others."""
        return all(flight.began is None for flight in self.flying.values())

    def _abandon(self, ticket: int) -> None:
        flight = self.flying.pop(ticket)
        self.landed[ticket] = flight.cell
        self.executor.cancel(ticket)
