"""What only a cluster can do to a sweep: workers killed for minutes on end, a machine that leaves, a cell that fits nowhere."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.evaluate.sweep.book import Book
from outrider.evaluate.sweep.driver import Driver, Rules
from outrider.integrations.ray.executor import RayExecutor
from tests.evaluate.sweep_contract import records, undisturbed
from tests.evaluate.sweep_work import WORK, cells


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two raylets on this machine, with one CPU each; only the first may measure seconds."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # the session's own
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"quiet": 1}, "include_dashboard": False}
    )
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_two_hundred_cells_a_worker_killed_every_five_seconds_and_a_machine_removed(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a poison cell, every answer delivered twice, and a cell that needs more than any machine has."""
    some = cells(200, die={7: True}, pause=0.4)
    big = cells(201, threads=64)[200:]
    executor = RayExecutor(WORK)
    deliver = executor.wait

    def twice(seconds: float) -> list[Any]:
        return [e for event in deliver(seconds) for e in (event, event)]

    monkeypatch.setattr(executor, "wait", twice)
    stop, rng = threading.Event(), random.Random(0)
    killed: list[int] = []

    def kill() -> None:
        while not stop.wait(5.0):
            if pids := sorted({f.where for f in list(driver.flying.values()) if f.where}):
                pid = int(rng.choice(pids).split()[1])
                killed.append(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    wanted = undisturbed(some)
    poison = wanted.pop(some[7].identity)
    with Book(tmp_path / "s.db", "sweep", [*some, *big]) as book:
        driver = Driver([*some, *big], executor, book, Rules(attempts=6, stall=20.0))
        killer = threading.Thread(target=kill)
        killer.start()
        removed = False

        def look(progress: Any) -> None:
            nonlocal removed
            if progress.done > 80 and not removed:
                removed = True
                cluster.remove_node(next(iter(cluster.worker_nodes)))

        driver.look = look
        began = time.monotonic()
        try:
            progress = driver.run()
        finally:
            stop.set()
            killer.join()
        seen = records(book)
        assert "given up" in seen.pop(some[7].identity)["failed"] and poison["result"]
        assert seen == wanted and book.duplicates >= 150 and removed
        assert list(progress.unplaced) == [200] and "64 CPUs" in progress.unplaced[200]
        assert sum(b["judged"] for b in book.store.ledgers(book.run).values()) == sum(range(200)) - 7
        print(f"{time.monotonic() - began:.0f} s, {len(killed)} workers killed, {progress.lost} attempts lost")
    executor.cancel_all()


def test_a_cell_that_fits_no_machine_is_reported_within_a_minute(ray: Any, tmp_path: Path) -> None:
    said: list[str] = []
    some, executor = cells(1, threads=64), RayExecutor(WORK)
    began = time.monotonic()
    with Book(tmp_path / "s.db", "sweep", some) as book:
        progress = Driver(some, executor, book, Rules(), say=said.append).run()
        assert list(progress.unplaced) == [0] and not records(book)
    assert time.monotonic() - began < 60 and "64 CPUs" in said[0]


def test_a_plan_of_real_cells_finds_the_same_on_ray_as_in_processes(ray: Any, tmp_path: Path) -> None:
    from outrider.cli.sweep_kinds import WORK as REAL
    from outrider.cli.sweep_kinds import kinds
    from outrider.evaluate.sweep.executor import ProcessExecutor
    from outrider.evaluate.sweep.plan import read_plan

    (tmp_path / "plan.yaml").write_text(
        "cells: [{kind: bench, count: 3, max_tokens: 12, grid: {length: [1, 2], seed: [0, 1]}}]"
    )
    plan = read_plan(tmp_path / "plan.yaml", kinds())
    found = []
    for name, executor in (("local", ProcessExecutor(REAL, 2, 2)), ("ray", RayExecutor(REAL))):
        with Book(tmp_path / f"{name}.db", plan.name, plan.cells) as book:
            assert Driver(plan.cells, executor, book, Rules()).run().done == 4
            found.append(records(book))
        if name == "local":
            executor.close()
    assert found[0] == found[1]
