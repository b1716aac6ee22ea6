"""`--image`: files as images of a prompt, from a checkpoint folder with its own processor; exit code 2 for what cannot be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoProcessor

from outrider.cli.main import main
from tests.checkpoints_images import picture, small

NEW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kit, place = small("idefics3"), tmp_path_factory.mktemp("model")
    kit.model.save_pretrained(place)
    kit.processor.save_pretrained(place)
    try:
        AutoProcessor.from_pretrained(place)
    except ValueError as error:
        pytest.skip(f"this release of transformers finds it with torchvision alone: {error}")
    picture(1).save(place / "a.png")
    return place


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["outrider", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_generate_reads_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = small("idefics3")
    common = ("--target", str(folder), "--image", str(folder / "a.png"), "--draft", "ngram", "--temperature", "0",
              "--max-tokens", str(NEW), "--ignore-eos", "--dtype", "float32", "--json")  # fmt: skip
    for prompt, text in (("What?", f"[user]{kit.mark}What?[assistant]"), (f"a {kit.mark} b", f"a {kit.mark} b")):
        assert run(monkeypatch, "generate", prompt, *common) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["token_ids"] == kit.text(text, [picture(1)], NEW)
        assert len(found["prompt_token_ids"]) == kit.inputs(text, [picture(1)])["input_ids"].shape[1]


def test_what_cannot_be_read_ends_with_a_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.png").write_bytes(b"no picture")
    for target, image, why in (
        (["--target", str(folder)], "bad.png", "no PNG"),
        (["--target", str(folder)], "absent.png", "no such file"),
        ([], "a.png", "reads no images"),
    ):
        assert run(monkeypatch, "generate", "x", *target, "--image", str(folder / image), "--dtype", "float32") == 2
        assert why in capsys.readouterr().err
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    (folder / "processor_config.json").unlink(missing_ok=True)
    assert run(monkeypatch, "generate", "x", "--target", str(folder), "--image", str(folder / "a.png")) == 2
    assert "preprocessor_config.json" in capsys.readouterr().err
