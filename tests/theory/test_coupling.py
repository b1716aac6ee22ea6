"""Shared randomness: match probabilities against the quadratic formula and against races that are run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from outrider.theory import coupling
from tests.theory.instances import ALARM, Array, Z, pairs, spiky


def quadratic(p: Array, q: Array) -> Array:
    """1 / sum_j max(p_j / p_i, q_j / q_i), as it is written."""
    out = np.zeros(len(p))
    for i in np.flatnonzero((p > 0) & (q > 0)):
        out[i] = 1.0 / np.maximum(p / p[i], q / q[i]).sum()
    return out


def quadratic_list(p: Array, q: Array, k: int) -> float:
    both = np.flatnonzero((p > 0) & (q > 0))
    return sum(k / (np.maximum(p / p[j], q / q[j]).sum() + (k - 1) / p[j]) for j in both)


@given(pairs(), st.integers(1, 5))
def test_formulas_and_bounds(pair, k):
    p, q = pair
    assert coupling.match_by_token(p, q) == pytest.approx(quadratic(p, q), abs=1e-13)
    match = float(coupling.match_probability(p, q))
    low, high = coupling.match_bounds(p, q)
    assert low - 1e-12 <= match <= high + 1e-12
    bound = float(coupling.list_match_bound(p, q, k))
    assert bound == pytest.approx(quadratic_list(p, q, k), abs=1e-13)
    assert coupling.list_match_bound(p, q, 1) == pytest.approx(match, abs=1e-13)
    assert coupling.match_probability(q, p) == pytest.approx(match, abs=1e-13)  # symmetric


def test_edges_and_rows():
    assert coupling.match_probability([1.0, 0.0], [0.0, 1.0]) == 0.0
    assert coupling.match_probability([1.0], [1.0]) == 1.0
    chain = spiky(6, 3, seed=0, zeros=0.3)
    whole = coupling.match_probability(chain.target, chain.draft)
    assert whole.shape == (3, 6)
    assert whole[1, 2] == pytest.approx(quadratic(chain.target[1, 2], chain.draft[1, 2]).sum(), abs=1e-13)
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.full(2000, 0.1), size=2)
    assert coupling.match_probability(p, q) == pytest.approx(quadratic(p, q).sum(), abs=1e-12)


@pytest.mark.parametrize("lists", [1, 2, 4])
def test_race(lists):
    rng = np.random.default_rng(5)
    p, q = rng.dirichlet(np.ones(5), size=2)
    n = 60_000
    outputs, drafts = coupling.simulate_lists(p, q, lists, n, rng)
    assert chisquare(np.bincount(outputs, minlength=5), n * p).pvalue > ALARM  # the output has the target's law
    assert chisquare(np.bincount(outputs, minlength=5), n * q).pvalue < ALARM  # negative control
    assert chisquare(np.bincount(drafts[:, -1], minlength=5), n * q).pvalue > ALARM
    seen, bound = (drafts == outputs[:, None]).any(axis=1).mean(), float(coupling.list_match_bound(p, q, lists))
    error = np.sqrt(bound * (1 - bound) / n)
    if lists == 1:
        assert abs(seen - bound) < Z * error
        by_token = np.bincount(outputs[outputs == drafts[:, 0]], minlength=5) / n
        wanted = coupling.match_by_token(p, q)
        assert (np.abs(by_token - wanted) < Z * np.sqrt(wanted * (1 - wanted) / n)).all()
        assert seen < 1 - 0.5 * np.abs(p - q).sum()  # not the maximal coupling
    else:
        assert seen > bound - Z * error
        assert seen > float(coupling.list_match_bound(p, q, 1)) + Z * error  # more lists, more matches


def test_output_does_not_depend_on_the_drafter():
    p = np.array([0.2, 0.3, 0.5])
    first, _ = coupling.simulate_lists(p, [0.1, 0.1, 0.8], 3, 1000, np.random.default_rng(0))
    second, _ = coupling.simulate_lists(p, [0.8, 0.1, 0.1], 3, 1000, np.random.default_rng(0))
    assert np.array_equal(first, second)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="lists"):
        coupling.list_match_bound([1.0], [1.0], 0)
    with pytest.raises(ValueError, match="target and draft"):
        coupling.match_probability([1.0], [0.5, 0.5])
