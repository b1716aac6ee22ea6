"""Guidance: the mixed distribution is that of two plain runs, in any batch, with every way to draft, and caches stay in step."""

from __future__ import annotations

import pytest
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.jacobi import Jacobi
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.errors import ConfigError
from outrider.models.guided import Guided
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.types import Draft, Rows
from outrider.verify import load_rule

V, CLASSES, NULL = 19, (15, 16), 17
MODEL = TinyLM(V, 16, 2, seed=4, sharp=3.0)
FREE = dict.fromkeys(CLASSES, NULL)


def logits_after(text: list[int]) -> torch.Tensor:
    return MODEL.forward(Rows.assemble([0], [text], [0], Draft.empty(1)), MODEL.new_kv(1, 40)).logits[0]


def mixed(text: list[int], scale: float) -> torch.Tensor:
    """The definition, from two plain forwards of the whole text."""
    given, free = logits_after(text), logits_after([FREE.get(t, t) for t in text])
    return free + scale * (given - free)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
def test_rows_of_a_tree_are_mixed_as_defined(scale: float) -> None:
    """Two texts, a chunk that is not scored, and trees with siblings: every scored row, and hidden states of the conditioned."""
    guided = Guided(MODEL, FREE, scale)
    kv = guided.new_kv(3, 40)
    texts = [[15, 3, 4], [16, 2], [15, 7, 8, 9]]
    draft = Draft.join([([5, 6, 1], [-1, -1, 0]), ([4], [-1])])
    rows = Rows.assemble([0, 2, 1], texts, [0, 0, 0], draft, [True, True, False])
    kv.reserve(rows)
    scores = guided.forward(rows, kv, layers=(2,))
    paths = [texts[0], texts[1], [*texts[0], 5], [*texts[0], 6], [*texts[0], 5, 1], [*texts[1], 4]]
    for row, path in zip(scores.logits, paths, strict=True):
        assert torch.allclose(row, mixed(path, scale), atol=1e-10)
    assert scores.hidden[0].shape == (rows.count, 16)
    kv.commit(rows, [[1], [0], []])
    assert kv.length == [4, 4, 3]
    assert kv.inner.length == [4, 4, 3] * 2
    again = Rows.assemble([0, 2, 1], [[8], [9], [1]], [kv.length[0], kv.length[2], kv.length[1]], Draft.empty(3))
    found = guided.forward(again, kv).logits
    for row, path in zip(found, ([*texts[0], 6, 8], [*texts[1], 4, 9], [*texts[2], 1]), strict=True):
        assert torch.allclose(row, mixed(path, scale), atol=1e-10)
    kv.truncate(0, 1)
    kv.release([1, 2])
    assert kv.inner.length == [1, 0, 0] * 2


@pytest.mark.parametrize("kind", ["model", "jacobi", "tree"])
def test_drafted_texts_are_those_of_plain_guided_decoding(kind: str) -> None:
    guided = Guided(MODEL, FREE, 2.0)
    params = [SamplingParams(max_tokens=14, seed=i, logit_bias=dict.fromkeys(range(15, V), -100.0)) for i in range(5)]
    prompts = [[15], [16], [NULL], [16], [15]]

    def texts(drafter, slots: int) -> list[tuple[int, ...]]:
        one = Engine(guided, drafter, load_rule("match"), Fixed(4), slots=slots, max_length=40)
        results = one.generate(prompts, params)
        assert one.defects == 0
        return [r.outputs[0].token_ids for r in results]

    draft = Guided(MODEL.perturbed(0.3, seed=1), FREE, 2.0)
    drafter = {
        "model": lambda: ModelDrafter(draft, 4, sample="coupled"),
        "jacobi": lambda: Jacobi(4, V, columns=3),
        "tree": lambda: ModelDrafter(draft, 3, branching=(2, 1, 2)),
    }[kind]()
    plain = texts(NoDraft(), 1)
    assert texts(drafter, 3) == plain
    assert all(max(t) < 15 for t in plain)


def test_bad_scales_and_tokens_are_refused() -> None:
    for free, scale, words in (
        (FREE, -1.0, "from 0 to 100"),
        (FREE, float("nan"), "from 0"),
        ({15: V}, 1.0, "outside"),
    ):
        with pytest.raises(ConfigError, match=words):
            Guided(MODEL, free, scale)
