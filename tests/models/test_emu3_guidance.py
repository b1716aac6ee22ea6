"""Guidance of Emu3, whose text without a condition has another length: transformers' own `generate` is the oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.jacobi import Jacobi
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.errors import ConfigError
from outrider.evaluate.generated import open_generator
from outrider.evaluate.images import Painter, load_painter
from outrider.models.hf.generators import load_generator
from outrider.params import SamplingParams
from outrider.types import Draft, Rows
from outrider.verify import load_rule
from tests.checkpoints_generators import emu3_written, generator, noisy

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


@pytest.mark.parametrize("negative", NEGATIVES)
def test_the_guided_greedy_image_is_transformers_own_plain_and_drafted(folder: Path, negative: str | None) -> None:
    """Two descriptions of different lengths at a time."""
    wanted = [written(folder, w, negative, 3.0).sequences[0].tolist()[-18:] for w in (WORDS, OTHER)]
    assert wanted[0] != wanted[1]
    assert wanted[0] != painter_of(folder, guidance=1.0).draw([(WORDS, 0)], temperature=0.0)[0].tokens
    for draft in ("none", "ngram", "jacobi:4", "jacobi:4:up4", "recycle", str(folder), f"tree:2x1x1:{noisy(folder)}"):
        painter = painter_of(folder, draft, negative=negative)
        drawings = painter.draw([(WORDS, 1), (OTHER, 2), (WORDS, 3)], temperature=0.0)
        assert [d.tokens for d in drawings] == [*wanted, wanted[0]], draft
        assert draft in ("none", "ngram") or painter.engine.counts.proposed > 0
        if draft == str(folder):  # guided as the target is
            assert painter.engine.counts.accepted == painter.engine.counts.judged > 20


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


@pytest.mark.parametrize("draft", ["ngram", "jacobi:4", "recycle", "own"])
@pytest.mark.parametrize("negative", [None, NEGATIVES[-1]])
def test_with_match_a_guided_drafted_image_is_the_plain_one(folder: Path, draft: str, negative: str | None) -> None:
    jobs = [(w, i) for i, w in enumerate((WORDS, OTHER, WORDS))]
    options: dict[str, Any] = {"rule": "match", "negative": negative}
    plain = painter_of(folder, slots=1, **options).draw(jobs)
    drafted = painter_of(folder, str(noisy(folder)) if draft == "own" else draft, slots=2, **options).draw(jobs)
    assert [d.tokens for d in drafted] == [d.tokens for d in plain]
    assert len({tuple(d.tokens) for d in plain}) == 3


@pytest.mark.parametrize("negative", [None, NEGATIVES[-1]])
def test_pictures_are_the_same_in_chunks_and_where_pages_run_out(folder: Path, negative: str | None) -> None:
    """Pictures of 72 tokens, prompts in chunks of 16 rows, and pages (32 KB) for little more than a picture with its free text."""
    opened = open_generator(folder, 3.0, "float32", (8, 8), negative)
    prompts = [opened.code.prompt(w) for w in (WORDS, OTHER, "c")]
    params = [SamplingParams(max_tokens=72, ignore_eos=True, seed=i) for i in range(3)]

    def texts(drafter: Any, slots: int, chunk: int, memory: float | None) -> tuple[list[Any], int]:
        one = Engine(
            opened.target, drafter, load_rule("match"), Fixed(4), slots=slots, max_length=160, chunk=chunk,
            prefix_cache=False, kv_memory=memory,
        )  # fmt: skip
        found = [r.outputs[0].token_ids for r in one.generate(prompts, params)]
        assert one.defects == 0
        return found, one.state.room.sums.preempted

    plain, _ = texts(NoDraft(), 1, 256, None)
    assert texts(Jacobi(4, opened.target.vocab_size, columns=9), 3, 16, None)[0] == plain
    few = 8 * 32768 / 1e9
    for drafter in (NoDraft(), Jacobi(4, opened.target.vocab_size, columns=9)):
        found, preempted = texts(drafter, 3, 16, few)
        assert found == plain
        assert preempted > 0
    drafted, _ = texts(
        ModelDrafter(opened.draft(str(noisy(folder))), 4), 3, 16, 2.5 * few
    )  # which has a cache of its own
    assert drafted == plain


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
