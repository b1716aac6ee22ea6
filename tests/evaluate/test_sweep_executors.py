"""The contract of executors, on processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.evaluate.sweep.executor import ProcessExecutor
from tests.evaluate.sweep_contract import ExecutorContract, Make, drive, events_of, records, undisturbed
from tests.evaluate.sweep_work import WORK, cells

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    import os

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    made: list[ProcessExecutor] = []

    def one() -> ProcessExecutor:
        made.append(ProcessExecutor(WORK, 2, 2))
        return made[-1]

    yield one
    for executor in made:
        executor.close()


class TestProcesses(ExecutorContract):
    pass


def test_a_cell_that_is_alone_has_all_cores_and_the_others_one(make: Make) -> None:
    executor = make()
    for ticket, (alone, threads) in enumerate([(True, "2"), (False, "1")]):
        executor.submit(ticket, cells(1, alone=alone)[0])
        assert events_of(executor, ticket)[-1].value["where"]["threads"] == threads


def test_two_workers_work_at_the_same_time(make: Make, tmp_path: Path) -> None:
    """Each waits for what the other leaves: one after the other, neither would end."""
    import os

    some = cells(2)
    executor = make()
    for ticket, cell in enumerate(some):
        assert executor.room(cell)
        executor.submit(ticket, cell)
    assert len(executor.busy) == 2 and not executor.room(some[0])
    pids = set()
    for _ in range(40):
        pids |= {e.value["where"]["pid"] for e in executor.wait(1.0) if e.what == "answer"}
        if len(pids) == 2:
            break
    assert len(pids) == 2 and os.getpid() not in pids


def test_a_second_run_does_nothing(make: Make, tmp_path: Path) -> None:
    some = cells(3)
    for expected in (3, 0):
        progress, book = drive(tmp_path / "s.db", some, make())
        with book:
            assert progress.done == expected and records(book) == undisturbed(some)
