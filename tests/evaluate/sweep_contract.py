"""What every executor of sweeps must do: the same tests for processes of this machine and for a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outrider.evaluate.sweep.book import Book
from outrider.evaluate.sweep.cells import Cell
from outrider.evaluate.sweep.driver import Driver, Progress, Rules
from outrider.evaluate.sweep.executor import Event, Executor
from tests.evaluate.sweep_work import cells, found

Make = Callable[[], Any]


def drive(
    where: Path, some: list[Cell], executor: Any, said: list[str] | None = None, **rules: Any
) -> tuple[Progress, Book]:
    """Run cells to the end; the book is open."""
    book = Book(where, "sweep", some)
    say = (said if said is not None else []).append
    return Driver(some, executor, book, Rules(**rules), say=say).run(), book


def records(book: Book) -> dict[str, Any]:
    """Identity -> record, of what a store has."""
    return {task: data for (task, _, part), data in book.store.records(book.run).items() if part == 0}


def undisturbed(some: list[Cell]) -> dict[str, Any]:
    """The same, as it must be."""
    return {cell.identity: found(cell.fields) for cell in some}


def events_of(executor: Executor, ticket: int, seconds: float = 60.0) -> list[Event]:
    """The events of a ticket up to its last one."""
    out: list[Event] = []
    end = time.monotonic() + seconds
    while not any(e.what != "started" for e in out):
        assert time.monotonic() < end, out
        out += [e for e in executor.wait(1.0) if e.ticket == ticket]
    return out


class ExecutorContract:
    """Subclasses give the fixture `make`: a function that makes an executor with two places, closed afterwards."""

    def test_it_is_one(self, make: Make) -> None:
        assert isinstance(make(), Executor)

    def test_an_answer_is_what_the_work_returned_and_comes_after_its_start(self, make: Make) -> None:
        executor, (cell,) = make(), cells(1)
        executor.submit(7, cell)
        events = events_of(executor, 7)
        assert [e.what for e in events] == ["started", "answer"]
        assert events[1].value["record"] == found(cell.fields)

    @pytest.mark.parametrize(("field", "what", "again"), [("raise", "refused", True), ("refuse", "refused", False)])
    def test_an_exception_is_said_and_the_next_cell_is_fine(
        self, make: Make, field: str, what: str, again: bool
    ) -> None:
        executor, (bad, good) = make(), cells(2, **{field: {0: True}})
        executor.submit(1, bad)
        last = events_of(executor, 1)[-1]
        assert last.what == what and last.value["again"] == again
        executor.submit(2, good)
        assert events_of(executor, 2)[-1].what == "answer"

    def test_a_dead_worker_is_said_and_not_tried_again(self, make: Make, tmp_path: Path) -> None:
        executor, (cell,) = make(), cells(1, mark=str(tmp_path / "mark"))
        executor.submit(1, cell)
        assert events_of(executor, 1)[-1].what == "lost"
        executor.submit(2, cell)
        assert events_of(executor, 2)[-1].what == "answer"

    def test_a_cell_that_needs_too_much_is_named_and_not_submitted(self, make: Make, tmp_path: Path) -> None:
        said: list[str] = []
        some = [*cells(2), *(Cell(c.number, c.label, c.fields, False, 512, "code", "data") for c in cells(3)[2:])]
        began = time.monotonic()
        progress, book = drive(tmp_path / "s.db", some, make(), said, stall=1.0)
        with book:
            assert progress.done == 2 and list(progress.unplaced) == [2]
            assert "512" in progress.unplaced[2] and any("no place" in s for s in said)
            assert records(book) == undisturbed(some[:2])  # it has no record: it is tried when such a machine is there
        assert time.monotonic() - began < 60

    def test_cells_that_measure_seconds_run_alone(self, make: Make, tmp_path: Path) -> None:
        executor, most = make(), [0]
        alone, shared = cells(2, alone=True, pause=0.05), cells(6, pause=0.05)[2:]
        with Book(tmp_path / "s.db", "sweep", [*alone, *shared]) as book:
            driver = Driver([*alone, *shared], executor, book, Rules())

            def look(p: Progress) -> None:
                flying = [f.cell.alone for f in driver.flying.values()]
                most[0] = max(most[0], len(flying) if any(flying) else 0)

            driver.look = look
            driver.run()
            assert records(book) == undisturbed([*alone, *shared]) and most[0] <= 1

    def test_killed_workers_and_a_poison_cell_leave_the_records_of_an_undisturbed_run(
        self, make: Make, tmp_path: Path
    ) -> None:
        marks = {n: str(tmp_path / f"mark-{n}") for n in (1, 4, 5)}
        some = cells(8, mark=marks, die={3: True})
        progress, book = drive(tmp_path / "s.db", some, make(), attempts=2)
        with book:
            seen, wanted = records(book), undisturbed(some)
            failed = seen.pop(some[3].identity)
            wanted.pop(some[3].identity)
            assert seen == wanted and "2 attempts" in failed["failed"] and "result" not in failed
            assert (progress.done, progress.failed, progress.lost) == (7, 1, 5)
            judged = sum(book.store.ledgers(book.run)[c.identity]["judged"] for c in some if c.number != 3)
            assert judged == sum(range(8)) - 3  # each cell is in the ledger once

    def test_a_cell_beyond_its_limit_is_ended(self, make: Make, tmp_path: Path) -> None:
        some = cells(2, pause={0: 120.0})
        began = time.monotonic()
        progress, book = drive(tmp_path / "s.db", some, make(), attempts=1, limit=4.0)
        with book:
            assert (progress.done, progress.failed) == (1, 1) and "limit" in records(book)[some[0].identity]["failed"]
        assert time.monotonic() - began < 60
