"""EX-1: the output law of speculative sampling equals the target's, by enumeration; and the ledger's two identities.

10,000 cases in all (a quarter of them in `make test`), on every shape of draft. No sampling error, so no tolerance but rounding:
1e-12 in float64. In float32 the laws of a case are rounded first and the target is the rounded law, which leaves its own 1e-7 of
a sum.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.verify.tree import SpeculativeSampling, judge_forest
from tests.law.lab import (
    COARSE,
    EDGE,
    SHARES,
    Shape,
    Siblings,
    World,
    chain,
    examine,
    prefixes,
    random_world,
    rounded,
    some,
)  # fmt: skip

RULE = SpeculativeSampling()
EXACT = 1e-12


def shapes(siblings: Siblings = "iid") -> dict[str, Shape]:
    pair = (True, True)
    return {
        "two": Shape((-1, -1), pair, siblings),
        "three": Shape((-1, -1, -1), (True,) * 3, siblings),
        "two by two": Shape((-1, -1, 0, 0, 1, 1), (True,) * 6, siblings),
        "uneven": Shape((-1, -1, -1, 1, 1, 4), (True,) * 6, siblings),
    }


CHAINS = [  # name, vocabulary, shape, support, cases
    ("one", 3, chain(1), None, 4000),
    ("two", 3, chain(2), None, 2000),
    ("three", 3, chain(3), None, 600),
    ("three, two tokens", 2, chain(3), None, 600),
    ("point masses", 3, chain(3, law=False), None, 600),
    ("some point masses", 3, Shape((-1, 0, 1), (True, False, True)), None, 300),
    ("support", 4, chain(2), np.array([2, 0, 3]), 200),
]
TREES = [
    *[
        (f"iid {name}", v, shape, False, n)
        for (name, shape), v, n in zip(shapes().items(), (3, 3, 2, 2), (400, 80, 60, 40), strict=True)
    ],
    *[
        (f"without replacement {name}", v, shape, full, n)
        for (name, shape), v, full, n in zip(
            shapes("without_replacement").items(),
            (3, 4, 3, 3),
            (False, True, True, False),
            (300, 30, 10, 10),
            strict=True,
        )
    ],
    ("points", 3, Shape((-1, -1, 0, 0, 1), (False,) * 5), False, 400),
    ("points, wide", 4, Shape((-1, -1, -1, -1, 2), (False,) * 5), False, 200),
    ("law and points", 3, Shape((-1, -1, -1, 0), (True, False, True, True)), False, 80),
    (
        "points and law without replacement",
        3,
        Shape((-1, -1, -1), (False, True, True), "without_replacement"),
        False,
        90,
    ),
]


def test_there_are_ten_thousand_cases():
    assert sum(case[-1] for case in CHAINS) + sum(case[-1] for case in TREES) == 10_000


def _check(
    rule, worlds: list[World], seed: int, dtype=torch.float64, edge: float = EDGE, tolerance: float = EXACT
) -> None:
    found = examine(rule, worlds, np.random.default_rng([seed, 1]), dtype, edge)
    assert found.law.max() <= tolerance
    assert found.ledger.max() <= tolerance, "E[risk - rejections] is not zero"
    assert found.spread.max() <= tolerance, "E[(risk - rejections)^2] is not E[spread]"


@SHARES
@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case[0])
def test_chains(case, share):
    name, vocab, shape, support, count = case
    rng, count = np.random.default_rng([11, len(name), vocab]), some(count, share)
    for _ in range(0, count, 200):
        _check(RULE, [random_world(rng, vocab, shape, support) for _ in range(200 if count > 200 else count)], 1)


@SHARES
@pytest.mark.parametrize("case", TREES, ids=lambda case: case[0])
def test_trees(case, share):
    name, vocab, shape, full, count = case
    rng = np.random.default_rng([12, len(name), vocab])
    _check(RULE, [random_world(rng, vocab, shape, full=full) for _ in range(some(count, share))], 2)


@SHARES
@pytest.mark.parametrize("shape", [chain(2), *shapes().values(), *shapes("without_replacement").values()])
def test_float32(shape, share):
    rng = np.random.default_rng(13)
    vocab = 2 if len(shape.parent) > 3 else 4
    full = shape.siblings == "without_replacement"
    worlds = [rounded(random_world(rng, vocab, shape, full=full), torch.float32) for _ in range(some(20, share))]
    _check(RULE, worlds, 3, torch.float32, COARSE, 1e-6)


def test_sums_off_by_1e_7():
    rng = np.random.default_rng(14)
    worlds = [random_world(rng, 3, shape) for shape in (chain(2), chain(1)) for _ in range(100)]
    for world in worlds:
        world.p *= 1 + rng.choice([-1e-7, 1e-7], size=(len(world.p), 1))
        world.q *= 1 + rng.choice([-1e-7, 1e-7], size=(len(world.q), 1))
    _check(RULE, worlds, 4, edge=COARSE, tolerance=1e-6)


def test_shapes_of_a_batch_may_differ():
    rng = np.random.default_rng(15)
    ragged = [Shape((), ()), chain(3), chain(1), Shape((), ()), chain(2, law=False), chain(2)]
    _check(RULE, [random_world(rng, 3, shape) for shape in ragged for _ in range(5)], 5)
    _check(judge_forest, [random_world(rng, 3, shape) for shape in [*ragged, shapes()["two"]] for _ in range(2)], 6)


def test_accepted_count_has_its_law():
    """E[accepted] = sum over depths of the mass both laws share along the path (Leviathan et al. 2023, Theorem 3.8)."""
    rng = np.random.default_rng(16)
    worlds = [random_world(rng, 3, chain(3)) for _ in range(50)]
    found = examine(RULE, worlds, rng)
    for world, accepted in zip(worlds, found.accepted, strict=True):
        path, expected = np.ones(1), 0.0
        for d in range(3):
            rows = slice(prefixes(3, d) - 3**d, prefixes(3, d))
            path = (path[:, None] * np.minimum(world.p[rows], world.q[rows])).ravel()
            expected += path.sum()
        assert accepted == pytest.approx(expected, abs=EXACT)


def laws(vocab: int) -> st.SearchStrategy[np.ndarray]:
    """One law: any weights, with zeros, ties and subnormal numbers wanted often."""
    weight = st.one_of(st.sampled_from([0.0, 1.0, 0.25, 1e-12, 5e-324, 1e-310]), st.floats(0, 1))
    positive = st.lists(weight, min_size=vocab, max_size=vocab).filter(lambda w: sum(w) > 1e-3)
    return positive.map(lambda w: np.array(w) / sum(w))


@st.composite
def cases(draw, vocab: int = 3) -> World:
    shape = draw(
        st.sampled_from(
            [chain(1), chain(2), *list(shapes().values())[:2], *list(shapes("without_replacement").values())[:2]]
        )
    )
    rows = prefixes(vocab, shape.depth)
    p = [draw(laws(vocab)) for _ in range(rows)]
    q = [p[i] if draw(st.booleans()) and draw(st.booleans()) else draw(laws(vocab)) for i in range(rows)]
    point = np.array([[draw(st.integers(0, vocab - 1)) for _ in range(4)] for _ in range(rows)])
    return World(np.array(p), np.array(q), shape, point)


@settings(max_examples=150)
@given(cases())
def test_any_laws(world):
    _check(RULE, [world], 7)
