"""The store keeps what it has committed, once, whatever kills the writer; gates decide by their margins."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

from outrider.control.fixed import Fixed
from outrider.drafters.none import NoDraft
from outrider.engine.engine import Engine
from outrider.errors import ConfigError
from outrider.evaluate.gate import Margins, gate, load_run, overall
from outrider.evaluate.measure import Arm, Record, Timing, ends_in_a_loop, run_arms, run_group
from outrider.evaluate.runlog import RunLog
from outrider.evaluate.store import Store
from outrider.sampling.params import SamplingParams
from outrider.types import PHASES, Counts
from outrider.verify import load_rule
from tests.evaluate.liars import TARGET, engine

KILLS = 25
PROMPTS = [[1 + i, 2 * i % 20] for i in range(6)]
PARAMS = SamplingParams(max_tokens=12)
PLAN = {"batch": 1, "repeats": 2, "warmup": 0, "seed": 3}
CONFIG = {**PLAN, "prompts": PROMPTS}


def arms() -> list[Arm]:
    plain = Engine(TARGET, NoDraft(), load_rule("auto"), Fixed(0), slots=2, max_length=64)
    return [Arm("plain", plain), Arm("length 4", engine(load_rule("speculative_sampling")))]


def bench(path: Path) -> list[Record]:
    log = RunLog(path, "kill", CONFIG)
    records = run_arms(arms(), PROMPTS, PARAMS, **PLAN, known=log.known(), keep=log.keep)
    log.finish({"tokens": sum(r.tokens for r in records)})
    return records


def essence(records: dict) -> dict:
    """What does not depend on the clock."""
    return {k: (r["tokens"], r["counts"], r["outputs"], r["order"]) for k, r in records.items()}


def test_nothing_is_lost_or_written_twice_under_kill_9(tmp_path: Path) -> None:
    """A bench is killed at random moments until it has finished; after every kill all that was committed is still there."""
    chance = random.Random(5)
    whole = tmp_path / "whole.db"
    started = time.perf_counter()
    bench(whole)
    usual = time.perf_counter() - started
    with Store(whole) as db:
        want = essence(db.records(db.run("kill").id))
    kills = lap = 0
    while kills < KILLS:
        path = tmp_path / f"cut-{lap}.db"
        before = committed(path)
        child = os.fork()
        if child == 0:
            try:
                bench(path)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0, 0.6 * usual))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        assert before.items() <= committed(path).items()
        lap += finished(path)
    for path in tmp_path.glob("cut-*.db"):
        bench(path) if not finished(path) else None
        with Store(path) as db:
            run = db.run("kill")
            assert run.state == "done"
            assert essence(db.records(run.id)) == want
            for task, sums in db.ledgers(run.id).items():
                mine = [r["counts"] for (t, _, _), r in db.records(run.id).items() if t == task]
                assert sums["judged"] == sum(c["judged"] for c in mine)
                assert sums["risk"] == pytest.approx(sum(c["risk"] for c in mine))
            assert db.db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def finished(path: Path) -> bool:
    if not path.is_file():
        return False
    with Store(path) as db:
        return any(r.state == "done" for r in db.runs())


def committed(path: Path) -> dict:
    if not path.is_file():
        return {}
    with Store(path) as db:
        return {k: str(v) for r in db.runs() for k, v in db.records(r.id).items()}


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
    with Store(path, read_only=True) as reader, pytest.raises(sqlite3.OperationalError):
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


# ----------------------------------------------------------------- gates
def records(speed: float, *, accept: float = 0.8, noise: float = 0.02, seed: int = 0, nll: float = 2.0) -> list[Record]:
    """A run of 24 groups: a plain arm and one that is `speed` times faster."""
    chance = random.Random(seed)
    out = []
    for g in range(24):
        base = chance.uniform(0.5, 2.0)
        for arm, factor in (("plain", 1.0), ("length 4", speed)):
            seconds = base / factor * (1 + noise * chance.gauss(0, 1))
            judged = 100 if arm != "plain" else 0
            taken = round(judged * accept)
            counts = Counts(30, judged, judged, taken, judged - taken, 100, judged * (1 - accept), judged * 0.16)
            phases = dict.fromkeys(PHASES, seconds / 4)
            text = (Timing(0.1, seconds, 100),)
            out.append(Record(arm, g, 0, 0, 100, seconds, phases, counts, 0, text, 0, (), 100 * nll))
    return out


def outcome(run: list[Record], base: list[Record], what: str, **margins: float) -> str:
    found = gate(run, base, Margins(**margins), relative=True)
    return next(c.outcome for c in found if c.arm == "length 4" and c.what.startswith(what))


def test_gates_pass_the_same_and_fail_planted_regressions() -> None:
    base = records(1.5, seed=1)
    assert overall(gate(records(1.5, seed=2), base, Margins(), relative=True)) == ("passed", 0)
    assert outcome(records(1.2, seed=2), base, "speed") == "failed"
    assert outcome(records(1.5, accept=0.7, seed=2), base, "acceptance") == "failed"
    assert outcome(records(1.5, nll=2.1, seed=2), base, "quality") == "failed"
    assert outcome(records(1.5, noise=0.5, seed=2), base, "speed", speed=0.01) == "inconclusive"


def test_gates_fail_on_a_broken_ledger_and_on_loops() -> None:
    base, run = records(1.5), records(1.5, seed=2)
    for r in run:
        r.counts.risk *= 0.3
    assert outcome(run, base, "exactness") == "failed"
    loops = [replace(r, loops=1) for r in records(1.5, seed=3)]
    assert outcome(loops, base, "health") == "failed"
    assert overall(gate(loops, base, Margins(), relative=True))[1] == 1


def test_runs_are_found_in_stores_and_files(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    made = bench(path)
    config, back = load_run("kill", path)
    assert config["batch"] == 1
    assert {r.key: r.outputs for r in back} == {r.key: r.outputs for r in made}
    with pytest.raises(ConfigError, match="--store"):
        load_run("kill", None)
    with pytest.raises(ConfigError, match="in common"):
        gate(made, [replace(r, arm="other") for r in made], Margins(), relative=False)
