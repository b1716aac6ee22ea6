"""The whole recipe, all stages, on a corpus of a few hundred lines and models of a few thousand weights."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from outrider.train import data
from outrider.train.loop import LoopConfig

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def pycode(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import pycode

    yield pycode
    for name in ("pycode", "pycode_card", "pycode_models"):
        sys.modules.pop(name, None)


def corpus(root: Path) -> None:
    """Files enough that some are held out by the same rule as in earnest."""
    for number in range(120):
        lines = [f"def function_{n}(first, second):\n    return first + second * {number}\n\n" for n in range(60)]
        (root / f"module_{number}.py").write_text(
            "".join(lines if data.is_held_out(f"module_{number}.py") else lines[:8])
        )


def tiny(pycode, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    corpus(source)
    shape = pycode.Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, intermediate=24)
    loop = LoopConfig(steps=3, lr=1e-3, warmup=1, log_every=1)
    return pycode.Config(
        work=tmp_path / "work",
        assets=tmp_path / "assets",
        source=source,
        vocabulary=300,
        context=256,
        length=64,
        rows=2,
        draft_rows=2,
        label_windows=6,
        evaluated_windows=4,
        evaluated_length=32,
        small=shape,
        growth=2,
        draft=replace(shape, hidden=8),
        seed_loop=loop,
        target_loop=loop,
        draft_ce_loop=loop,
        draft_loop=loop,
    )


def test_all_stages_in_order_and_again(pycode, tmp_path):
    config = tiny(pycode, tmp_path)
    pycode.main(config, pycode.STAGES)
    card = (config.assets / "README.md").read_text()
    assert "2 layers of 16" in card
    assert "Acceptance" in card
    prompts = [json.loads(line) for line in (config.assets / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 64
    assert all(data.is_held_out(row["source"]) for row in prompts)
    pair = pycode.load_pair(config.assets)
    assert pair["target"].config.num_hidden_layers == 2
    before = (config.assets / "target" / "model.safetensors").read_bytes()
    pycode.main(
        replace(config, baseline=config.work / "pair"), pycode.STAGES
    )  # finished stages continue to the same end
    assert (config.assets / "target" / "model.safetensors").read_bytes() == before
    assert "| baseline target |" in (config.assets / "README.md").read_text()


def test_a_stage_without_its_predecessor_says_which_to_run(pycode, tmp_path):
    with pytest.raises(SystemExit, match="run the stage 'target'"):
        pycode.trained(pycode.Config().draft, "target", pycode.Config(work=tmp_path))


def test_flags_reach_the_configuration(pycode):
    config, stages = pycode.parse(["target", "--steps", "7", "--lr", "0.5", "--rows", "3"])
    assert (config.target_loop.steps, config.target_loop.lr, config.rows, stages) == (7, 0.5, 3, ("target",))
