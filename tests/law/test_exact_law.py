"""EX-1 for speculative sampling beside the table of `test_rules.py`: float32, sums that are off, batches, any distributions.

No sampling error, so no tolerance but rounding. In float32 the distributions of a case are rounded first and the target is the
rounded distribution, which leaves its own 1e-7 of a sum.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.verify.tree import SpeculativeSampling, verify_forest
from tests.law.lab import COARSE, EXACT, SHARES, Enumerator, check_rule, examine, some
from tests.law.worlds import Shape, World, chain, prefixes, random_world, rounded, shapes

RULE = SpeculativeSampling()


check = partial(check_rule, RULE, Enumerator)


@SHARES
@pytest.mark.parametrize("shape", [chain(2), *shapes().values(), *shapes("without_replacement").values()])
def test_float32(shape, share):
    rng = np.random.default_rng(13)
    vocab = 2 if len(shape.parent) > 3 else 4
    full = shape.siblings == "without_replacement"
    worlds = [rounded(random_world(rng, vocab, shape, full=full), torch.float32) for _ in range(some(20, share))]
    check(worlds, 3, torch.float32, COARSE, 1e-6)


def test_sums_off_by_1e_7():
    rng = np.random.default_rng(14)
    worlds = [random_world(rng, 3, shape) for shape in (chain(2), chain(1)) for _ in range(100)]
    for world in worlds:
        world.p *= 1 + rng.choice([-1e-7, 1e-7], size=(len(world.p), 1))
        world.q *= 1 + rng.choice([-1e-7, 1e-7], size=(len(world.q), 1))
    check(worlds, 4, edge=COARSE, tolerance=1e-6)


def test_shapes_of_a_batch_may_differ():
    rng = np.random.default_rng(15)
    ragged = [Shape((), ()), chain(3), chain(1), Shape((), ()), chain(2, has_q=False), chain(2)]
    check([random_world(rng, 3, shape) for shape in ragged for _ in range(5)], 5)
    check_rule(
        verify_forest,
        Enumerator,
        [random_world(rng, 3, shape) for shape in [*ragged, shapes()["two"]] for _ in range(2)],
        6,
    )


def test_accepted_count_has_its_distribution():
    """E[accepted] = sum over depths of the mass both distributions share along the path (Leviathan et al. 2023, Theorem 3.8)."""
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


def distributions_of(vocab: int) -> st.SearchStrategy[np.ndarray]:
    """One distribution: any weights, with zeros, ties and subnormal numbers wanted often."""
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
    p = [draw(distributions_of(vocab)) for _ in range(rows)]
    q = [p[i] if draw(st.booleans()) and draw(st.booleans()) else draw(distributions_of(vocab)) for i in range(rows)]
    point = np.array([[draw(st.integers(0, vocab - 1)) for _ in range(4)] for _ in range(rows)])
    return World(np.array(p), np.array(q), shape, point)


@settings(max_examples=150)
@given(cases())
def test_any_distributions(world):
    check([world], 7)
