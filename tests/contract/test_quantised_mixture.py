"""A quantised pair of mixtures of experts goes through the contracts like any other: the text of plain decoding with every rule.

The target's weights are in blocks of q8_0, the draft's the same ones in q4_0: near enough for drafts to be accepted, far enough for
others to be rejected.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch

from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.model.early_exit import early_exit
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.models.decoder import Experts
from outrider.models.lean import LeanTarget
from outrider.models.native.build import load_library
from outrider.models.quantised import quantised
from outrider.protocols import Drafter
from outrider.verify import LOSSLESS, load_rule
from tests.contract.asked import PROMPTS, VOCAB, engine, params, tokens
from tests.covering import covering, slow_beyond
from tests.models.test_native import random_weights, shape

pytestmark = pytest.mark.skipif(load_library() is None, reason="products in blocks need a C++ compiler")
CONFIG = shape(vocab_size=VOCAB, layers=2, experts=Experts(6, 2, 32, True, (True, True)))
DRAWN = ("model", "tree", "early", "ngram")
KINDS = ("greedy", "temperature 1", "top-p with penalties")
CASES = list(product(DRAWN, KINDS, (6, 3)))


@cache
def model(kind: str) -> LeanTarget:
    return LeanTarget(CONFIG, quantised(random_weights(CONFIG, (), torch.float32), kind))


def drafter(name: str) -> Drafter:
    if name == "ngram":
        return NGram(3)
    if name == "early":
        return early_exit(model("q8_0"), 1, Levels(levels((1,) * 3), VOCAB))
    return ModelDrafter(model("q4_0"), 3, **({"branching": (2, 2, 1)} if name == "tree" else {}))


@cache
def plain(sampling: str) -> list[tuple[int, ...]]:
    """One request at a time, nothing proposed."""
    one = [engine(model("q8_0"), NoDraft(), load_rule("match"), 1) for _ in PROMPTS]
    return [t for e, q, p in zip(one, PROMPTS, params(sampling), strict=True) for t in tokens(e.generate([q], [p]))]


@pytest.mark.parametrize(("name", "sampling", "capacity"), slow_beyond(CASES, covering(CASES)))
def test_match_equals_plain_decoding(name: str, sampling: str, capacity: int) -> None:
    one = engine(model("q8_0"), drafter(name), load_rule("match"), capacity)
    assert tokens(one.generate(PROMPTS, params(sampling))) == plain(sampling)
    assert name == "ngram" or min(one.counts.accepted, one.counts.rejected) > 0


@pytest.mark.parametrize("rule", sorted(LOSSLESS))
def test_greedy_text_is_that_of_plain_decoding_with_every_rule(rule: str) -> None:
    judge = load_rule(rule)
    for name in ("tree", "model") if judge.trees else ("model",):
        one = engine(model("q8_0"), drafter(name), judge, 3)
        assert tokens(one.generate(PROMPTS, params("greedy"))) == plain("greedy")


def test_control_the_draft_says_something_else() -> None:
    """Negative control: were the draft's weights the target's, nothing would have been tried."""
    found = engine(model("q4_0"), NoDraft(), load_rule("match"), 6).generate(PROMPTS, params("temperature 1"))
    assert tokens(found) != plain("temperature 1")
