"""The commands on the shipped pair: what they print for programs, and that they agree with each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from outrider.cli.main import main


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command with --json and return its document; exit code 0."""

    def run(*argv: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["outrider", *argv, "--json"])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return json.loads(capsys.readouterr().out)

    return run


def test_generate_is_exact_and_says_what_it_counted(document) -> None:
    common = (
        "generate",
        "def read(path):\n",
        "--temperature",
        "0",
        "--max-tokens",
        "24",
        "--ignore-eos",
        "--dtype",
        "float32",
    )
    plain, fast = document(*common, "--draft", "none"), document(*common)
    assert plain["token_ids"] == fast["token_ids"]
    assert fast["finish_reason"] == "length"
    counts = fast["counts"]
    assert counts["emitted"] == 24 == len(fast["token_ids"])
    assert counts["steps"] + counts["accepted"] >= 24
    assert counts["judged"] == counts["accepted"] + counts["rejected"]
    assert set(fast["seconds"]) == {"target", "rule", "draft", "host"}
    assert plain["counts"]["proposed"] == 0
    assert fast["ledger"]["agrees"]


def test_generate_repeats_with_a_seed_and_samples_differ(document) -> None:
    common = ("generate", "import os\n", "--seed", "3", "--max-tokens", "16", "--ignore-eos", "--dtype", "float32")
    first, again = document(*common), document(*common)
    assert first["token_ids"] == again["token_ids"]
    many = document(*common, "--samples", "3")
    assert len({tuple(s["token_ids"]) for s in many["samples"]}) == 3


def test_generate_takes_vllms_json(document) -> None:
    config = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'
    out = document("generate", "a = 1\nb = 2\na = 1\nb =", "--max-tokens", "8", "--speculative-config", config)
    assert "ngram" in out["drafter"]


def test_generate_stops_before_a_stop_string(document) -> None:
    out = document(
        "generate", "def f(x):\n", "--temperature", "0", "--max-tokens", "40", "--stop", "\n", "--dtype", "float32"
    )
    assert "\n" not in out["text"]


def test_demo(document) -> None:
    d = document("demo", "--prompts", "2", "--repeats", "1", "--max-tokens", "16", "--dtype", "float32")
    assert d["plain"]["tokens_per_second"] > 0
    assert d["speedup"] == pytest.approx(d["speculative"]["tokens_per_second"] / d["plain"]["tokens_per_second"])
    assert d["acceptance_length"] >= 1
    assert d["ledger"]["low"] <= d["ledger"]["observed"] <= d["ledger"]["high"]
    assert d["greedy"]["identical"] + d["greedy"]["certified"] == d["greedy"]["prompts"]
    assert d["greedy"]["uncertified"] == 0


def test_bench(document, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    d = document(
        "bench",
        "--count",
        "3",
        "--repeats",
        "2",
        "--max-tokens",
        "16",
        "--lengths",
        "0,3",
        "--batch",
        "2",
        "--out",
        str(out),
    )
    plain, fast = d["arms"]
    assert plain["speedup"] is None
    assert fast["speedup"]["low"] <= fast["speedup"]["value"] <= fast["speedup"]["high"]
    assert fast["speedup"]["verdict"] in ("faster", "slower", "undecided")
    assert plain["tokens"] == fast["tokens"] == 3 * 2 * 16
    assert len(json.loads(out.read_text())["records"]) == 2 * 2 * 2


def test_doctor(document) -> None:
    d = document("doctor")
    assert d["ok"]
    assert {c["check"] for c in d["checks"]} == {"memory", "tokenizer", "vocabulary", "context", "cost"}
