"""`outrider train` end to end on a tiny checkpoint: what it needs, a drafter that the engine takes, a run that continues."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from outrider.cli.main import main
from outrider.train.checkpoint import verify
from tests.checkpoints import make_checkpoint
from tests.plain_text import assert_plain_text


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["outrider", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "target", "llama", tokenizer=True)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(8):
        (texts / f"{i}.txt").write_text("\n".join(f"the {j}th line of text number {i}, {i * j}" for j in range(60)))
    return tmp_path


def options(place: Path, kind: str) -> list[str]:
    """A run of a few seconds."""
    return [
        "train", kind, "--target", str(place / "target"), "--data", str(place / "texts"), "--work", str(place / "work"),
        "--out", str(place / kind), "--rows", "12", "--held-out", "4", "--prompt", "8", "--length", "24", "--steps", "4",
        "--batch", "4", "--levels", "2", "--json",
        *(["--taps", "1,2"] if kind in ("hydra", "eagle", "dflash") else []),
        *(["--anchors", "5"] if kind == "dflash" else []),
        *(["--width", "32"] if kind in ("eagle", "draft") else []),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["medusa", "hydra", "eagle", "eagle1", "dflash", "draft"])
def test_a_drafter_from_text(kind: str, place: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, *options(place, kind), "--dry-run") == 0
    needs = json.loads(capsys.readouterr().out)
    assert needs["documents"] == 8
    assert needs["disk_bytes"] > 0
    assert set(needs["seconds"]) == {"text", "hidden states", "training"}
    assert needs["hours"] == pytest.approx(sum(needs["seconds"].values()) / 3600) and "at best" in needs["pays"]
    assert not (place / "work").exists(), "a dry run leaves nothing behind"

    assert run(monkeypatch, *options(place, kind)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["drafter"], found["steps"]) == (kind, 4)
    assert 0 < found["computing"] <= 1
    assert 0 < found["accept_1"] < 1
    assert 1 < found["tokens"] < 3
    verify(place / kind)
    weights = (place / kind / "model.safetensors").read_bytes()

    assert run(monkeypatch, *options(place, kind)) == 0  # nothing is left to be done, and it says the same
    again = json.loads(capsys.readouterr().out)
    assert {k: again[k] for k in found} == found
    assert (place / kind / "model.safetensors").read_bytes() == weights

    named = {"draft": str(place / "draft"), "eagle1": f"eagle:{place / 'eagle1'}", "hydra": f"medusa:{place / 'hydra'}"}
    name = named.get(kind, kind)
    drafts = (name if kind == "eagle1" else str(place / kind), f"dynamic:6:{name}")
    assert_plain_text(place / "target", drafts, prompts=["the line"], length=2)
    config = json.loads((place / kind / "config.json").read_text())
    if "speculators_config" in config:
        assert config["speculators_config"]["verifier"]["name_or_path"] == str(place / "target")
    lines = [json.loads(line) for line in next((place / "work").rglob("metrics.jsonl")).read_text().splitlines()]
    assert lines[-1]["accept_1"] == found["accept_1"]


def test_a_training_goes_on_when_its_steps_grow(place: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, *options(place, "medusa")) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4
    assert run(monkeypatch, *options(place, "medusa"), "--steps", "7") == 0
    seen = capsys.readouterr()
    assert (
        json.loads(seen.out)["steps"] == 7 and "continuing from step-00000004" in seen.err and "grows to 7" in seen.err
    )
    assert run(monkeypatch, *options(place, "medusa")) == 0  # the short one is still there as it was
    assert json.loads(capsys.readouterr().out)["steps"] == 4


@pytest.mark.parametrize("has", [False, True])
def test_the_processor_chooses_the_products_and_the_other_choice_is_named(
    has: bool, place: Path, monkeypatch, capsys
) -> None:
    """bfloat16 where there are instructions for it. A training with other products is another one, and what lies there is said."""
    monkeypatch.setattr("outrider.train.job.multiplies_bfloat16", lambda: has)
    assert run(monkeypatch, *options(place, "medusa")) == 0
    assert "starts afresh" not in capsys.readouterr().err
    (about,) = (place / "work" / "medusa").glob("*/about.json")
    assert json.loads(about.read_text())["loop"]["autocast"] is has
    mine, other = ("--autocast", "--no-autocast") if has else ("--no-autocast", "--autocast")
    assert run(monkeypatch, *options(place, "medusa"), other) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"this starts afresh; {mine} goes on with a training that multiplies otherwise, from step-00000004" in said
    assert run(monkeypatch, *options(place, "medusa"), mine) == 0
    assert "starts afresh" not in capsys.readouterr().err and len(list(about.parent.parent.glob("*/about.json"))) == 2


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("medusa", ["--taps", "1,2"], "medusa does not read taps; hydra, eagle, dflash would"),
        ("eagle", ["--blocks", "2"], "eagle does not read blocks"),
        ("eagle1", ["--loss", "kl"], "eagle1 does not read loss"),
        ("draft", ["--anchors", "5", "--objective", "chain"], "draft does not read anchors, objective; dflash would"),
        ("dflash", ["--labels", "tokens", "--loss", "kl"], "leave the loss out"),
    ],
)
def test_a_choice_that_would_change_nothing_is_refused(kind, given, said, place: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, *options(place, kind), *given) == 2
    assert said in capsys.readouterr().err
    assert not (place / "work").exists()


def test_one_work_folder_holds_all_trainings(place: Path, monkeypatch, capsys) -> None:
    """Another kind, other layers, text, settings or weights of the target: a place of their own; equal text is written once."""

    def made(kind: str, *more: str) -> tuple[int, set[str], dict]:
        """Folders of data afterwards, and the report."""
        assert run(monkeypatch, *options(place, kind), *more) == 0
        seen = capsys.readouterr()
        folders = {p.name for p in (place / "work" / "data").iterdir()}
        return len(folders), folders, json.loads(seen.out) | {"said": seen.err}

    count, first, heads = made("medusa")
    assert count == 2 and {name.split("-")[0] for name in first} == {"training", "held_out"}
    count, _, layer = made("eagle")
    assert count == 2 and "text:" not in layer["said"], "the same text: it is not written again"
    assert "hidden states:" in layer["said"], "of other layers"
    assert "hidden states:" not in made("medusa")[2]["said"]
    assert made("medusa", "--rows", "10")[0] == 3, "the held-out part is the same"
    assert made("medusa", "--temperature", "0.5")[0] == 5
    (place / "texts" / "3.txt").write_text("\n".join(f"another text, line {j}" for j in range(60)))
    assert made("medusa")[0] == 6, "text that is trained on: the held-out part is the same"
    make_checkpoint(place / "target", "llama", tokenizer=True, seed=1)
    count, _, other = made("medusa")
    assert count == 8 and other["accept_1"] != heads["accept_1"]


def test_wrong_input_is_refused(place: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, *options(place, "hydras")) == 2
    assert "unknown drafter to train 'hydras'" in capsys.readouterr().err
    assert run(monkeypatch, *options(place, "eagle"), "--taps", "9") == 2
    assert "taps (9,)" in capsys.readouterr().err
    assert run(monkeypatch, *options(place, "dflash"), "--width", "32") == 2
    assert "as wide as its target" in capsys.readouterr().err
    assert run(monkeypatch, *options(place, "dflash"), "--objective", "chian") == 2
    assert "chain" in capsys.readouterr().err
    assert run(monkeypatch, *options(place, "medusa"), "--loss", "hybird") == 2
    assert "did you mean 'hybrid'" in capsys.readouterr().err
    assert run(monkeypatch, *options(place, "draft"), "--width", "40") == 2
    assert "multiple of 32" in capsys.readouterr().err
    bad = place / "rows.jsonl"
    bad.write_text('{"text": "one"}\nnot a row\n')
    assert run(monkeypatch, *options(place, "draft"), "--data", str(bad)) == 2
    assert "rows.jsonl:2" in capsys.readouterr().err
    assert run(monkeypatch, *options(place, "medusa"), "--data", str(place / "nowhere")) == 2
    assert "no such file" in capsys.readouterr().err
