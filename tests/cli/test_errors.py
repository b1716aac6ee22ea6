"""Wrong input ends in one sentence that names the remedy, and exit code 2. Nothing is started, nothing is left behind."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from outrider.assets import shipped
from outrider.cli.main import main
from tests.checkpoints import make_checkpoint


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """Exit code of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["outrider", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command that must fail with exit code 2 and return the words it said on stderr; stdout stays empty."""

    def check(*argv: str) -> str:
        assert run(monkeypatch, *argv) == 2
        seen = capsys.readouterr()
        assert seen.out == ""
        assert "Traceback" not in seen.err
        return " ".join(seen.err.replace("│", " ").split())

    return check


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama", tokenizer=True)


def test_no_such_model(says) -> None:
    assert "there is no folder /nowhere/model" in says("generate", "x", "--target", "/nowhere/model")


def test_pickle_weights_are_refused(says, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert "safetensors" in says("generate", "x", "--target", str(checkpoint), "--draft", "none")


def test_truncated_weights(says, checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in says("generate", "x", "--target", str(checkpoint), "--draft", "none")


def test_two_vocabularies(says, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shipped("draft"), other)
    data = json.loads((other / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(data))
    words = says("generate", "x", "--draft", str(other))
    assert "token 300" in words
    assert repr(a) in words


def test_prompt_longer_than_the_context(says) -> None:
    words = says("generate", "x = 1\n" * 2000, "--draft", "none")
    assert "shorten it" in words


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--temperature", "-1", "temperature"),
        ("--temperature", "nan", "temperature"),
        ("--top-p", "0", "top_p"),
        ("--top-p", "1.5", "top_p"),
        ("--top-k", "-2", "top_k"),
        ("--min-p", "2", "min_p"),
        ("--max-tokens", "0", "max_tokens"),
        ("--logprobs", "1000", "logprobs"),
        ("--length", "-1", "length"),
        ("--dtype", "flaot32", "float32"),
        ("--device", "gpu9", "device"),
        ("--rule", "speculative_samplin", "speculative_sampling"),
        ("--draft", "ngrm", "ngram"),
        ("--quantize-draft", "int5", "int"),
        ("--quantize-target", "q8", "q8_0"),
        ("--temprature", "1", "--temperature"),
        ("--speculative-config", '{"num_spec_tokens": 3}', "num_speculative_tokens"),
        ("--speculative-config", "{", "JSON"),
    ],
)
def test_options_out_of_range(says, option: str, value: str, word: str) -> None:
    assert word in says("generate", "x", option, value)


def test_unknown_command(says) -> None:
    assert "generte" in says("generte", "x")


def test_bad_prompt_file(says, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    assert f"{rows.name}:2" in says("bench", "--prompts", str(rows)).replace(" ", "")
    assert "no such file" in says("bench", "--prompts", str(tmp_path / "none.jsonl"))
    assert "0,2,4" in says("bench", "--lengths", "two")
