"""Measures that must not mislead: lossy runs say so everywhere, two runs are two samples, no arm is always in another's wake, and
nothing is ranked against itself under another name."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.build import Engine, build_engine, companion
from outrider.cli.main import main
from outrider.control.fixed import Fixed
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.errors import ConfigError
from outrider.evaluate.bench.gate import Margins, gate, same_draws
from outrider.evaluate.bench.presets import arms_of, by_length
from outrider.evaluate.experiments.experiment import Experiment, analyse, build_arms, run_experiment
from outrider.evaluate.experiments.report import write_experiment
from outrider.evaluate.measure import Arm, check_answered, run_arms, text_seed
from outrider.evaluate.planning import plan as pl
from outrider.evaluate.records import Record
from outrider.evaluate.scoring import costs
from outrider.evaluate.scoring.score import Clock, logits_along
from outrider.evaluate.store.store import Store
from outrider.models.toy import TableTarget
from outrider.params import SamplingParams
from outrider.records import PHASES, Counts
from outrider.telemetry.ledger import standing
from outrider.verify import load_rule
from tests.evaluate.liars import DRAFT, TARGET

LOSSY = ("--rule", "tv_budget:per_token=0.3", "--allow-lossy")
BENCH = ("bench", "--lengths", "0,2", "--count", 2, "--repeats", 1, "--max-tokens", 12, "--warmup", 0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command that succeeds: all that it prints."""

    def one(*argv: object) -> str:
        monkeypatch.setattr(sys, "argv", ["outrider", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            main()
        seen = capsys.readouterr()
        assert not end.value.code, seen.err
        return seen.out + seen.err

    return one


# ------------------------------------------------------------------------------------------- every output says so
@pytest.mark.parametrize("rule", [(), LOSSY], ids=["exact", "lossy"])
def test_every_output_of_a_run_says_whether_it_is_lossy(rule: tuple, run, tmp_path: Path) -> None:
    """Table, page, JSON, list of runs, a run shown again, text: the word stands in all of them, and in none of an exact run."""
    db, page, file = tmp_path / "a.db", tmp_path / "a.html", tmp_path / "a.json"
    outputs = {"table": run(*BENCH, *rule, "--store", db, "--html", page, "--out", file)}
    outputs |= {
        "page": page.read_text(),
        "list": run("runs", "list", "--store", db),
        "show": run("runs", "show", "bench", "--store", db),
        "generate": run("generate", "def f(", "--max-tokens", 24, "--seed", 1, "--temperature", 1.5, *rule),
    }
    wrong = [name for name, text in outputs.items() if ("LOSSY" in text) is not bool(rule)]
    assert not wrong, wrong
    document = json.loads(file.read_text())
    assert document["lossless"] is not bool(rule)
    speculative = next(a for a in document["arms"] if a["name"] == "length 2")
    assert speculative["lossless"] is not bool(rule)
    assert (speculative["total_variation_per_token"] > 0) is bool(rule)
    assert next(a for a in document["arms"] if a["name"] == "plain")["lossless"], (
        "plain decoding is exact under any rule"
    )
    listed = json.loads(run("runs", "list", "--store", db, "--json"))
    assert listed["runs"][0]["lossy"] is bool(rule)


def test_an_experiment_names_its_lossy_arms(tmp_path: Path) -> None:
    e = Experiment(
        "x", {"exact": {}, "bent": {"rule": "tv_budget:per_token=0.3"}, "budget": {"tv_budget": 0.1}}, "exact"
    )
    assert e.lossy == ["bent", "budget"]
    arms = {"exact": e.arms["exact"], "bent": e.arms["bent"]}
    write_experiment(tmp_path / "x.html", {"groups": 0, "total": 1, "comparisons": []}, [], replace(e, arms=arms))
    assert "LOSSY" in (tmp_path / "x.html").read_text()


def test_the_words_of_a_ledger() -> None:
    assert standing(True, 0.0, 10) == "agree"
    assert standing(False, 0.0, 10) == "DISAGREE"
    assert "LOSSY" in standing(True, 1.5, 10) and "0.15 per token" in standing(True, 1.5, 10)
    assert "LOSSY" in standing(True, 0.0, 0, lossless=False)


# ------------------------------------------------------------------------------------------- two runs, two samples
def toy(length: int) -> Engine:
    drafter = ModelDrafter(DRAFT, length) if length else NoDraft()
    return Engine(TARGET, drafter, load_rule("speculative_sampling"), Fixed(length), slots=2, max_length=64)


def measured(seed: int, temperature: float = 1.0) -> list[Record]:
    arms = [Arm("plain", toy(0)), Arm("length 2", toy(2))]
    params = SamplingParams(temperature=temperature, max_tokens=24, ignore_eos=True)
    return run_arms(arms, [[1, 2], [3], [2, 1, 1], [2, 2]], params, repeats=2, warmup=0, seed=seed)


def test_a_seed_decides_the_texts_and_the_gate_says_when_both_runs_share_them() -> None:
    now, again, other = measured(0), measured(0), measured(1)
    plain = lambda records: [r.outputs for r in records if r.arm == "plain"]  # noqa: E731
    key = lambda records: sorted(records, key=lambda r: r.key)  # noqa: E731
    assert plain(key(now)) == plain(key(again)) != plain(key(other))
    said = same_draws(now, again)
    assert said is not None and "--seed" in said
    assert same_draws(now, other) is None
    assert same_draws(measured(0, 0.0), measured(1, 0.0)) is not None, "greedy runs are one text whatever the seed"
    check = next(c for c in gate(other, now, Margins(), relative=False) if c.what.startswith("acceptance"))
    assert check.low is not None and check.high is not None and check.low < check.high


def test_seeds_differ_by_run_repeat_and_prompt() -> None:
    seeds = {text_seed(s, r, p) for s in range(4) for r in range(4) for p in range(16)}
    assert len(seeds) == 256 and min(seeds) >= 0


def test_an_experiments_seed_decides_its_texts(tmp_path: Path) -> None:
    texts = []
    for seed in (0, 0, 1):
        e = Experiment("x", {"a": {}, "b": {}}, "a", count=2, max_tokens=16, seed=seed)
        with Store(tmp_path / f"{len(texts)}.db") as db:
            run_experiment(e, [Arm("a", toy(0)), Arm("b", toy(2))], [[1], [2]], db, stop_early=False)
            records = [Record.from_dict(d) for d in db.records(db.runs()[0].id).values()]
        assert analyse(e, records, 2).groups == 2
        texts.append(sorted((r.key, r.outputs) for r in records if r.arm == "a"))
    assert texts[0] == texts[1] != texts[2]


# ------------------------------------------------------------------------------------------- one model against itself
class Wake:
    """A clock on which a forward takes longer the wider the forward before it was, as caches do it; and a unit for every row."""

    def __init__(self) -> None:
        self.seconds, self.before = 0.0, 1

    def time(self, device: torch.device, call: Any) -> tuple[Any, float]:
        out = call()
        rows = len(out)
        took, self.before = 1.0 + 0.2 * rows + 0.1 * self.before, rows
        return out, took


def test_a_model_that_drafts_for_itself_costs_what_it_costs() -> None:
    """Draft and target are one model, so the ratio is 1, whatever forwards leave behind them; the control: a fixed order."""
    clock: Any = Wake()
    found = costs.measure_costs(TARGET, TARGET, [1, 2, 3] * 8, clock, longest=8, rounds=40)
    assert found.draft == pytest.approx(1.0, abs=0.06)
    fixed = Wake()
    order = [1, *range(1, 10)]  # the draft first, always behind the widest target forward
    took = {}
    for _ in range(3):
        for place, rows in enumerate(order):
            took[place] = fixed.time(TARGET.device, lambda n=rows: range(n))[1]
    assert took[0] / took[1] > 1.5
    assert Clock().seconds == 0.0


# ------------------------------------------------------------------------------------------- one configuration once
def test_a_drafter_that_proposes_nothing_is_plain_decoding_once() -> None:
    assert pl.configurations(["none"], [0, 2, 4], [1]) == [("none", 0, 1)]
    assert pl.configurations(["quiet", "d"], [0, 2], [1, 4], idle=["quiet"]) == [
        ("none", 0, 1), ("d", 2, 1), ("none", 0, 4), ("d", 2, 4),
    ]  # fmt: skip


def test_what_never_proposed_is_known_by_its_counts() -> None:
    def timing(proposed: int) -> pl.StepTiming:
        counts = Counts(steps=4, proposed=proposed, emitted=4)
        return pl.StepTiming(1, [Record("x", 0, 0, 0, 4, 1.0, dict.fromkeys(PHASES, 0.25), counts, 0)])

    timings = {("none", 0, 1): timing(0), ("ngram", 2, 1): timing(0), ("d", 2, 1): timing(5)}
    assert pl.never_drafted(timings) == [("ngram", 2, 1)]


def test_bench_does_not_compare_plain_decoding_with_itself() -> None:
    engine = build_engine(draft="none", slots=1)
    arms, absent = arms_of(engine, by_length([0, 2, 4]))
    assert [a.name for a in arms] == ["plain"]
    assert set(absent) == {"length 2", "length 4"} and "plain decoding" in absent["length 2"]
    assert pl.idle_drafters(engine, ["none", "ngram"]) == ["none"]


# ------------------------------------------------------------------------------------------- arms that differ do differ
def test_arms_that_load_a_draft_differently_have_drafts_of_their_own() -> None:
    engine = build_engine(draft="none", slots=1)
    e = Experiment(
        "x", {"a": {"draft": "auto"}, "b": {"draft": "auto", "draft_quantize": "int8"}, "c": {"draft": "auto"}}, "a"
    )
    models = [
        next(
            p for p in getattr(arm.engine.parts.drafter, "parts", [arm.engine.parts.drafter]) if hasattr(p, "model")
        ).model
        for arm in build_arms(engine, e)
    ]
    assert models[0] is not models[1] and models[0] is models[2]
    assert {key.quantize for key in engine.loaded.models} == {None, "int8"}
    assert companion(engine, "auto").loaded.models is engine.loaded.models


class Broken(TableTarget):
    """A target whose weights are no numbers."""

    def forward(self, *given: Any, **more: Any) -> Any:
        found = super().forward(*given, **more)
        return found._replace(logits=torch.full_like(found.logits, torch.nan))


def test_a_run_without_one_answer_is_an_error_and_no_speed_of_zero(tmp_path: Path) -> None:
    engine = Engine(Broken(torch.zeros(8, 8)), NoDraft(), load_rule("match"), Fixed(0), slots=2, max_length=64)
    with pytest.raises(ConfigError, match="no request was answered"):
        run_arms([Arm("plain", engine)], [[1], [2]], SamplingParams(max_tokens=4), repeats=1)
    e = Experiment("x", {"a": {}, "b": {}}, "a", count=2, max_tokens=4)
    with Store(tmp_path / "x.db") as db, pytest.raises(ConfigError, match="no request was answered"):
        run_experiment(e, [Arm("a", engine), Arm("b", engine)], [[1], [2]], db, stop_early=False)
    good = Record("plain", 0, 0, 0, 4, 1.0, {}, Counts(), failed=1)
    check_answered([good, replace(good, tokens=0)])
    with pytest.raises(ConfigError, match="no request was answered"):
        check_answered([replace(good, tokens=0)])


def test_logits_that_are_no_numbers_are_a_sentence_where_texts_are_scored() -> None:
    with pytest.raises(ConfigError, match="no numbers"):
        list(logits_along(Broken(torch.zeros(8, 8)), [1, 2, 3], 0, Clock()))
