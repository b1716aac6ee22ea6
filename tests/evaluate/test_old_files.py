"""Files of version 0.1.0 open and say what they said: a store, a run's file, an audit, a plan, logs, an experiment's folder.

They were written by the commands with the shipped pair (`bench`, `audit`, `plan`, `predict --save-logs`, `ab run`, `ab rehearse`,
`runs import`); `runs.db` also holds a run that was interrupted behind its first record. None of them is ever written again.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from outrider.evaluate.audit.findings import AuditResult, Detectable, as_document
from outrider.evaluate.audit.sources import read_texts
from outrider.evaluate.bench.gate import load_run
from outrider.evaluate.experiments.experiment import read_experiment
from outrider.evaluate.experiments.live import read
from outrider.evaluate.planning.plan import PlanEntry, advice
from outrider.evaluate.planning.predict_report import read_runs
from outrider.evaluate.records import Record, summarise
from outrider.evaluate.store.runlog import RunLog
from outrider.evaluate.store.store import Store
from outrider.evaluate.store.tables import table
from outrider.theory.logs import read_log

HERE = Path(__file__).parent / "fixtures"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The old files in a folder of their own, which may be written to."""
    return Path(shutil.copytree(HERE, tmp_path / "old"))


def test_a_stored_run_is_the_one_that_its_file_holds(old: Path) -> None:
    config, stored = load_run("shipped", old / "runs.db")
    document, filed = load_run(str(old / "bench.json"), old / "runs.db")
    key = lambda r: r.key  # noqa: E731
    bare = [(r.arm, r.group, r.repeat, r.tokens, r.seconds, r.counts, r.nll) for r in sorted(stored, key=key)]
    assert bare == [(r.arm, r.group, r.repeat, r.tokens, r.seconds, r.counts, r.nll) for r in sorted(filed, key=key)]
    assert config["max_tokens"] == document["max_tokens"] == 4
    assert [r.outputs for r in stored if r.arm == "length 2"] == [((630, 3073, 16, 3870),), ((620, 653, 201, 630),)]


def test_an_old_runs_figures_come_out_again(old: Path) -> None:
    document, records = load_run(str(old / "bench.json"), old / "runs.db")
    plain, two = summarise(records, "plain")
    for arm, known in zip((plain, two), document["arms"], strict=True):
        assert (arm.name, arm.tokens, arm.tokens_per_second) == (known["name"], 8, known["tokens_per_second"])
        assert arm.latency == known["latency"] and arm.phases == known["phases"] and arm.nll == known["nll"]
    assert two.speedup is not None and two.speedup.value == pytest.approx(1.0780413)
    assert two.counts.risk == pytest.approx(0.4511487) and two.counts.accepted == 4


def test_a_stores_tables_and_export(old: Path, run) -> None:
    with Store(old / "runs.db", read_only=True) as db:
        assert [(r.kind, r.name, r.state) for r in db.runs()] == [
            ("bench", "shipped", "done"), ("import", "others", "done"), ("bench", "cut", "running"),
        ]  # fmt: skip
        shipped = db.run("shipped")
        assert shipped.id == "0993d07d107f" and shipped.summary is not None and shipped.summary["rule"] == "block"
        ledger = db.ledgers(shipped.id)["length 2"]
        assert ledger["judged"] == 4 and ledger["risk"] == pytest.approx(0.4511487)
        rows = table(db, "others")
    assert [(r["task"], r["tokens"], r["failed"], r["counts.accepted"]) for r in rows] == [
        ("aiperf", 9, 0, 6), ("aiperf", 0, 1, 0),
    ]  # fmt: skip
    code, out = run("runs", "export", "shipped", "--store", old / "runs.db")
    head, *lines = (json.loads(line) for line in out.splitlines())
    assert code == 0 and head["state"] == "done" and len(lines) == 4 and lines[0]["data"]["counts"]["proposed"] == 2
    code, out = run("gate", old / "bench.json", "shipped", "--store", old / "runs.db", "--json")
    found = json.loads(out)
    assert {c["outcome"] for c in found["checks"] if c["what"].startswith("speed-up")} == {"passed"} and code in (0, 3)


def test_an_interrupted_run_goes_on(old: Path) -> None:
    log = RunLog(old / "runs.db", "cut", {"prompts": ["def f():"], "repeats": 2})
    known = log.known()
    assert log.run == "67c3a08a9661" and list(known) == [("length 2", 0, 0)]
    record = known["length 2", 0, 0]
    assert record.tokens == 4 and record.counts.accepted_at == [1, 1] and record.timings[0].tokens == 4
    log.keep(Record.from_dict(json.loads((old / "bench.json").read_text())["records"][1]))
    log.finish({})
    with Store(old / "runs.db") as db:
        assert db.run("cut").state == "done" and len(db.records(log.run)) == 2


def test_an_experiments_folder(old: Path, run) -> None:
    folder, db = old / "experiment", old / "experiment" / "outrider.db"
    e = read_experiment(folder / "experiment.yaml")
    assert e.others == ["two"] and e.metric == "acceptance" and e.share == 0.025
    for name, file in (("shipped", "experiment.json"), ("live rehearsal", "live.json")):
        code, out = run("ab", "status", name, "--store", db, "--json")
        assert code == 3 and json.loads(out) == json.loads((folder / file).read_text())
    assert run("ab", "report", "shipped", "--store", db, "--out", folder / "page.html")[0] == 0
    page = (folder / "page.html").read_text()
    assert "6 of 6 prompt groups; base arm plain" in page and "<td>1.699</td>" in page


def test_an_experiment_on_live_traffic_goes_on(old: Path) -> None:
    db = old / "experiment" / "outrider.db"
    e, tally, status = read("live rehearsal", db)
    assert list(e.arms) == ["off", "on"] and status.groups == 1 and status.stopped == ()
    on = tally.arms["on"]
    assert (on.requests, on.later, len(on.units)) == (3, 27, 2) and on.counts.judged == 18
    with sqlite3.connect(db) as tables:
        ((text,),) = tables.execute("SELECT config FROM experiments WHERE name = 'live rehearsal'").fetchall()
    tables.close()
    assert json.loads(text)["wishes"] == {"off": {"draft_length": 0}, "on": {"draft_length": 2}}


def test_an_audits_document(old: Path) -> None:
    document = json.loads((old / "audit.json").read_text())
    known = {k: v for k, v in document.items() if k not in ("sentence", "machine", "white_box", "generator")}
    verdict = AuditResult(**known | {"detectable": [Detectable(**d) for d in known["detectable"]]})
    said = as_document(verdict)
    assert said == {k: document[k] for k in said}
    assert verdict.outcome == "inconclusive" and verdict.families["leak"] == pytest.approx(0.15962953)


def test_recorded_texts_and_logs(old: Path, run) -> None:
    recorded = read_texts(old / "recorded.jsonl")
    assert len(recorded.prompts) == recorded.samples == 2 and recorded.emissions[0][1].tokens == (2422, 551, 348, 16)
    code, out = run(
        "audit", "--texts", old / "recorded.jsonl", "--dtype", "float32", "--max-tokens", 4, "--ignore-eos", "--json"
    )
    document = json.loads(out)
    assert code == 3 and document["tokens"] == 16 and document["law_gap"] < 1e-4 and document["violations"] == []
    texts = read_log((old / "texts.jsonl").read_text().splitlines())
    assert texts[1].target.tolist() == [-0.386600017, -4.78432121, -0.210390608, -1.50974665]
    code, out = run("predict", "--from-logs", old / "texts.jsonl", "--json")
    assert code == 0 and json.loads(out)["drafting"]["sampled"]["acceptance"]["value"] == pytest.approx(
        0.8140, abs=1e-4
    )


def test_a_plan_and_the_runs_to_check(old: Path) -> None:
    document = json.loads((old / "plan.json").read_text())
    choices = [
        PlanEntry(**{k: v for k, v in c.items() if k not in ("name", "cost_per_million_tokens")})
        for c in document["choices"]
    ]
    assert [c.name for c in choices] == [c["name"] for c in document["choices"]]
    assert advice(choices, 1, {}) == document["advice"]["1"]
    (found,) = read_runs(old / "bench.json")
    assert (found.name, found.length, found.emitted, found.steps, found.rule) == ("length 2", 2, 8, 4, "block")
