"""When to stop drafting: the optimal threshold against a search over thresholds, and what may decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.theory import stopping
from outrider.theory.stopping import beta_law, fixed_rate, renewal, should_continue, specdec_length, specdec_threshold
from tests.theory.instances import Array, Z

COST = 0.08


def simulate(threshold: float, samples: int = 200_000, cap: int = 64) -> tuple[float, float]:
    """(rate, its standard error) of drafting on while S > threshold, a ~ Beta(3, 1.2)."""
    rng = np.random.default_rng(0)
    survival, tokens, cost = np.ones(samples), np.ones(samples), np.ones(samples)
    for _ in range(cap):
        going = np.flatnonzero(survival > threshold)
        survival = survival[going] * rng.beta(3.0, 1.2, len(going))
        if not len(going):
            break
        index = going if _ == 0 else index[going]
        tokens[index] += survival
        cost[index] += COST
    rate = tokens.mean() / cost.mean()
    return rate, float((tokens - rate * cost).std() / cost.mean() / np.sqrt(samples))


def test_example_of_beta_acceptances():
    found = renewal(*beta_law(3.0, 1.2), draft_cost=COST)
    assert found.threshold == pytest.approx(0.250, abs=1e-3)
    assert found.rate == pytest.approx(2.235, abs=4e-3)
    assert found.threshold == pytest.approx(found.rate * COST / (3 / 4.2), abs=1e-12)
    rate, error = simulate(found.threshold)
    assert abs(rate - found.rate) < Z * error
    for other in (0.05, 0.7):  # negative control: other thresholds are worse, and seen to be
        worse, error = simulate(other)
        assert worse < found.rate - Z * error
    best_fixed = max(fixed_rate(3 / 4.2, n, COST) for n in range(20))
    assert best_fixed == pytest.approx(2.168, abs=5e-4)
    assert found.rate > best_fixed + 0.05


def rate_of(threshold: float, values: list[float], weights: list[float], cost: float, cap: int) -> float:
    """Tokens per time of a threshold policy, by recursion over all histories."""

    def value(s: float, left: int) -> tuple[float, float]:
        if left == 0 or s <= threshold:
            return 0.0, 0.0
        tokens = time = 0.0
        for a, w in zip(values, weights, strict=True):
            more = value(s * a, left - 1)
            tokens, time = tokens + w * (s * a + more[0]), time + w * (cost + more[1])
        return tokens, time

    tokens, time = value(1.0, cap)
    return (1 + tokens) / (1 + time)


@pytest.mark.parametrize(
    "law", [([0.9, 0.4], [0.5, 0.5]), ([1.0, 0.0], [0.7, 0.3]), ([0.95, 0.6, 0.1], [0.5, 0.3, 0.2])]
)
def test_best_threshold_by_enumeration(law):
    values, weights = law
    found = renewal(values, weights, draft_cost=0.1, max_length=7, grid=4001)
    rates = [rate_of(h, values, weights, 0.1, 7) for h in np.linspace(0, 1, 201)]
    assert found.rate == pytest.approx(max(rates), abs=2e-4)
    assert rate_of(found.threshold, values, weights, 0.1, 7) == pytest.approx(found.rate, abs=2e-4)


@settings(max_examples=15)
@given(st.floats(0.05, 0.95), st.floats(0.01, 0.5))
def test_constant_acceptance_is_the_best_fixed_length(mean, cost):
    found = renewal([mean], [1.0], draft_cost=cost, max_length=40, grid=4001)
    assert found.rate == pytest.approx(max(fixed_rate(mean, n, cost) for n in range(41)), rel=1e-4)


def test_ends():
    assert renewal([0.0], [1.0], draft_cost=0.1) == stopping.Renewal(1.0, np.inf)  # never draft
    assert renewal([0.1], [1.0], draft_cost=0.5, verify_cost=2.0).rate == 0.5  # not worth its cost
    assert renewal([1.0], [1.0], draft_cost=0.1, max_length=9).rate == pytest.approx(10 / 1.9)  # draft to the cap
    assert fixed_rate(0.5, 0, 0.1, 2.0) == 0.5
    values, weights = beta_law(3.0, 1.2)
    assert values @ weights == pytest.approx(3 / 4.2, abs=1e-12)
    assert (weights @ values**2) == pytest.approx(3 * 4 / (4.2 * 5.2), abs=1e-3)


def test_continue_rule():
    assert should_continue([0.9, 0.3], [0.8, 0.8], rate=2.0, draft_cost=0.2).tolist() == [True, False]
    assert not should_continue(0.5, 0.8, rate=2.0, draft_cost=0.2)  # a tie stops
    # More informative drafters decide token by token.
    assert should_continue([0.5, 0.5], [0.95, 0.2], rate=2.0, draft_cost=0.2).tolist() == [True, False]


def test_specdec_rule():
    assert specdec_threshold(1.0, 3.0) == 0.75
    assert specdec_threshold(2.0, 1.0, 1.0) == 0.5
    a = np.array([[0.9, 0.9, 0.9, 0.9], [0.2, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert specdec_length(a, 0.25).tolist() == [3, 1, 4]
    assert specdec_length(a, 1.0).tolist() == [4, 4, 4]
    assert specdec_length(a[0], 0.0) == 1


def dropping(p: Array, q: Array, threshold: float) -> Array:
    """Output law if a drawn token with q(x) < threshold is dropped and a sample of p taken in its place."""
    keep, residual = q >= threshold, np.maximum(p - q, 0.0)
    law = residual / residual.sum()
    return np.where(keep, np.minimum(p, q), 0.0) + np.maximum(q - p, 0.0)[keep].sum() * law + q[~keep].sum() * p


def test_dropping_drawn_tokens_is_biased():
    p = np.array([0.1, 0.1, 0.2, 0.3, 0.3])
    q = np.array([0.5, 0.2, 0.1, 0.1, 0.1])
    assert dropping(p, q, 0.0) == pytest.approx(p, abs=1e-15)  # nothing is dropped: speculative sampling
    biased = dropping(p, q, 0.15)
    assert biased.sum() == pytest.approx(1.0)
    assert 0.5 * np.abs(biased - p).sum() > 0.05


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: renewal([0.5, 1.5], [0.5, 0.5], 0.1), "values"),
        (lambda: renewal([0.5, 0.5], [0.5, 0.6], 0.1), "weights"),
        (lambda: renewal([0.5], [1.0], 0.0), "draft_cost"),
        (lambda: renewal([0.5], [1.0], 0.1, max_length=0), "max_length"),
        (lambda: should_continue(1.5, 0.5, 1.0, 0.1), "survival"),
        (lambda: specdec_threshold(0.0, 1.0), "discard_cost"),
        (lambda: specdec_length([], 0.5), "acceptances"),
        (lambda: specdec_length([0.5], 1.5), "threshold"),
        (lambda: beta_law(0.0, 1.0), "a"),
        (lambda: fixed_rate(0.5, -1, 0.1), "length"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
