"""Drafted images of transformers' models: its own greedy ones, and the plain ones of the same noise.

Apart from test_generators.py, whose calls are checked for shapes and types in `make test`: these make the same calls thousands of
times, and are checked in `make test-slow`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints_generators import generator, noisy
from tests.models.test_generators import WORDS, own_codes, painter_of

DRAFTS = ["ngram", "jacobi:4", "jacobi:4:up4", "recycle"]


@pytest.fixture(scope="module", params=["janus", "emu3"])
def folder(request, tmp_path_factory) -> Path:
    return generator(request.param, tmp_path_factory.mktemp(request.param))


def test_the_greedy_image_is_transformers_own_plain_and_drafted(folder: Path) -> None:
    wanted, _ = own_codes(folder)
    for draft in ("none", *DRAFTS):
        painter = painter_of(folder, draft)
        drawing, other = painter.draw([(WORDS, 1), ("another", 2)], temperature=0.0)
        assert drawing.tokens == wanted, draft
        assert other.tokens != wanted
        assert draft == "none" or painter.engine.counts.proposed > 0


def test_with_match_a_drafted_image_is_the_plain_one(folder: Path) -> None:
    jobs = [(WORDS, i) for i in range(3)]
    plain = [d.tokens for d in painter_of(folder, rule="match").draw(jobs)]
    assert len(set(map(tuple, plain))) == 3
    for draft in DRAFTS:
        assert [d.tokens for d in painter_of(folder, draft, rule="match").draw(jobs)] == plain, draft


def test_a_model_as_its_own_draft_is_never_refused(folder: Path) -> None:
    painter = painter_of(folder, str(folder), rule="block")
    painter.draw([(WORDS, i) for i in range(3)])
    counts = painter.engine.counts
    assert counts.judged == counts.accepted > 20


@pytest.mark.parametrize("rule", ["neighbours:delta=0.3,k=4", "cluster:k=6,gap=0.3,near=0.5"])
def test_rules_of_nearness_spend_what_they_may_and_no_more(folder: Path, rule: str) -> None:
    """With a draft of other weights: some bias, none of it where a mark ends a row, and never more than the budget."""
    other = noisy(folder)
    options = {"rule": f"{rule},per_token=0.1,per_sequence=0.5", "allow_lossy": True, "slots": 2}
    painter = painter_of(folder, str(other), **options)
    drawings = painter.draw([(WORDS, i) for i in range(4)])
    counts, frame = painter.engine.counts, painter.raster.frame  # type: ignore[attr-defined]
    assert 0 < counts.bias <= 4 * 0.5 + 1e-9
    assert counts.rejected > 0
    for drawing in drawings:
        codes = frame.codes_of(drawing.tokens)
        assert bool(frame.codes[codes].all())
        assert [t for t in drawing.tokens if not frame.codes[t]] == [frame.row_end] * (len(drawing.tokens) - len(codes))
