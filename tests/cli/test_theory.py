"""`outrider theory chain`: numbers for programs, a table for people, one sentence for wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from outrider.cli.main import main


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["outrider", "theory", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_chain_prints_the_exact_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--states", "7", "--horizon", "50", "--seed", "10", "--drafts", "4", "--json")
    assert run(monkeypatch, "chain", *options) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["expected_rejections"] == pytest.approx(14.0901, abs=5e-5)
    assert document["standard_deviation"] == pytest.approx(2.739, abs=5e-4)
    assert document["lower_bound"] == pytest.approx(16.4049, abs=5e-5)
    assert document["limit"] == pytest.approx(12.0994, abs=5e-5)
    assert document["oracle_calls"] == pytest.approx(50 / document["tokens_per_call"])
    assert 0 < document["expected_rejections"] + 1 - document["oracle_calls"] < 1  # P(the last token was a rejection)
    assert document["bonus_tokens"] == 0


def test_chain_with_a_length_counts_bonus_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "chain", "--length", "3", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bonus_tokens"] > 1
    tokens = document["accepted_tokens"] + document["bonus_tokens"] + document["expected_rejections"]
    assert tokens == pytest.approx(50)
    assert run(monkeypatch, "chain", "--length", "0", "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["oracle_calls"] == pytest.approx(50)
    assert plain["tokens_per_rejection"] is None


def test_chain_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "chain", "--drafts", "2") == 0
    text = capsys.readouterr().out
    for words in ("expected rejections", "tokens per call", "lower bound", "16.4049", "12.0994"):
        assert words in text


@pytest.mark.parametrize(
    "options",
    [
        ("--drafts", "0"),
        ("--drafts", "1000000000000"),
        ("--states", "0"),
        ("--horizon", "-1"),
        ("--seed", "-1"),
        ("--length", "x"),
    ],
)
def test_wrong_options_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str, str]
) -> None:
    assert run(monkeypatch, "chain", *options) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and options[0] in seen.err and "Traceback" not in seen.err


def test_a_value_error_of_the_theory_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from outrider.theory import chains

    def refuse(*_: object) -> None:
        raise ValueError("target must sum to one along its last axis, got 0.5")

    monkeypatch.setattr(chains, "best_guess", refuse)
    assert run(monkeypatch, "chain") == 2
    assert capsys.readouterr().err == "outrider: target must sum to one along its last axis, got 0.5\n"


def test_help_does_not_wait_for_numpy() -> None:
    code = (
        "import sys, outrider.cli.main as m\n"
        "assert not {'numpy', 'scipy', 'torch', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_figures_are_drawn_and_described(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "figures", "--out", str(tmp_path / "book"), "--runs", "200", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert next(f["name"] for f in document["figures"]) == "figure-2a" and len(document["figures"]) == 9
    assert {Path(f).suffix for f in document["files"]} == {".svg", ".png", ".md"}
    assert all(Path(f).stat().st_size > 1000 for f in document["files"])


def test_figures_need_a_folder_that_can_be_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    taken = tmp_path / "file"
    taken.write_text("", encoding="utf-8")
    assert run(monkeypatch, "figures", "--out", str(taken), "--runs", "200") == 2
    assert f"{taken} is a file: name a folder" in capsys.readouterr().err


def test_chains_too_large_for_memory_are_refused_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "chain", "--states", "1000", "--horizon", "2000") == 2
    assert "32 GB" in (said := capsys.readouterr().err) and "--horizon 250" in said


def test_drafts_longer_than_the_text_cost_nothing_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = []
    for length in ((), ("--length", "50"), ("--length", "100000000000000")):
        assert run(monkeypatch, "chain", *length, "--json") == 0
        counts.append(json.loads(capsys.readouterr().out) | {"length": None})
    assert counts[1] == counts[2] == counts[0]


def test_speeds_of_slow_machines_have_digits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = ("--target", "70b", "--hardware", "laptop-ddr5", "--bandwidth", "70", "--bytes", "0.6")
    assert run(monkeypatch, "speedup", *slow, "--length", "2") == 0
    assert "length 2: 3.89 tokens/s against 1.65 plain, speed-up 2.36" in capsys.readouterr().out


def test_more_drafts_than_can_be_waited_for_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "chain", "--states", "300", "--horizon", "5", "--drafts", "100000") == 2
    assert "at most 22222" in capsys.readouterr().err
