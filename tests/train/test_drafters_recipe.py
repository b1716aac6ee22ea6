"""The recipe of the shipped drafters, all stages, in small: folders that verify, cards and a table of what was measured."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from outrider.train.checkpoint import verify
from outrider.train.loop import LoopConfig
from tests.checkpoints import make_checkpoint

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import drafters

    yield drafters
    sys.modules.pop("drafters", None)


def test_all_stages_in_order_and_again(recipe, tmp_path: Path, monkeypatch) -> None:
    make_checkpoint(tmp_path / "pair" / "target", "llama", tokenizer=True, max_position_embeddings=512)
    source = tmp_path / "source"
    source.mkdir()
    for i in range(8):
        (source / f"{i}.py").write_text("\n".join(f"def f{j}(): return {i * j}" for j in range(60)))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{recipe.BEGIN}\nold\n{recipe.END}\nafter\n")
    monkeypatch.setattr(recipe, "shipped_prompts", lambda: ["def f0(): ", "return 1", "def g"])
    loop = LoopConfig(steps=3, lr=1e-3, warmup=1)
    config = recipe.Config(
        work=tmp_path / "work", assets=tmp_path / "pair", docs=page, source=source, rows=8, held_out=4, prompt=8, length=24,
        width=32, levels=2, slots=3, anchors=4, medusa=loop, eagle=loop, dflash=loop, count=2, tokens=6, repeats=1,
    )  # fmt: skip
    recipe.main(config, recipe.STAGES)
    for kind in recipe.KINDS:
        verify(tmp_path / "pair" / kind)
        card = (tmp_path / "pair" / kind / "README.md").read_text()
        assert "3 steps" in card
        assert str(tmp_path) not in (tmp_path / "pair" / kind / "config.json").read_text(), "a path of this machine"
        assert "| acceptance, sum min(p, q), temperature 1 | 0." in card
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| plain | 0 | 1 |" in text and "| Medusa | 1 | " in text and "| EAGLE, dynamic tree | 0 | " in text
    assert "| block diffusion | 1 | " in text
    weights = (tmp_path / "pair" / "eagle" / "model.safetensors").read_bytes()
    # a training not at hand, and one stopped before its end
    for name, work in (("medusa", "hydra"), ("eagle", "eagle")):
        (config.work / work).rename(tmp_path / work)
        before = (tmp_path / "pair" / name / "README.md").read_text()
        recipe.main(config, ("cards",))
        assert (tmp_path / "pair" / name / "README.md").read_text() == before
        (tmp_path / work).rename(config.work / work)
    recipe.main(replace(config, dflash=replace(loop, steps=5)), ("cards",))
    assert "3 steps" in (tmp_path / "pair" / "dflash" / "README.md").read_text()
    recipe.main(config, ("eagle",))  # nothing is left to be done
    assert (tmp_path / "pair" / "eagle" / "model.safetensors").read_bytes() == weights


def test_flags_reach_the_configuration(recipe) -> None:
    assert recipe.parse(["measure", "cards"])[1] == ("measure", "cards")
    config, stages = recipe.parse(["eagle", "--steps", "7", "--rows", "3", "--no-docs"])
    assert tuple(getattr(config, kind).steps for kind in recipe.KINDS) == (7, 7, 7)
    assert (config.rows, config.docs, stages) == (3, None, ("eagle",))
