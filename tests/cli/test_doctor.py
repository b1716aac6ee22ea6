"""`outrider doctor` and loading give one answer about one folder: what one refuses the other does not call fit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from outrider.assets import shipped
from outrider.cli.main import main
from outrider.errors import ConfigError
from outrider.models.load import inspect_checkpoint, load_target
from tests.checkpoints import make_checkpoint

QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "unheard of": {"quant_method": "quux"},
}


def edit(folder: Path, **changes: object) -> Path:
    """A folder with other entries in its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def bert(folder: Path) -> Path:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=101, **shape)).save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=101, **shape)).save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    config = GPT2Config(vocab_size=101, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def run(monkeypatch, capsys, *command: str) -> tuple[int, str]:
    """The exit code of a command in this process, and all it printed, on one line."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["outrider", *command])
    try:
        main()
        code: object = 0
    except SystemExit as end:
        code = end.code or 0
    said = capsys.readouterr()
    return int(str(code)), " ".join((said.out + said.err).split())


MADE = {
    **{
        name: lambda p, how=how: edit(make_checkpoint(p, "llama"), quantization_config=how)
        for name, how in QUANTISED.items()
    },
    "bert": bert,
    "t5": t5,
    "a field that its class refuses": lambda p: edit(gpt2(p), n_embd="sixteen"),
    "a field of nothing": lambda p: edit(gpt2(p), layer_norm_epsilon=None),
    "a name that nobody knows": lambda p: edit(make_checkpoint(p, "llama"), model_type="quux"),
}


@pytest.mark.parametrize("kind", MADE)
def test_what_loading_refuses_doctor_refuses_in_the_same_words(kind: str, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = MADE[kind](tmp_path / "model")
    with pytest.raises(ConfigError) as loading:
        load_target(folder)
    with pytest.raises(ConfigError) as looking:
        inspect_checkpoint(folder)
    assert str(loading.value) == str(looking.value)
    monkeypatch.setattr(sys, "argv", ["outrider", "doctor", str(folder)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert str(looking.value) in capsys.readouterr().err


def test_what_loads_is_fit_whatever_runs_it(tmp_path: Path) -> None:
    assert inspect_checkpoint(gpt2(tmp_path / "gpt2")).runtime == "transformers"
    assert load_target(tmp_path / "gpt2").vocab_size == 101
    assert inspect_checkpoint(make_checkpoint(tmp_path / "llama", "llama")).runtime == "lean"


def test_a_folder_without_tokenizer_is_not_fit(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", tokenizer=True)
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    for name, code, ok in (("model", 0, True), ("bare", 1, False)):
        monkeypatch.setattr(sys, "argv", ["outrider", "doctor", str(tmp_path / name), "--json"])
        with pytest.raises(SystemExit) as end:
            main()
        found = json.loads(capsys.readouterr().out)
        assert (int(end.value.code or 0), found["ok"]) == (code, ok)
        assert [c["ok"] for c in found["checks"] if c["check"] == "tokenizer"] == [ok]
    assert "has no tokenizer.json" in str(found["checks"])
    for command in (["generate", "x"], ["chat"], ["bench"], ["predict"], ["plan"], ["audit"], ["tree"]):
        monkeypatch.setattr(sys, "argv", ["outrider", *command, "--target", str(tmp_path / "bare")])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert (end.value.code, said.out) == (2, "") and "Traceback" not in said.err
        assert said.err.splitlines()[-1].startswith(f"outrider: {tmp_path / 'bare'} has no tokenizer.json: "), (
            "as doctor says"
        )
        assert len(said.err.splitlines()) == 1, "before a weight is read, so that no notice of loading stands before it"


@pytest.mark.parametrize("where", ["generation_config.json", "config.json", "tokenizer_config.json"])
def test_an_end_of_text_that_no_row_is_for_is_refused_by_doctor_too(
    where: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Of the target, whose texts end with it; a draft's are those of its target."""
    folder = make_checkpoint(tmp_path / "model", "llama", tokenizer=True)
    file, other = folder / where, shutil.copytree(folder, tmp_path / "good")
    raw = json.loads(file.read_text()) if file.is_file() else {}
    if where == "tokenizer_config.json":
        fast = json.loads((folder / "tokenizer.json").read_text())
        end = {"id": 9999, "content": "<end>", "special": True, "normalized": False, "single_word": False}
        fast["added_tokens"] = [*fast.get("added_tokens", []), end | {"lstrip": False, "rstrip": False}]
        (folder / "tokenizer.json").write_text(json.dumps(fast))
        raw |= {"eos_token": "<end>"}
    else:
        (folder / "generation_config.json").unlink(missing_ok=True)  # it goes before the other
        raw |= {"eos_token_id": [2, 9999]}
    file.write_text(json.dumps(raw))
    for command in (["doctor", str(folder)], ["generate", "x", "--target", str(folder), "--draft", "none"]):
        code, said = run(monkeypatch, capsys, *command)
        assert code in (1, 2) and "names the end-of-text token" in said
    _, said = run(
        monkeypatch, capsys, *("generate", "x", "--target", str(other), "--draft", str(folder), "--max-tokens", "4")
    )
    assert "names the end-of-text token" not in said


@pytest.mark.parametrize(
    ("file", "said"), [("adapter_config.json", "LoRA"), ("weights.gguf", "GGUF"), ("inner/config.json", "did you mean")]
)
def test_a_folder_of_something_else_is_named(file: str, said: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    for look in (load_target, inspect_checkpoint):
        with pytest.raises(ConfigError, match=said):
            look(tmp_path)


def test_a_note_is_printed_as_text_and_not_as_markup(tmp_path: Path, monkeypatch, capsys) -> None:
    """Whatever is printed for people: no tag of a style is left in it."""
    from transformers import AutoTokenizer

    folder = gpt2(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(make_checkpoint(tmp_path / "llama", "llama", tokenizer=True)).save_pretrained(folder)
    monkeypatch.setattr(sys, "argv", ["outrider", "doctor", str(folder)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().out
    assert not end.value.code
    assert "note speed" in " ".join(said.split()) and "runs on transformers" in said
    assert not re.search(r"\[/?[a-z ]+\]", said)


def test_a_refusal_is_one_line_whatever_transformers_says_besides(tmp_path: Path) -> None:
    """In a process of its own, where transformers is imported by the command: its advice to programmers is not a user's."""
    folder = bert(tmp_path / "bert")
    shutil.copy(shipped("target") / "tokenizer.json", folder)
    command = [sys.executable, "-m", "outrider", "generate", "x", "--target", str(folder)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split(" is an encoder")[0] for line in done.stderr.splitlines()] == [f"outrider: {folder}"]


def test_loading_shows_no_bar_of_transformers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nor takes it away from who loads models of transformers beside."""
    from transformers.utils import logging

    folder = gpt2(tmp_path / "gpt2")
    capfd.readouterr()
    shown = logging.is_progress_bar_enabled()
    load_target(folder)
    assert "Loading weights" not in capfd.readouterr().err and logging.is_progress_bar_enabled() == shown
