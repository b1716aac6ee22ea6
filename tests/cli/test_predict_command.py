"""`outrider predict` and `outrider theory speedup`: from logs, from the shipped pair, against a run, and what they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from outrider.cli.main import main

PROMPTS = 12


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Exit code, stdout and stderr of a command."""

    def call(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["outrider", *argv])
        with pytest.raises(SystemExit) as end:
            main()
        seen = capsys.readouterr()
        return int(end.value.code or 0), seen.out, " ".join(seen.err.split())

    return call


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of 2 texts of each of 12 prompts with acceptance 0.75 everywhere."""
    rng, lines = np.random.default_rng(0), []
    for prompt in range(PROMPTS):
        for text in range(2):
            target = np.log(rng.uniform(0.2, 0.9, 40))
            row = {"id": f"{prompt}-{text}", "prompt_id": str(prompt), "domain": "ab"[prompt % 2]}
            row |= {"target_logprobs": target.tolist(), "draft_logprobs": (target + np.log(0.75)).tolist()}
            row |= {"draft_argmax_hit": (rng.random(40) < 0.5).tolist(), "tv": [0.25] * 40}
            lines.append(json.dumps(row))
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines))
    return path


def document_of(path: Path, rejected: float, **more: object) -> Path:
    counts = {"proposed": 3000, "rejected": rejected, "emitted": PROMPTS * 40, "steps": 300}
    path.write_text(json.dumps({"counts": counts, "length": 3, "greedy": {"prompts": PROMPTS}, **more}))
    return path


def test_from_logs(run, log: Path) -> None:
    code, out, _ = run("predict", "--from-logs", str(log), "--draft-cost", "0.05", "--json")
    d = json.loads(out)
    assert code == 0 and d["predicted"] is True
    assert (d["texts"], d["prompts"], d["tokens"]) == (24, 12, 960)
    sampled = d["drafting"]["sampled"]
    assert sampled["acceptance"]["value"] == pytest.approx(0.75)
    assert sampled["lengths"][2]["acceptance_at"] == pytest.approx([0.75] * 3)
    assert sampled["rejections"]["value"] == pytest.approx(10.0)
    assert d["domains"].keys() == {"a", "b"}
    assert sampled["best"]["length"] > d["drafting"]["greedy"]["best"]["length"] > 0
    assert d["drafting"]["block"]["lengths"][3]["rejections"] is None
    code, out, _ = run("predict", "--from-logs", str(log))
    assert code == 0 and "tokens per target call" in out and "speed-up" not in out


def test_check_says_agree_or_disagree(run, log: Path, tmp_path: Path) -> None:
    # expected: 40 tokens, 38 judgeable; a quarter of the judged drafts is rejected
    predicted = json.loads(run("predict", "--from-logs", str(log), "--json")[1])
    per_text = predicted["drafting"]["sampled"]["lengths"][2]["rejections"]["value"]
    good = document_of(tmp_path / "good.json", per_text * PROMPTS)
    for more in ((), ("--same-prompts",)):
        code, out, _ = run("predict", "--from-logs", str(log), "--check", str(good), *more, "--json")
        check = json.loads(out)["check"][0]
        assert code == 0 and check["agrees"]
        assert check["predicted"] == pytest.approx(check["observed"])
    bad = document_of(tmp_path / "bad.json", 2 * per_text * PROMPTS)
    code, out, _ = run("predict", "--from-logs", str(log), "--check", str(bad))
    assert code == 1 and "DISAGREE" in out


def test_the_shipped_pair_against_a_run_of_bench(run, tmp_path: Path) -> None:
    file, logs = tmp_path / "run.json", tmp_path / "logs.jsonl"
    small = ("--count", "4", "--max-tokens", "16", "--dtype", "float32", "--max-length", "256")
    assert (
        run("bench", "--lengths", "0,2", "--repeats", "1", "--warmup", "0", *small, "--out", str(file), "--json")[0]
        == 0
    )
    code, out, _ = run(
        "predict", *small, "--samples", "2", "--same-prompts", "--check", str(file), "--save-logs", str(logs), "--json"
    )
    d = json.loads(out)
    assert code == 0
    assert (d["texts"], d["tokens"]) == (8, 128)
    assert [c["run"] for c in d["check"]] == ["length 2"]
    assert 0 < d["time"]["share_in_models"] <= 1
    assert d["moved_by_rounding"] == 0
    again = json.loads(run("predict", "--from-logs", str(logs), "--json")[1])
    for ours, theirs in zip(d["drafting"]["sampled"]["lengths"], again["drafting"]["sampled"]["lengths"], strict=True):
        assert ours["acceptance_length"]["value"] == pytest.approx(theirs["acceptance_length"]["value"], rel=1e-6)
    code, _, err = run("predict", *small, "--temperature", "0.5", "--check", str(file))
    assert code == 2 and "--temperature 1" in err


def test_given_completions_and_measured_costs(run, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": "import os\n", "completion": "import sys\n", "domain": "x"}, {"prompt": "def f(x):\n"}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = run(
        "predict", "--prompts", str(prompts), "--max-tokens", "16", "--measure", "--json", "--max-length", "128"
    )
    d = json.loads(out)
    assert code == 0 and d["costs"]["source"] == "measured" and d["costs"]["verify"][0] == 1.0
    assert set(d["domains"]) == {"x", ""}
    assert d["tokens"] < 32


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--from-logs", "/nowhere.jsonl"), "no such file"),
        (("--from-logs", "LOG", "--measure"), "give --draft-cost instead"),
        (("--from-logs", "LOG", "--verify-cost", "1"), "needs --draft-cost"),
        (("--from-logs", "LOG", "--draft-cost", "0.1", "--verify-cost", "a"), "numbers separated by commas"),
        (("--from-logs", "LOG", "--draft-cost", "0.1", "--verify-cost", "0"), "positive"),
        (("--drafting", "beam"), "sampled or greedy"),
        (("--draft-cost", "0.1", "--measure"), "use one"),
        (("--from-logs", "LOG", "--check", "/nowhere.json"), "no such file"),
        (("--from-logs", "LOG", "--check", "LOG"), "not JSON"),
        (("--draft", "ngram"), "name a draft model with --draft"),
        (("--prompts", "/nowhere.txt"), "no such file"),
        (("--temperature", "-1"), "temperature"),
    ],
)
def test_refusals(run, log: Path, argv: tuple[str, ...], words: str) -> None:
    code, out, err = run("predict", *(str(log) if a == "LOG" else a for a in argv))
    assert code == 2 and out == "" and words in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("[]", "one JSON object"),
        ("{}", "no counts"),
        ('{"counts": {"proposed": 5, "rejected": 1, "emitted": 9, "steps": 4}}', "add --length"),
        ('{"counts": {"proposed": 0, "rejected": 0, "emitted": 9, "steps": 9}}', "nothing to compare"),
        (
            '{"length": 2, "rule": "match", "counts": {"proposed": 5, "rejected": 1, "emitted": 9, "steps": 4}}',
            "speculative_sampling",
        ),
    ],
)
def test_runs_that_cannot_be_checked(run, log: Path, tmp_path: Path, body: str, words: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(body)
    code, _, err = run("predict", "--from-logs", str(log), "--check", str(file))
    assert code == 2 and words in err


def test_a_bad_line_is_named(run, log: Path) -> None:
    log.write_text(log.read_text() + '\n{"target_logprobs": [0.5], "draft_logprobs": [-1]}\n')
    code, _, err = run("predict", "--from-logs", str(log))
    assert code == 2 and "log.jsonl:25: target_logprobs[0] must be at most 0, got 0.5" in err


def test_theory_speedup(run) -> None:
    argv = (
        "theory",
        "speedup",
        "--target",
        "70b",
        "--draft",
        "1b",
        "--hardware",
        "h100",
        "--batch",
        "8",
        "--context",
        "4096",
    )
    code, out, _ = run(*argv, "--json")
    d = json.loads(out)
    assert code == 0 and d["predicted"] is True
    assert not d["fits"] and d["devices_needed"] == 3
    assert d["chosen"] == d["best"] and len(d["rows"]) == 17
    code, out, _ = run(*argv)
    words = " ".join(out.split())
    assert "does not fit" in words and "need 3 devices" in words and "bottlenecks: plain weights" in words
    code, out, _ = run(*argv, "--devices", "4", "--length", "4", "--json")
    d = json.loads(out)
    assert d["fits"] and d["chosen"]["length"] == 4
    code, out, _ = run("theory", "speedup", "--batch", "1024", "--context", "16")
    assert code == 0 and "do not speculate" in " ".join(out.split())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--hardware", "abacus"), "known: zen5-2"),
        (("--target", "huge"), "no size"),
        (("--length", "many"), "--length"),
        (("--acceptance", "2"), "acceptance"),
        (("--bytes", "0"), "bytes of a weight"),
    ],
)
def test_theory_speedup_refuses(run, argv: tuple[str, ...], words: str) -> None:
    code, _, err = run("theory", "speedup", *argv)
    assert code == 2 and words in err
