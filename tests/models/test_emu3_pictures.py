"""Guided pictures of Emu3: the greedy ones are those of transformers, and all are the same whatever drafts and feeds them.

Apart from test_emu3_guidance.py, whose calls are checked for shapes and types in `make test`: these make the same calls thousands
of times, and are checked in `make test-slow`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.jacobi import Jacobi
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.evaluate.generated import open_generator
from outrider.params import SamplingParams
from outrider.verify import load_rule
from tests.checkpoints_generators import generator, noisy
from tests.models.test_emu3_guidance import NEGATIVES, OTHER, WORDS, painter_of, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return generator("emu3", tmp_path_factory.mktemp("emu3"))


DRAFTS = ("none", "ngram", "jacobi:4", "jacobi:4:up4", "recycle", "own", "tree")
FEW = ("none", "jacobi:4:up4", "own")
"""What drafts beside the two negative prompts that are neither missing nor the longest; the rest follow in `make test-slow`."""
GREEDY = [
    pytest.param(negative, drafts, marks=pytest.mark.slow if late else (), id=f"{negative}-{len(drafts)}")
    for negative in NEGATIVES
    for drafts, late in (
        [(DRAFTS, False)]
        if negative in (None, NEGATIVES[-1])
        else [(FEW, False), (tuple(d for d in DRAFTS if d not in FEW), True)]
    )
]


@pytest.mark.parametrize(("negative", "drafts"), GREEDY)
def test_the_guided_greedy_image_is_transformers_own_plain_and_drafted(
    folder: Path, negative: str | None, drafts: tuple[str, ...]
) -> None:
    """Two descriptions of different lengths at a time."""
    wanted = [written(folder, w, negative, 3.0).sequences[0].tolist()[-18:] for w in (WORDS, OTHER)]
    assert wanted[0] != wanted[1]
    assert wanted[0] != painter_of(folder, guidance=1.0).draw([(WORDS, 0)], temperature=0.0)[0].tokens
    for draft in drafts:
        spec = {"own": str(folder), "tree": f"tree:2x1x1:{noisy(folder)}"}.get(draft, draft)
        painter = painter_of(folder, spec, negative=negative)
        drawings = painter.draw([(WORDS, 1), (OTHER, 2), (WORDS, 3)], temperature=0.0)
        assert [d.tokens for d in drawings] == [*wanted, wanted[0]], draft
        assert draft in ("none", "ngram") or painter.engine.counts.proposed > 0
        if draft == "own":  # guided as the target is
            assert painter.engine.counts.accepted == painter.engine.counts.judged > 20


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
