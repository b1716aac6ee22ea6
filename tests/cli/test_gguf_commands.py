"""GGUF files on the command line: converted, examined, run as target and as draft, and refused in one sentence."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from outrider import Engine
from outrider.cli.main import main
from outrider.models.load import load_target
from outrider.params import SamplingParams
from tests.gguf_files import make_pair

pytest.importorskip("gguf")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, in this process: exit code, output, errors."""

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["outrider", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return command


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"), tokenizer=True)


def test_convert_then_doctor(pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    out = tmp_path / "q8.gguf"
    code, said, _ = run("convert", pair[0], out, "--type", "Q8_0", "--json")
    found = json.loads(said)
    assert (
        code == 0 and found["bytes"] == out.stat().st_size and set(found["types"]) == {"bf16", "f32"}
    )  # 48 is no whole block
    assert run("convert", pair[0], out)[0] == 2
    code, said, _ = run("doctor", out, "--json")
    target = json.loads(said)["models"]["target"]
    assert code == 0
    assert (target["runtime"], target["architecture"], target["vocabulary"]) == ("lean", "LlamaForCausalLM", 320)
    assert target["stored"].startswith("GGUF: bf16")
    assert target["parameters"] == json.loads(run("doctor", pair[0], "--json")[1])["models"]["target"]["parameters"]


@pytest.mark.parametrize(
    ("value", "kind", "sentence"),
    [
        (float("nan"), "q8_0", "no finite numbers"),
        (float("inf"), "f32", "no finite numbers"),
        (1e30, "f16", "too large for f16: choose bf16 or f32"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(
    pair: tuple[Path, Path], tmp_path: Path, run: Run, value: float, kind: str, sentence: str
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out.gguf"
    shutil.copytree(pair[0], folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    code, _, said = run("convert", folder, out, "--type", kind)
    assert code == 2 and "model.layers.0.mlp.up_proj.weight" in said and sentence in said
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("order", ["file, folder", "folder, file", "file, file"])
def test_mixed_pairs_write_the_target_own_text(pair: tuple[Path, Path], order: str, run: Run) -> None:
    place = {"folder": str(pair[0]), "file": str(pair[1])}
    target, draft = (place[name] for name in order.split(", "))
    words = ("generate", "def main", "--temperature", 0, "--max-tokens", 12, "--dtype", "float32", "--target")
    alone = run(*words, target, "--draft", "none")[1]
    code, said, _ = run(*words, target, "--draft", draft, "--length", 3)
    assert code == 0 and said == alone
    assert said == run(*words, place["folder"], "--draft", "none")[1]


def test_chat_takes_the_file_alone(pair: tuple[Path, Path], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _prompt="": next(lines))
    code, said, told = run("chat", pair[1], "--max-tokens", 4, "--draft", "ngram")
    assert code == 0 and said and "no chat template" not in told
    assert run("chat", pair[1], "--target", pair[1])[0] == 2


def test_a_folder_of_one_file_is_that_file(pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    (tmp_path / "model.gguf").write_bytes(pair[1].read_bytes())
    assert load_target(tmp_path).vocab_size == 320
    (tmp_path / "other.gguf").write_bytes(pair[1].read_bytes())
    code, _, told = run("doctor", tmp_path)
    assert code == 2 and "holds 2 GGUF models (model.gguf, other.gguf)" in told


def test_refusals_are_one_sentence(pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(pair[1].read_bytes()[:-64])
    for words, said in (
        (("doctor", tmp_path / "missing.gguf"), "there is no folder"),
        (("doctor", short), "was cut off"),
        (("generate", "x", "--target", short), "was cut off"),
        (("generate", "x", "--target", pair[1], "--implementation", "hf"), "only the lean runtime reads"),
        (("convert", pair[1], tmp_path / "x.gguf"), "GGUF file already"),
        (("convert", pair[0], tmp_path / "x.bin"), "does not end in .gguf"),
        (("convert", pair[0], tmp_path / "x.gguf", "--type", "q9"), "choose one of"),
    ):
        code, _, told = run(*words)
        assert code == 2 and said in told and told.strip().count("\n") == 0


def test_speculation_keeps_the_text(pair: tuple[Path, Path]) -> None:
    """Greedy texts with and without drafts, of a quantised file, are identical."""
    params = SamplingParams(temperature=0, max_tokens=24)
    prompts = ["def f(", "The quick", "été"]
    texts = [
        [
            r.text
            for r in Engine.build(target=str(pair[1]), draft=draft, dtype="float32", slots=3, max_length=128).generate(
                prompts, params
            )
        ]
        for draft in ("none", "ngram", str(pair[1]))
    ]
    assert texts[0] == texts[1] == texts[2]
