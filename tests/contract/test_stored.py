"""A target whose keys and values are codes of 8 bits goes through the contracts like any other: it *is* the model with that cache.

False-alarm probability 1e-9 per assertion (chi-square, no reruns).
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

from outrider.build import Engine
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.drafters.sparse import Sparse, SparseDrafter
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.models.toy import TinyLM
from outrider.protocols import Drafter
from outrider.types import Draft, Rows
from outrider.verify import load_rule
from tests.contract.asked import PROMPTS, engine, params, target, tokens
from tests.contract.drafters import DRAFTERS
from tests.contract.scripted import Budgets
from tests.contract.test_joint_law import PROMPT, N, T, V, collect, statistic
from tests.covering import covering, slow_beyond

MODEL = target().storing("int8")
SMALL = TinyLM(V, 16, 2, seed=3, sharp=1.2)
"""The model of the joint distribution."""


@cache
def plain(sampling: str) -> list[tuple[int, ...]]:
    """One request at a time, nothing proposed."""
    one = [engine(MODEL, NoDraft(), load_rule("match"), 1) for _ in PROMPTS]
    return [t for e, q, p in zip(one, PROMPTS, params(sampling), strict=True) for t in tokens(e.generate([q], [p]))]


DRAWN = ("model", "tree-iid", "sparse-window")
CASES = list(product(DRAWN, ("greedy", "temperature 1", "top-p with penalties"), (6, 3)))


@pytest.mark.parametrize(("drafter", "sampling", "capacity"), slow_beyond(CASES, covering(CASES)))
def test_match_equals_plain_decoding(drafter: str, sampling: str, capacity: int) -> None:
    one = engine(MODEL, DRAFTERS[drafter](MODEL, capacity), load_rule("match"), capacity)
    assert tokens(one.generate(PROMPTS, params(sampling))) == plain(sampling)


def test_control_the_plain_cache_says_something_else() -> None:
    """Negative control: were codes not read, the texts above would be those of the model itself."""
    found = engine(target(), NoDraft(), load_rule("match"), 6).generate(PROMPTS, params("temperature 1"))
    assert tokens(found) != plain("temperature 1")


@cache
def exact_joint(kv_dtype: str) -> np.ndarray:
    """Distribution of the first four tokens of SMALL with such a cache, [V, V, V, V], from its own forwards."""
    model, out = SMALL.storing(kv_dtype), np.zeros((V,) * T)
    for text in product(range(V), repeat=T):
        kv = model.new_kv(1, 16)
        rows = Rows.assemble([0], [[*PROMPT, *text[:-1]]], [0], Draft.empty(1))
        scored = torch.arange(len(PROMPT) - 1, rows.count)
        logits = model.forward(Rows(rows.token, rows.position, rows.segments, scored), kv).logits
        out[text] = float(torch.softmax(logits, -1)[range(T), list(text)].prod())
    return out


def sampled(drafter: Drafter, kv_dtype: str) -> Engine:
    depth = Budgets(lambda s: (s.seed * 7 + len(s.tokens)) % 4)
    return Engine(SMALL.storing(kv_dtype), drafter, load_rule("speculative_sampling"), depth, slots=512, max_length=32)


CHAIN = Levels(levels((1, 1, 1)), V)


@pytest.mark.slow
def test_joint_distribution_of_four_tokens() -> None:
    """Draft model and view, aborted and preempted neighbours: the distribution is that of the model with the coded cache."""
    for drafter in (
        ModelDrafter(SMALL.perturbed(0.2, seed=4), 3),
        SparseDrafter(SMALL.storing("int8"), Sparse("window", 0, 1), CHAIN),
    ):
        one = sampled(drafter, "int8")
        value, bound = statistic(collect(one, N, seed=5, disturb=True), exact_joint("int8") * N)
        assert value < bound
        assert min(one.counts.accepted, one.counts.rejected) > 200
