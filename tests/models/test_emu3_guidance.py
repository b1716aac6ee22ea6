"""Guidance of Emu3, whose text without a condition has another length: transformers' own `generate` is the oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.errors import ConfigError
from outrider.evaluate.generated import open_generator
from outrider.evaluate.images import Painter, load_painter
from outrider.models.hf.generators import load_generator
from outrider.types import Draft, Rows
from tests.checkpoints_generators import emu3_written, generator

SIZE = (3, 5)
WORDS, OTHER = "a red boat", "another picture, of which more is said"
NEGATIVES = [None, "", "blurry", "low resolution, blurry, text, signature, worst quality"]
"""None: the mark alone. One is shorter than what is asked for, one longer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return generator("emu3", tmp_path_factory.mktemp("emu3"))


def written(folder: Path, words: str, negative: str | None, scale: float, **options: Any) -> Any:
    """Transformers' own guided image."""
    prompt = load_generator(folder, torch.float32, SIZE).prompt
    if negative is not None:
        ids = torch.tensor([prompt(negative)])
        options |= {"negative_prompt_ids": ids, "negative_prompt_attention_mask": torch.ones_like(ids)}
    return emu3_written(folder, prompt(words), SIZE, guidance_scale=scale, **options)[0]


def painter_of(folder: Path, draft: str = "none", **options: Any) -> Painter:
    options = {"dtype": "float32", "size": SIZE, "guidance": 3.0, "length": 0 if draft == "none" else 4} | options
    return load_painter(folder, draft, **options)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("negative", NEGATIVES)
def test_the_distribution_is_the_processors(folder: Path, negative: str | None, scale: float) -> None:
    """At every place, within rounding of float32 (0.0002 nats)."""
    made = written(folder, WORDS, negative, scale, output_scores=True)
    opened = open_generator(folder, scale, "float32", SIZE, negative)
    text = made.sequences[0].tolist()
    start, kv = len(text) - 18, opened.target.new_kv(1, len(text) + 8)
    for first, end in ((0, 5), (5, start)):  # the prompt in two chunks, then tokens one by one and four at a time
        rows = Rows.assemble([0], [text[first:end]], [first], Draft.empty(end == start), [end == start])
        scores = opened.target.forward(rows, kv)
        kv.commit(rows, [()])
    found, at = [scores.logits], start
    while at < len(text) - 1:
        ahead = text[at + 1 : at + 1 + (0 if at % 2 else 4)]
        rows = Rows.assemble([0], [[text[at]]], [at], Draft.join([(ahead, range(-1, len(ahead) - 1))]))
        found.append(opened.target.forward(rows, kv).logits)
        kv.commit(rows, [range(len(ahead))])
        at += 1 + len(ahead)
    ours = torch.cat(found)[: len(made.scores)].log_softmax(-1)
    theirs = torch.cat(made.scores).log_softmax(-1)
    codes = theirs > -1e30
    assert torch.equal(codes, ours > -1e30)
    assert len(ours) == 18
    assert (ours[codes] - theirs[codes]).abs().max() < 2e-4


def test_its_own_scale_is_that_of_the_folder(folder: Path, tmp_path: Path) -> None:
    assert load_generator(folder, torch.float32, SIZE).guidance == 1.0
    place = Path(shutil.copytree(folder, tmp_path / "emu3"))
    path = place / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "guidance_scale": 3.0}))
    assert load_generator(place, torch.float32, SIZE).guidance == 3.0
    wanted = painter_of(folder, negative="blurry").draw([(WORDS, 0)])
    assert painter_of(place, guidance=None, negative="blurry").draw([(WORDS, 0)])[0].tokens == wanted[0].tokens
    with pytest.raises(ConfigError, match="from 0 to 100"):
        painter_of(folder, guidance=101.0)
