"""The evaluation commands on the shipped pair: documents, exit codes, pages, and messages for what cannot be done."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from outrider.evaluate.html import intervals, lines
from outrider.evaluate.measure import machine
from outrider.evaluate.planning.plan import PlanEntry, advice
from outrider.records import PHASES

BENCH = ("bench", "--lengths", "0,2", "--count", 3, "--repeats", 1, "--max-tokens", 8, "--warmup", 0)


def test_bench_store_runs_gate_and_report(run, tmp_path: Path) -> None:
    db, page = tmp_path / "a.db", tmp_path / "a.html"
    assert run(*BENCH, "--store", db, "--name", "now", "--quality", "--html", page)[0] == 0
    text = page.read_text()
    assert text.count("<svg") == 3 and "http" not in text.replace("http-equiv", "")
    for svg in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")
    assert "now" in run("runs", "list", "--store", db)[1]
    shown = json.loads(run("runs", "show", "now", "--store", db, "--json")[1])
    assert shown["records"] == 6 and shown["state"] == "done"
    exported = run("runs", "export", "now", "--store", db)[1].splitlines()
    assert len(exported) == 7 and json.loads(exported[1])["data"]["nll"] > 0
    code, out = run("gate", "now", "now", "--store", db, "--json")
    document = json.loads(out)
    assert code == 0 and document["outcome"] == "passed"
    assert {c["what"].split()[0] for c in document["checks"]} >= {"speed-up", "acceptance,", "exactness", "quality"}
    assert run("gate", "now", "then", "--store", db)[0] == 2


@pytest.mark.slow
def test_audit_names_a_lossy_rule_and_passes_the_exact_one(run) -> None:
    few = (
        "--count",
        6,
        "--samples",
        2,
        "--max-tokens",
        32,
        "--dtype",
        "float32",
        "--ignore-eos",
        "--detect",
        0.3,
        "--json",
    )
    code, out = run("audit", *few)
    document = json.loads(out)
    assert code == 0 and document["outcome"] == "exact so far"
    assert document["white_box"]["ledger"]["agrees"]
    code, out = run("audit", "--rule", "over_acceptance:eps=0.5", "--allow-lossy", *few)
    document = json.loads(out)
    assert code == 1 and document["outcome"] == "not the target's law"


def test_audit_of_greedy_text(run) -> None:
    code, out = run("audit", "--temperature", 0, "--count", 3, "--max-tokens", 16, "--dtype", "float32", "--json")
    assert code == 0 and json.loads(out)["tokens"] > 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("audit", "--url", "http://127.0.0.1:9", "--model", "m", "--count", 1), "cannot be reached"),
        (("audit", "--url", "http://127.0.0.1:9", "--python", "a:b"), "use one"),
        (("audit", "--python", "nothing_here:f", "--count", 1), "module:function"),
        (("audit", "--detect", 2, "--count", 1), "between 0 and 1"),
        (("runs", "list", "--store", "/nonexistent.db"), "no such store"),
        (("plan", "--batches", "0"), "--batches"),
        (("plan", "--vllm", "0.12"), "known releases: 0.32, 0.33"),
        (("plan", "--replicas", "3"), "add --traffic"),
        (("plan", "--traffic", "poisson:2", "--ray"), "--ray says nothing beside --traffic"),
        (("plan", "--traffic", "poisson:2", "--draft", "auto", "--draft", "ngram"), "give --draft once"),
        (("plan", "--traffic", "poisson:2", "--out", "x.md"), "only a ranking"),
        (("plan", "--out", "x.yaml"), "is what --ray writes"),
        (("plan", "--overhead-ms", "3"), "--overhead-ms says nothing without --traffic"),
        (("plan", "--step-ms", "3"), "--step-ms says nothing without --traffic"),
        (("plan", "--traffic", "poisson:2", "--retries", "3"), "without --mtbf"),
        (("plan", "--disaggregated"), "without --gpus"),
        (("plan", "--gpus", "8", "--target", "70b", "--check"), "--check says nothing beside --gpus"),
        (("plan", "--gpus", "8", "--target", "70b", "--rule", "block"), "the options of an engine"),
        (("plan", "--gpus", "8"), "as --target 70b"),
        (("plan", "--gpus", "1", "--target", "70b"), "cannot hold"),
        (("plan", "--gpus", "8", "--target", "none"), "is no size"),
        (("plan", "--gpus", "8", "--target", "70b", "--hardware", "m4-max"), "add --link"),
        (("ab", "run", "/nonexistent.yaml"), "no such file"),
        (("bench", "--answers", "x"), "--compat"),
        (("bench", "--store", "postgresql://me:secret@127.0.0.1:9/x", "--count", 2), "postgresql://127.0.0.1:9/x"),
    ],
)
def test_what_cannot_be_done_ends_in_a_sentence(run, argv, words: str) -> None:
    code, out = run(*argv)
    assert code == 2 and words in out and "Traceback" not in out


def test_ab_runs_and_reports(run, tmp_path: Path) -> None:
    file, db, page = tmp_path / "e.yaml", tmp_path / "a.db", tmp_path / "e.html"
    file.write_text("arms:\n  plain: {draft: none}\n  two: {length: 2}\ncount: 6\nmax_tokens: 8\nsd: 0.1\n")
    replayed = ("--replay", 1, "--metric", "acceptance")
    designed = json.loads(run("ab", "design", file, "--json")[1])
    assert designed["sequential"] > designed["groups"] == 6 and not designed["enough"]
    code, out = run("ab", "run", file, "--store", db, "--all", "--json", *replayed)
    document = json.loads(out)
    assert document["groups"] == 6 and code in (0, 3) and document["metric"] == "acceptance"
    assert document["comparisons"][0]["reduction"]["agrees"]
    assert json.loads(run("ab", "status", "e", "--store", db, "--json")[1])["comparisons"] == document["comparisons"]
    assert run("ab", "report", "e", "--out", page, "--store", db)[0] == 0
    assert "As it went" in page.read_text() and "common continuations" in page.read_text()
    assert run("ab", "run", file, "--store", db, "--metric", "sped")[0] == 2


def test_plan_ranks_and_advises(run) -> None:
    small = ("--count", 4, "--max-tokens", 8, "--lengths", "0,2", "--rounds", 2, "--price", 1.5, "--json")
    code, out = run("plan", *small, "--vllm", "0.33", "--ray")
    document = json.loads(out)
    assert code == 0
    launch = document["launch"]
    assert launch["command"].startswith("vllm serve ") and launch["vllm"] == "0.33"
    assert (launch["config"] is None) == ("--speculative-config" not in launch["command"])
    assert "ray.serve.llm:build_openai_app" in launch["ray"]
    rates = [c["tokens_per_second"] for c in document["choices"]]
    assert rates == sorted(rates, reverse=True) and len(rates) == 2
    for c in document["choices"]:
        assert c["low"] <= c["tokens_per_second"] <= c["high"]
        assert c["cost_per_million_tokens"] == pytest.approx(1.5 / 3600 / c["tokens_per_second"] * 1e6)
    advised = document["advice"]["1"]
    assert (advised["vllm"] is not None) == advised["speculate"]


def test_a_plan_is_checked(run, tmp_path: Path) -> None:
    """Every configuration has its row; the exit code says what the rows say."""
    small = ("--count", 4, "--max-tokens", 8, "--lengths", "0,2", "--batches", "1,2", "--rounds", 2)
    table = tmp_path / "plan.md"
    code, out = run("plan", *small, "--check", "--within", 0.5, "--out", table, "--json")
    document = json.loads(out)
    rows = document["check"]["rows"]
    assert [r["name"] for r in rows] == [c["name"] for c in document["choices"]] and len(rows) == 4
    for r in rows:
        assert r["error"] == pytest.approx(r["predicted"] / r["measured"] - 1)
        assert r["predicted"] == pytest.approx(r["batch"] * r["tokens_per_call"] / r["step"])
        assert r["low"] <= r["measured"] <= r["high"]
        assert "length" in r["name"] or r["measured_tokens_per_call"] == 1
    verdicts = [f["verdict"] for f in document["check"]["first_choice"]]
    outcomes = {r["outcome"] for r in rows}
    assert code == (1 if "slower" in verdicts or "off" in outcomes else 3 if "open" in outcomes else 0)
    assert len(table.read_text().splitlines()) == 6
    assert run("plan", "--check", "--count", 4, "--batches", 4)[0] == 2


def test_bench_reports_cost_energy_memory_and_spec_bench_numbers(run, tmp_path: Path) -> None:
    extra = ("--price-per-hour", 3.6, "--compat", "spec-bench", "--answers", tmp_path / "answers", "--json")
    code, out = run(*BENCH, *extra)
    document = json.loads(out)
    assert code == 0
    for a in document["arms"]:
        assert a["cost_per_million_tokens"] == pytest.approx(1000 / a["tokens_per_second"])
        assert (a["joules_per_token"] is None) == (document["energy_absent"] is not None)
    assert document["peak_memory_bytes"] > 1 << 20
    (speed,) = document["spec_bench"]["length 2"]
    arm = document["arms"][1]
    assert speed["task"] == "overall" and speed["questions"] == 3
    assert speed["mean_accepted_tokens"] == pytest.approx(arm["acceptance_length"])
    rows = [json.loads(line) for line in (tmp_path / "answers" / "length-2.jsonl").read_text().splitlines()]
    assert sum(r["choices"][0]["new_tokens"][0] for r in rows) == arm["tokens"]
    text = run(*BENCH, *extra[:-1])[1]
    assert "cost per million tokens" in text and "as Spec-Bench counts" in text
    assert run(*BENCH, "--compat", "other")[0] == 2 and run(*BENCH, "--compat", "spec-bench", "--batch", 2)[0] == 2


def test_bench_compares_arms_with_any_other_one(run) -> None:
    asked = ("bench", "--lengths", "0,1,2", *BENCH[3:], "--against", "length 2", "--against", "plain")
    document = json.loads(run(*asked, "--json")[1])
    plain, one, two = document["arms"]
    assert set(plain["against"]) == {"length 2"} and set(two["against"]) == {"plain"}
    assert two["against"]["plain"] == two["speedup"] and one["against"]["plain"] == one["speedup"]
    assert one["against"]["length 2"]["value"] == pytest.approx(one["tokens_per_second"] / two["tokens_per_second"])
    text = run(*asked)[1]
    assert "speed over other arms" in text and "over length 2" in text.replace("\n", " ")
    assert "speed over other arms" not in run(*BENCH)[1]


def test_a_prompt_that_does_not_fit_is_an_outcome(run, tmp_path: Path) -> None:
    """It is counted, its group enters no rate of any arm, and the others are measured."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("import os\n" + "x = 1; " * 4000 + "\nimport sys\nimport re\n")
    code, out = run("bench", "--prompts", prompts, *BENCH[1:], "--count", 4, "--json")
    document = json.loads(out)
    assert code == 0
    for a in document["arms"]:
        assert a["failed"] == 1 and a["tokens"] == 24


def test_advice_may_be_not_to_speculate() -> None:
    seconds = dict.fromkeys(PHASES, 0.25)
    plain = PlanEntry("none", 0, 1, 100.0, 99.0, 101.0, 1.0, seconds, None, "target", 100.0)
    slow = PlanEntry("auto", 2, 1, 80.0, 79.0, 81.0, 1.5, seconds, 0.9, "draft", 80.0)
    said = advice([plain, slow], 1, {"auto": "x"})
    assert not said["speculate"] and said["vllm"] is None and said["options"] == ["--draft", "none"]
    said = advice([slow], 1, {"auto": "x"})
    assert json.loads(said["vllm"])["model"] == "x" and "0.90" in said["what_would_change_it"]


def test_plots_of_odd_numbers() -> None:
    inf = float("inf")
    ElementTree.fromstring(intervals("t", [("a<b", 1.0, -inf, inf), ("c", 2.0, 1.0, 3.0)], "x", 1.0))
    ElementTree.fromstring(lines("t", {"a": [(1.0, 1.0, 0.0, inf), (2.0, 1.0, 0.5, 1.5)]}, "x", (1.0,)))
    assert "Too few" in lines("t", {"a": [(1.0, 1.0, -inf, inf)]}, "x", ())
    assert machine()["versions"]
