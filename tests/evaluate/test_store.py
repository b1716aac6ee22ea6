"""The store keeps what it has committed, once, whatever kills the writer."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.none import NoDraft
from outrider.errors import CapacityError, ConfigError
from outrider.evaluate import measure
from outrider.evaluate.experiments import experiment
from outrider.evaluate.experiments.experiment import Experiment, run_experiment
from outrider.evaluate.measure import Arm, ends_in_a_loop, run_arms, run_group
from outrider.evaluate.records import Record, Timing, summarise
from outrider.evaluate.store.runlog import RunLog
from outrider.evaluate.store.store import LEASE, Store
from outrider.params import SamplingParams
from outrider.records import PHASES
from outrider.verify import load_rule
from tests.evaluate.liars import TARGET, engine

PROMPTS = [[1 + i, 2 * i % 20] for i in range(6)]
PARAMS = SamplingParams(max_tokens=12)
PLAN = {"batch": 1, "repeats": 2, "warmup": 0, "seed": 3}
CONFIG = {**PLAN, "prompts": PROMPTS}


def arms() -> list[Arm]:
    plain = Engine(TARGET, NoDraft(), load_rule("auto"), Fixed(0), slots=2, max_length=64)
    return [Arm("plain", plain), Arm("length 4", engine(load_rule("speculative_sampling")))]


def bench(path: Path | str) -> list[Record]:
    log = RunLog(path, "kill", CONFIG)
    records = run_arms(arms(), PROMPTS, PARAMS, **PLAN, known=log.known(), keep=log.keep)
    log.finish({"tokens": sum(r.tokens for r in records)})
    return records


# ----------------------------------------------------------------- kill -9: whole runs with a clock that can be repeated
class Repeatable:
    """Times of a record as a function of what was run: then an interrupted run's report equals a whole run's byte for byte."""

    def __call__(self, arm: Arm, prompts: list, params: list, place: tuple[int, int, int]) -> Record:
        r = run_group(arm, prompts, params, place)
        chance = random.Random(f"{arm.name} {place}")
        timings = tuple(Timing(0.01, chance.uniform(0.1, 0.2), t.tokens) for t in r.timings)
        phases = {p: chance.uniform(0.1, 0.2) for p in PHASES}
        return replace(r, seconds=sum(phases.values()), phases=phases, timings=timings, machine={})


def killed_bench(path: Path | str) -> None:
    log = RunLog(path, "kill", CONFIG)
    records = run_arms(arms(), PROMPTS, PARAMS, **PLAN, known=log.known(), keep=log.keep)
    log.finish({"arms": [asdict(s) for s in summarise(records, "plain")]})


def killed_experiment(path: Path) -> None:
    e = Experiment("kill", {"plain": {}, "length 4": {}}, "plain", max_tokens=12, level=1e-6, seed=3, replay=1)
    with Store(path) as db:
        run_experiment(e, arms(), PROMPTS * 2, db, stop_early=False)


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "run_group", Repeatable())
    monkeypatch.setattr(experiment, "run_group", Repeatable())


def in_a_child(work: Callable[[Path], None], path: Path, seconds: float | None) -> bool:
    """Run it in a process of its own, killed with -9 after `seconds`; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            work(path)
        finally:
            os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def report(path: Path | str) -> str:
    """All a run says, without the name it was given."""
    with Store(path, read_only=True) as db:
        run = db.run("kill")
        return db.export("kill").replace(run.id, "RUN") + str(db.experiment("kill")[1:] if run.kind == "ab" else "")


def finished(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with Store(path, read_only=True) as db:  # as `runs list` opens it, also right behind a kill
            return any(r.state == "done" for r in db.runs())
    except ConfigError as error:
        if "nothing was ever written" not in str(error):
            raise
        return False


def committed(path: Path) -> dict:
    if not path.is_file() or not path.stat().st_size:
        return {}
    with Store(path, read_only=True) as db:
        return {k: str(v) for r in db.runs() for k, v in db.records(r.id).items()}


def survives(work: Callable[[Path], None], folder: Path, kills: int) -> None:
    """Kill runs at random moments, `kills` times in all; whatever was committed stays, and every report is the whole run's."""
    chance, done, lap, cut = random.Random(5), 0, 0, 0
    started = time.perf_counter()
    assert not in_a_child(work, folder / "whole.db", None)
    usual, want = time.perf_counter() - started, report(folder / "whole.db")
    while done < kills:
        path = folder / f"cut-{lap}.db"
        before = made(path)
        done += in_a_child(work, path, chance.uniform(0, 0.3 * usual))
        after = made(path)
        assert before.items() <= after.items()
        cut += bool(after) and not finished(path)
        lap += path.is_file() and path.stat().st_size > 0 and finished(path)
    print(
        f"\n{done} kills, {cut} between a first and a last record, in {lap + 1} runs of {len(made(folder / 'whole.db'))} records"
    )
    for path in folder.glob("cut-*.db"):
        if not finished(path):
            work(path)
        assert report(path) == want
        with Store(path) as db:
            assert db.db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            sums = db.ledgers(db.run("kill").id)
            for task, book in sums.items():
                mine = [r["counts"] for (t, _, _), r in db.records(db.run("kill").id).items() if t == task]
                assert book["judged"] == sum(c["judged"] for c in mine)
                assert book["risk"] == pytest.approx(sum(c["risk"] for c in mine))


def made(path: Path) -> dict:
    """What a reader finds; nothing where the kill came before the tables were there."""
    try:
        return committed(path)
    except ConfigError as error:
        if "nothing was ever written" not in str(error):
            raise
        return {}


WORK = [killed_bench, killed_experiment]


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("work", WORK, ids=["bench", "ab"])
def test_nothing_is_lost_or_written_twice_under_kill_9(work: Callable[[Path], None], tmp_path: Path) -> None:
    """20 random points in all."""
    survives(work, tmp_path, 10)


@pytest.mark.slow
@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("work", WORK, ids=["bench", "ab"])
def test_nothing_is_lost_or_written_twice_under_many_kills(work: Callable[[Path], None], tmp_path: Path) -> None:
    survives(work, tmp_path, 200)


SCRIPT = """
import sys
from outrider.evaluate.store.store import LEASE, Store
with Store(sys.argv[1]) as db:
    run = db.begin("bench", "kill", {})
    for i in range(3):
        db.append(run, ("arm", i, 0), {"counts": {"judged": i + 1}})
        print(i, flush=True)
    db.finish(run, {})
"""


def at_call(call: str, number: int, path: Path) -> tuple[int, list[str]]:
    """Run SCRIPT, killed at the `number`-th system call of a kind; its exit code and the records it said were committed."""
    command = [
        "strace",
        "-f",
        "-o",
        "/dev/null",
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:signal=SIGKILL:when={number}",
    ]
    done = subprocess.run(
        [*command, sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (apt-get install strace)")
@pytest.mark.parametrize("call", ["pwrite64", "fdatasync", "ftruncate"])
def test_every_write_and_sync_of_a_commit_is_a_safe_place_to_die(call: str, tmp_path: Path) -> None:
    """Exhaustive: killed at the first, second, ... call of a kind until the script gets through."""
    for number in range(1, 200):
        path = tmp_path / f"{call}-{number}.db"
        code, said = at_call(call, number, path)
        kept = made(path)
        assert {f"{i}" for _, i, _ in kept} >= set(said)
        assert len(kept) <= len(said) + 1
        if code == 0:
            assert number > 3 or call == "ftruncate"
            print(f"\nkilled at each of {number - 1} calls of {call}")
            return
        subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True, capture_output=True)
        with Store(path) as db:
            assert [i for _, i, _ in db.records(db.run("kill").id)] == [0, 1, 2]
            assert db.ledgers(db.run("kill").id)["arm"]["judged"] == 6
    raise AssertionError("the script never got through")


def test_a_record_is_written_once_and_export_is_canonical(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as db:
        run = db.begin("bench", "x", {"b": 1, "a": 2})
        data = {"counts": {"judged": 3, "risk": 0.5}}
        assert db.append(run, ("arm", 0, 0), data)
        assert not db.append(run, ("arm", 0, 0), {"counts": {"judged": 9}})
        assert db.ledgers(run)["arm"]["judged"] == 3
        assert db.begin("bench", "x", {"a": 2, "b": 1}) == run
        text = db.export("x")
        assert text == db.export(run) and '"judged":3' in text
        with pytest.raises(ConfigError, match="configured differently"):
            db.begin("bench", "x", {"a": 3})
        db.finish(run, {})
        assert db.begin("bench", "x", {"a": 3}) != run


def test_a_reader_sees_what_a_writer_has_committed(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with Store(path) as writer:
        run = writer.begin("bench", "x", {})
        for i in range(5):
            writer.append(run, ("arm", i, 0), {"i": i})
            with Store(path, read_only=True) as reader:
                assert len(reader.records(run)) == i + 1
    with Store(path, read_only=True) as reader, pytest.raises(CapacityError, match="readonly"):
        reader.begin("bench", "y", {})


def test_files_that_are_no_stores_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.db"
    bad.write_bytes(b"not a database, but long enough to be looked at" * 50)
    with pytest.raises(ConfigError, match="cannot be used"):
        Store(bad)
    with pytest.raises(ConfigError, match="no such store"):
        Store(tmp_path / "none.db", read_only=True)
    with Store(tmp_path / "new.db") as db:
        db.db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="update outrider"):
        Store(tmp_path / "new.db")
    with Store(tmp_path / "c.db") as db, pytest.raises(ConfigError, match="no run"):
        db.run("nothing")
    (tmp_path / "empty.db").touch()
    with pytest.raises(ConfigError, match="nothing was ever written"):
        Store(tmp_path / "empty.db", read_only=True)
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    for read_only in (True, False):
        with pytest.raises(ConfigError, match="something else"):
            Store(tmp_path / "other.db", read_only=read_only)


def test_a_name_with_odd_letters_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a?mode=ro#b %20.db"
    with Store(path) as db:
        db.begin("bench", "x", {})
    assert [p.name for p in tmp_path.iterdir()] == [path.name] or (tmp_path / path.name).is_file()
    with Store(path, read_only=True) as db:
        assert len(db.runs()) == 1


def test_a_run_belongs_to_its_writer_while_that_lives(tmp_path: Path) -> None:
    """Another process is refused; a process that merely has the number of a dead one is not taken for it."""
    path = tmp_path / "a.db"
    with Store(path) as db:
        run = db.begin("bench", "x", {})
        now = time.time()
        db.db.execute("UPDATE runs SET pid = ?, updated = ? WHERE id = ?", (os.getppid(), now, run))
        with pytest.raises(ConfigError, match=f"process {os.getppid()}"):
            db.begin("bench", "x", {})
        db.db.execute("UPDATE runs SET updated = 1000 WHERE id = ?", (run,))  # long before our parent was started
        assert db.begin("bench", "x", {}) == run
        db.db.execute("UPDATE runs SET host = 'elsewhere', updated = ? WHERE id = ?", (now, run))
        with pytest.raises(ConfigError, match="elsewhere"):
            db.begin("bench", "x", {})
        db.db.execute("UPDATE runs SET updated = ? WHERE id = ?", (now - 2 * LEASE, run))
        assert db.begin("bench", "x", {}) == run


def test_the_same_texts_whoever_runs_beside(tmp_path: Path) -> None:
    first = run_group(arms()[1], PROMPTS[:3], [replace(PARAMS, seed=i) for i in range(3)], (0, 0, 0))
    assert [t.tokens for t in first.timings] == [12, 12, 12]
    assert all(0 < t.first <= t.end <= first.seconds for t in first.timings)
    alone = run_group(arms()[1], PROMPTS[1:2], [replace(PARAMS, seed=1)], (0, 0, 0))
    assert alone.outputs[0] == first.outputs[1]


def test_loops_are_seen() -> None:
    assert ends_in_a_loop([1, 2, 3] + [7, 8] * 16)
    assert ends_in_a_loop([5] * 32)
    assert not ends_in_a_loop([5] * 31)
    assert not ends_in_a_loop(list(range(100)))
    assert not ends_in_a_loop([*([7, 8] * 16), 1])
