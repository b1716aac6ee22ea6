"""The chart preset: arms as data, absent ones named, measured and predicted bars apart, predictions from the theory's formulas."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from outrider.build import build_engine
from outrider.cli.main import main
from outrider.drafters.medusa.format import MedusaConfig
from outrider.errors import ConfigError
from outrider.evaluate.bench.chart import measured
from outrider.evaluate.bench.presets import PRESETS, Spec, arms_of, by_length, present, preset, rivals
from outrider.evaluate.bench.scale import Measured, carry_over, devices_for, drafter_of, predict_arm, survival
from outrider.evaluate.records import Record
from outrider.evaluate.statistics.ratios import Ratio, ratio_of_sums
from outrider.models.load import load_target
from outrider.records import PHASES, Counts
from outrider.theory.hardware import HARDWARE, MODELS
from outrider.theory.roofline import Setting, forward
from outrider.theory.speedup import tokens_per_call_by_position
from outrider.train.methods.medusa import new_heads
from tests.checkpoints import make_checkpoint

H100 = HARDWARE["h100"]
MODEL_ARM = Spec("draft model, 3", "DRAFT", 3)


def counts(accepted: list[int], length: int = 3) -> Counts:
    """Counts of one step per number of accepted drafts."""
    out = Counts()
    for a in accepted:
        out.add(length, a, min(a + 1, length), 0.0, 0.0, 0.0)
    return out


def record(group: int, accepted: list[int], seconds: float = 1.0, arm: str = "draft model, 3") -> Record:
    c = counts(accepted)
    return Record(arm, group, 0, 0, c.accepted + c.steps, seconds, dict.fromkeys(PHASES, 0.25), c, 0)


def test_survival_is_exactly_the_tokens_per_step() -> None:
    for accepted in ([0, 0, 0], [3, 3], [0, 1, 2, 3, 1, 0], [1]):
        c = counts(accepted)
        found = survival(c)
        assert all(0 < a <= 1 for a in found)
        tokens = tokens_per_call_by_position(found) if found else 1.0
        assert tokens == pytest.approx((c.accepted + c.steps) / c.steps)


def test_rows_are_ratios_of_sums() -> None:
    records = [record(0, [0, 3], 2.0), record(1, [1, 1, 1], 3.0), record(0, [2], 1.0)]
    (row,) = measured([MODEL_ARM], records)
    assert row.tokens_per_second.value == pytest.approx((5 + 6 + 3) / 6.0)
    assert row.acceptance_length.value == pytest.approx(14 / 6)
    assert row.draft_ms == pytest.approx(1e3 * 0.75 / 6)
    assert row.acceptance_length.low < row.acceptance_length.value < row.acceptance_length.high
    assert measured([Spec("absent", "none", 0)], records) == []


def test_interval_of_a_ratio_covers() -> None:
    """400 samples of 12 prompts: the interval that claims 95% holds the true ratio in at least 90% of them (sd 1.1 points)."""
    draw = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        steps = torch.randint(20, 60, (12,), generator=draw).double()
        tokens = steps * (2.0 + 0.4 * torch.randn(12, generator=draw, dtype=torch.float64))
        found = ratio_of_sums(tokens.numpy(), steps.numpy())
        held += found.low <= 2.0 <= found.high
    assert held >= 360


def arm(cost: str, tokens: float = 3.0, length: int = 4, nodes: float = 4.0, share: float = 0.05) -> Measured:
    return Measured(Spec("x", "x", length, cost), (0.7,), Ratio(tokens, tokens - 0.1, tokens + 0.1), nodes, share)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["7b", "13b", "70b"])
def test_predictions_are_the_rooflines(size: str) -> None:
    target = MODELS[size]
    devices = devices_for(target, H100, 1024)
    assert devices == (2 if size == "70b" else 1)
    setting = Setting(H100, context=1024, devices=devices)
    plain = predict_arm(Measured(Spec("plain", "none", 0, "nothing"), (), Ratio(1.0, 1.0, 1.0), 0.0), size, H100)
    assert (
        plain.tokens_per_second.value
        == pytest.approx(plain.plain)
        == pytest.approx(1 / forward(target, setting).seconds)
    )
    free = predict_arm(arm("nothing"), size, H100)
    assert free.draft_seconds == 0.0
    assert free.tokens_per_second.value == pytest.approx(3.0 / forward(target, setting, 5).seconds)
    for cost in ("model", "layer", "heads", "sequence", "block"):
        found, better = predict_arm(arm(cost), size, H100), predict_arm(arm(cost, tokens=3.5), size, H100)
        assert found.predicted
        assert 0 < found.draft_seconds < found.verify_seconds
        assert found.tokens_per_second.low < found.tokens_per_second.value < better.tokens_per_second.value
    chain, block = predict_arm(arm("layer"), size, H100), predict_arm(arm("block"), size, H100)
    assert chain.draft_seconds == pytest.approx(4 * block.draft_seconds)


def test_drafters_of_a_large_target() -> None:
    """A draft model keeps its share; a layer is the target's own, and all layers and both tables make the whole."""
    target = MODELS["7b"]
    model, passes = drafter_of(target, arm("model"))
    assert model is not None and passes == 4
    assert model.parameters == pytest.approx(0.05 * target.parameters, rel=1e-6)
    layer, _ = drafter_of(target, arm("layer"))
    table = 32_000 * 4096
    assert layer is not None
    assert target.layers * (layer.parameters - table) + 2 * table == pytest.approx(target.parameters)
    assert drafter_of(target, arm("nothing")) == (None, 0)


def test_presets_are_data() -> None:
    assert PRESETS["chart"][0] == Spec("plain", "none", 0, "nothing")
    assert [s.length for s in by_length([0, 2, 4])] == [0, 2, 4]
    with pytest.raises(ConfigError, match="did you mean 'chart'"):
        preset("chrat")


def test_arms_are_compared_with_the_draft_models_of_a_preset_or_with_those_that_are_named() -> None:
    assert rivals(PRESETS["chart"]) == ("draft model, 3", "draft model, 5")
    assert rivals(by_length([0, 2])) == ()
    assert rivals(PRESETS["chart"], ["EAGLE, chain", "plain", "plain"]) == ("EAGLE, chain", "plain")
    with pytest.raises(ConfigError, match="did you mean 'EAGLE, chain'"):
        rivals(PRESETS["chart"], ["EAGLE, chian"])
    present(["plain"], {"Medusa": "no folder"})
    with pytest.raises(ConfigError, match="'Medusa': no folder"):
        present(["plain", "Medusa"], {"Medusa": "no folder"})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A target with a draft and heads beside it, and nothing else."""
    make_checkpoint(tmp_path / "target", "llama", tokenizer=True)
    make_checkpoint(tmp_path / "draft", "llama", tokenizer=True, seed=1, num_hidden_layers=1)
    target = load_target(tmp_path / "target", dtype="float32")
    new_heads(MedusaConfig(48, target.vocab_size, 4, target.layers), target).save(tmp_path / "medusa")
    return tmp_path


def test_arms_that_cannot_be_had_are_named(place: Path) -> None:
    engine = build_engine(place / "target", "none", dtype="float32", slots=1, max_length=64)
    arms, absent = arms_of(engine, PRESETS["chart"])
    assert [a.name for a in arms] == ["plain", "draft model, 3", "draft model, 5", "Medusa", "n-gram", "suffix"]
    assert set(absent) == {"EAGLE, chain", "EAGLE, dynamic tree", "block diffusion"}
    assert "companion folder 'eagle'" in absent["EAGLE, chain"]
    assert arms[1].engine.parts.drafter.max_depth == 3


def test_the_command_draws_both_charts(place: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    (place / "prompts.txt").write_text("the first line\nanother line\nand a third\n")
    argv = [
        "outrider", "bench", "--preset", "chart", "--target", str(place / "target"), "--prompts", str(place / "prompts.txt"),
        "--count", "3", "--repeats", "1", "--max-tokens", "12", "--warmup", "0", "--dtype", "float32", "--max-length", "64",
        "--figures", str(place / "figures"), "--html", str(place / "report.html"), "--json",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr()
    assert int(end.value.code or 0) == 0
    found = json.loads(out.out)
    assert "EAGLE, chain: absent" in out.err.replace("\n", " ")
    names = [row["name"] for row in found["arms"]]
    assert names == [row["name"] for row in found["chart"]["measured"]]
    assert names[0] == "plain" and "Medusa" in names
    assert {b["target"] for b in found["chart"]["predicted"]["bars"]} == {"7b", "13b", "70b"}
    assert all(b["predicted"] for b in found["chart"]["predicted"]["bars"])
    assert sorted(Path(f).name for f in found["chart"]["files"]) == [
        "measured.png", "measured.svg", "predicted.png", "predicted.svg",
    ]  # fmt: skip
    predicted, page = (place / "figures" / "predicted.svg").read_text(), (place / "report.html").read_text()
    assert "PREDICTED" in predicted
    assert "PREDICTED" not in (place / "figures" / "measured.svg").read_text()
    assert page.count("<figure") == 2
    for name in ("draft model, 3", "draft model, 5"):  # what a preset's other arms are compared with
        assert all((name in row["against"]) == (row["name"] != name) for row in found["arms"])
        assert f"<h2>Speed over {name}</h2>" in page
    heads = next(row for row in found["arms"] if row["name"] == "Medusa")["against"]["draft model, 5"]
    speeds = {row["name"]: row["tokens_per_second"] for row in found["arms"]}
    assert heads["value"] == pytest.approx(speeds["Medusa"] / speeds["draft model, 5"])
    assert heads["low"] <= heads["value"] <= heads["high"]
    assert "<?xml" not in page


@pytest.mark.parametrize(
    "wrong", [["--figures", "x"], ["--preset", "chart", "--hardware", "toaster"], ["--against", "length 3"]]
)
def test_wrong_use_is_refused(wrong: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["outrider", "bench", *wrong])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("outrider: ")


def test_carry_over_takes_the_interval_from_the_prompts() -> None:
    records = [record(g, [g % 4, 2, 1]) for g in range(8)]
    found = carry_over(MODEL_ARM, records, 0.1)
    assert found.tokens.low < found.tokens.value < found.tokens.high
    assert found.nodes == 3.0
