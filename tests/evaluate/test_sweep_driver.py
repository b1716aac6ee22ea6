"""The driver: records exactly once, whatever is delivered twice, late or never, and whoever is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.errors import ConfigError
from outrider.evaluate.sweep.book import Book, Disagreement
from outrider.evaluate.sweep.cells import Cell
from outrider.evaluate.sweep.driver import Driver, Rules
from outrider.evaluate.sweep.executor import Event
from outrider.evaluate.sweep.summary import over_machines, tokens_per_second
from tests.evaluate.sweep_contract import drive, records, undisturbed
from tests.evaluate.sweep_work import MACHINE, cells, found

ROOT = Path(__file__).parents[2]


class Scripted:
    """An executor that answers at once, and says what `script` makes of it: a list of events for each submitted cell."""

    def __init__(self, script: Any, places: int = 2, waits: str | None = "nobody") -> None:
        self.script, self.places, self.open, self.events = script, places, set[int](), deque[Event]()
        self.reason = waits
        self.submitted: list[int] = []

    def never(self, cell: Cell) -> str | None:
        return None

    def waits(self, cell: Cell) -> str | None:
        return self.reason

    def room(self, cell: Cell) -> bool:
        return len(self.open) < self.places

    def submit(self, ticket: int, cell: Cell) -> None:
        self.submitted.append(cell.number)
        self.open.add(ticket)
        self.events += [Event(ticket, "started", "here"), *self.script(ticket, cell)]

    def wait(self, seconds: float) -> list[Event]:
        if not self.events:
            return []
        event = self.events.popleft()
        if event.what != "started":
            self.open.discard(event.ticket)
        return [event]

    def cancel(self, ticket: int) -> None:
        self.open.discard(ticket)

    def close(self) -> None:
        """Nothing runs."""


def answer(ticket: int, cell: Cell, **other: Any) -> Event:
    """The right answer, or one with another result."""
    record = found(cell.fields) | other
    return Event(ticket, "answer", {"record": record, "measured": None, "where": {"machine": MACHINE, "seconds": 1.0}})


def test_results_that_come_twice_are_recorded_once(tmp_path: Path) -> None:
    some = cells(20)
    progress, book = drive(tmp_path / "s.db", some, Scripted(lambda t, c: [answer(t, c), answer(t, c)]))
    with book:
        assert progress.done == 20 and book.duplicates >= 19  # the last one may come when all is done
        assert records(book) == undisturbed(some)
        assert sum(book_of["judged"] for book_of in book.store.ledgers(book.run).values()) == sum(range(20))


def test_an_answer_of_a_worker_that_was_given_up_counts_and_the_second_try_is_spared(tmp_path: Path) -> None:
    """Lost, then answered after all: whichever of the two tries comes first is the record."""
    some = cells(6)
    progress, book = drive(tmp_path / "s.db", some, Scripted(lambda t, c: [Event(t, "lost", "gone"), answer(t, c)]))
    with book:
        assert progress.failed == 0 and records(book) == undisturbed(some)


def test_two_results_that_differ_stop_the_sweep_and_the_first_stays(tmp_path: Path) -> None:
    some = cells(3)
    with Book(tmp_path / "s.db", "sweep", some) as book:
        driver = Driver(some, Scripted(lambda t, c: [answer(t, c), answer(t, c, result={"value": 2})]), book, Rules())
        with pytest.raises(Disagreement, match="different results"):
            driver.run()
        assert records(book) == {some[0].identity: found(some[0].fields)}


def test_a_cell_that_nobody_begins_is_reported_and_the_others_are_done(tmp_path: Path) -> None:
    some, silent = cells(4), Scripted(lambda t, c: [answer(t, c)])
    silent.submit = lambda ticket, cell: (  # type: ignore[method-assign]
        Scripted.submit(silent, ticket, cell) if cell.number != 2 else silent.open.add(ticket)
    )
    progress, book = drive(tmp_path / "s.db", some, silent, stall=0.1)
    with book:
        assert progress.done == 3 and list(progress.unplaced) == [2] and not silent.open


def test_a_cell_that_has_its_place_may_take_longer_to_begin_than_one_without(tmp_path: Path) -> None:
    """Such as a process on a busy machine. Only where it never begins, it is tried again."""
    some = cells(2)
    slow = Scripted(lambda t, c: [answer(t, c)], waits=None)
    later: list[tuple[int, Cell]] = []
    slow.submit = lambda ticket, cell: (slow.open.add(ticket), later.append((ticket, cell)))  # type: ignore[assignment, func-returns-value]
    waits, turns = slow.wait, iter(range(10**6))

    def wait(seconds: float) -> list[Event]:
        time.sleep(0.01)
        if next(turns) == 30:  # 0.3 s after a stall of nothing
            for ticket, cell in later:
                Scripted.submit(slow, ticket, cell)
        return waits(seconds)

    slow.wait = wait  # type: ignore[method-assign]
    progress, book = drive(tmp_path / "s.db", some, slow, stall=0.0, limit=3600.0)
    with book:
        assert progress.done == 2 and not progress.unplaced and progress.lost == 0
    never = Scripted(lambda t, c: [], waits=None)
    never.submit = lambda ticket, cell: never.open.add(ticket)  # type: ignore[method-assign]
    progress, book = drive(tmp_path / "t.db", some, never, stall=0.0, limit=0.02, attempts=2)
    with book:
        assert (progress.failed, progress.lost) == (2, 4) and not progress.unplaced and not never.open


def test_failed_cells_are_not_tried_again_unless_that_is_asked(tmp_path: Path) -> None:
    some = cells(3)
    refuses = Scripted(
        lambda t, c: (
            [Event(t, "refused", {"error": "no such model", "again": False})] if c.number == 1 else [answer(t, c)]
        )
    )
    progress, book = drive(tmp_path / "s.db", some, refuses)
    book.finish({})
    book.close()
    assert (progress.done, progress.failed) == (2, 1)
    for retry, expected in ((False, []), (True, [1]), (True, [])):
        executor = Scripted(lambda t, c: [answer(t, c)])
        with Book(tmp_path / "s.db", "sweep", some) as book:
            Driver(some, executor, book, Rules(), retry=retry).run()
            assert executor.submitted == expected
            assert (book.known[some[1].identity].failed is None) == retry
            book.finish({})


def test_a_plan_that_grows_keeps_what_it_has(tmp_path: Path) -> None:
    for count, expected in ((3, [0, 1, 2]), (5, [3, 4])):
        executor = Scripted(lambda t, c: [answer(t, c)], places=1)
        progress, book = drive(tmp_path / "s.db", cells(count), executor)
        book.finish({})
        book.close()
        assert executor.submitted == expected and progress.known == count - len(expected)


def test_two_drivers_of_one_plan_are_refused(tmp_path: Path) -> None:
    """The second is another process: this one's number is in the store, and it lives."""
    with Book(tmp_path / "s.db", "sweep", cells(1)) as book:
        book.store.db.execute("UPDATE runs SET pid = ?", (os.getppid(),))
        with pytest.raises(ConfigError, match="being written by process"):
            Book(tmp_path / "s.db", "sweep", cells(1))


# ----------------------------------------------------------------- statistics
def test_seconds_of_two_machines_are_never_added() -> None:
    rows = [{"arm": "a", "group": 0, "repeat": 0, "emitted": 10, "failed": 0}]
    one, two = (("one", rows, [{"seconds": 1.0}]), ("two", rows, [{"seconds": 2.0}]))
    assert tokens_per_second([one, one], "a") == 10.0
    with pytest.raises(ConfigError, match="different machines"):
        tokens_per_second([one, two], "a")


def test_the_interval_over_machines_covers_the_mean_speed_up() -> None:
    """Machines differ in pace by 10 and noise is shared by the arms: the mean ratio is covered as often as the interval says.

    400 sweeps at 95%: fewer than 350 hits has a probability below 1e-9 (binomial) if the coverage is 0.93 or more.
    """
    random, hits, pooled = np.random.default_rng(0), 0, 0
    for _ in range(400):
        pairs = []
        for pace, speedup in ((1.0, 1.2), (10.0, 1.5)):
            tokens = np.full(12, 64.0)
            base = pace * random.lognormal(0, 0.3, 12)
            mine = base / speedup * random.lognormal(0, 0.05, 12)
            pairs.append((tokens, mine, tokens, base))
        ratio = over_machines(pairs)
        hits += ratio.low < (1.2 * 1.5) ** 0.5 < ratio.high
        joined = [np.concatenate(x) for x in zip(*pairs, strict=True)]
        pooled += ratio.low < joined[0].sum() / joined[1].sum() * joined[3].sum() / joined[2].sum() < ratio.high
    assert hits >= 350
    assert pooled < 40  # the control: adding up the seconds of both gives the slow machine's answer


# ----------------------------------------------------------------- kills
def start(where: Path, count: int, pause: float, attempts: int) -> subprocess.Popen[bytes]:
    """A driver in a process of its own. pause: seconds that every cell takes."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "SWEEP_PAUSE": str(pause)}
    command = [sys.executable, "-m", "tests.evaluate.sweep_driver", str(where), str(count), str(attempts)]
    return subprocess.Popen(command, env=env)


def written(where: Path) -> int:
    """Records of cells in a store that another process writes."""
    try:
        with sqlite3.connect(f"file:{where}?mode=ro", uri=True, timeout=5) as db:
            return db.execute("SELECT count(*) FROM records WHERE sample = 0").fetchone()[0]
    except sqlite3.Error:
        return 0


def killed_twice(where: Path, count: int, pause: float, kill_workers_every: float | None) -> None:
    """Run a sweep to its end: the driver is killed at a third and at two thirds of it, and workers from time to time."""
    for share in (1 / 3, 2 / 3, 2.0):
        driver, last = start(where, count, pause, 6 if kill_workers_every else 2), time.monotonic()
        end = time.monotonic() + 400
        while driver.poll() is None and written(where) < share * count:
            assert time.monotonic() < end
            time.sleep(0.02)
            if kill_workers_every and time.monotonic() - last > kill_workers_every:
                last = time.monotonic()
                for worker in children(driver.pid)[:1]:
                    os.kill(worker, signal.SIGKILL)
        workers = children(driver.pid)
        if driver.poll() is None:
            driver.kill()
        code = driver.wait()
        assert code == (0 if share > 1 else -signal.SIGKILL)
        end = time.monotonic() + 20
        while any(alive(pid) for pid in workers):  # they end with their driver
            assert time.monotonic() < end
            time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def check_killed(where: Path, count: int) -> None:
    """The records and the ledger of an undisturbed run."""
    some = cells(count, die={7: True})
    with Book(where, "sweep", some) as book:
        seen, wanted = records(book), undisturbed(some)
        assert "given up" in seen.pop(some[7].identity)["failed"]
        wanted.pop(some[7].identity)
        assert seen == wanted
        judged = sum(book_of["judged"] for book_of in book.store.ledgers(book.run).values())
        assert judged == sum(range(count)) - 7


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_driver_that_is_killed_twice_leaves_the_records_of_an_undisturbed_run(tmp_path: Path) -> None:
    killed_twice(tmp_path / "s.db", 24, 0.02, None)
    check_killed(tmp_path / "s.db", 24)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_hundred_cells_with_a_worker_killed_every_five_seconds(tmp_path: Path) -> None:
    killed_twice(tmp_path / "s.db", 200, 0.3, 5.0)
    check_killed(tmp_path / "s.db", 200)
