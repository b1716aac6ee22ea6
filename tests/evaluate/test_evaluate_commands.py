"""The evaluation commands on the shipped pair: documents, exit codes, pages, and messages for what cannot be done."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from outrider.cli.main import main
from outrider.evaluate.measure import machine
from outrider.evaluate.plan import Choice, advice
from outrider.evaluate.report import intervals, lines
from outrider.types import PHASES


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command: its exit code and its output."""

    def one(*argv: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["outrider", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), "".join(capsys.readouterr())

    return one


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


def test_audit_names_a_lossy_rule_and_passes_the_exact_one(run) -> None:
    few = (
        "--count",
        8,
        "--samples",
        2,
        "--max-tokens",
        48,
        "--dtype",
        "float32",
        "--ignore-eos",
        "--detect",
        0.2,
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
        (("ab", "run", "/nonexistent.yaml"), "no such experiment"),
    ],
)
def test_what_cannot_be_done_ends_in_a_sentence(run, argv, words: str) -> None:
    code, out = run(*argv)
    assert code == 2 and words in out and "Traceback" not in out


def test_ab_runs_and_reports(run, tmp_path: Path) -> None:
    file, db, page = tmp_path / "e.yaml", tmp_path / "a.db", tmp_path / "e.html"
    file.write_text("arms:\n  plain: {draft: none}\n  two: {length: 2}\ncount: 6\nmax_tokens: 8\nsd: 0.1\n")
    designed = json.loads(run("ab", "design", file, "--json")[1])
    assert designed["sequential"] > designed["groups"] == 6 and not designed["enough"]
    code, out = run("ab", "run", file, "--store", db, "--all", "--json")
    document = json.loads(out)
    assert document["groups"] == 6 and code in (0, 3)
    assert json.loads(run("ab", "status", "e", "--store", db, "--json")[1])["comparisons"] == document["comparisons"]
    assert run("ab", "report", "e", "--out", page, "--store", db)[0] == 0
    assert "As it went" in page.read_text()


def test_plan_ranks_and_advises(run) -> None:
    small = ("--count", 4, "--max-tokens", 8, "--lengths", "0,2", "--rounds", 2, "--price", 1.5, "--json")
    code, out = run("plan", *small)
    document = json.loads(out)
    assert code == 0
    rates = [c["tokens_per_second"] for c in document["choices"]]
    assert rates == sorted(rates, reverse=True) and len(rates) == 2
    for c in document["choices"]:
        assert c["low"] <= c["tokens_per_second"] <= c["high"]
        assert c["cost_per_million_tokens"] == pytest.approx(1.5 / 3600 / c["tokens_per_second"] * 1e6)
    advised = document["advice"]["1"]
    assert (advised["vllm"] is not None) == advised["speculate"]


def test_advice_may_be_not_to_speculate() -> None:
    seconds = dict.fromkeys(PHASES, 0.25)
    plain = Choice("none", 0, 1, 100.0, 99.0, 101.0, 1.0, seconds, None, "target", 100.0)
    slow = Choice("auto", 2, 1, 80.0, 79.0, 81.0, 1.5, seconds, 0.9, "draft", 80.0)
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
