"""Biased rules of one conditional and along a chain: Theorems 4 and 5 of Yin et al. (2024), against linear programs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from outrider.theory import pareto, pareto_chain
from outrider.theory.batch import total_variation
from outrider.theory.chains import Chain, iid
from outrider.theory.exact import target_law
from tests.theory.instances import Array, Z, pairs, spiky


@st.composite
def ruled(draw: st.DrawFn) -> tuple[Array, Array, Array]:
    """(target, draft, acceptance), any acceptance."""
    p, q = draw(pairs())
    b = np.array(draw(st.lists(st.integers(0, 4), min_size=len(p), max_size=len(p)))) / 4
    return p, q, b


def least_loss(p: Array, q: Array, b: Array) -> float:
    """min over laws P of TV(b q + R P, p), as a linear program in (P, bounds on the absolute values)."""
    n, reject = len(p), float((1 - b) @ q)
    eye = np.eye(n)
    a_ub = np.block([[reject * eye, -eye], [-reject * eye, -eye]])
    b_ub = np.concatenate([p - b * q, b * q - p])
    a_eq = np.append(np.ones(n), np.zeros(n))[None]
    found = linprog(np.append(np.zeros(n), np.full(n, 0.5)), a_ub, b_ub, a_eq, [1.0], bounds=(0, None), method="highs")
    return float(found.fun)


@settings(max_examples=40)
@given(ruled())
def test_optimal_loss_is_the_linear_program(case):
    p, q, b = case
    loss = pareto.optimal_loss(p, q, b)
    assert loss == pytest.approx(least_loss(p, q, b), abs=1e-9)
    reject = pareto.rejection_probability(q, b)
    assert loss == pytest.approx(0.5 * np.abs(p - b * q).sum() - reject / 2, abs=1e-12)  # the form of Theorem 4
    assert pareto.loss(p, q, b, pareto.optimal_residual(p, q, b)) == pytest.approx(loss, abs=1e-12)


@given(ruled(), st.integers(0, 1000))
def test_optimal_residuals_are_exactly_the_optimal_ones(case, seed):
    p, q, b = case
    best = pareto.optimal_residuals(p, q, b)
    loss = pareto.optimal_loss(p, q, b)
    random = np.random.default_rng(seed).dirichlet(np.full(len(p), 0.5))
    for law in (pareto.optimal_residual(p, q, b), p, q, random, *np.eye(len(p))):
        gap = float(pareto.loss(p, q, b, law) - loss)
        assert gap >= -1e-12
        assert bool(best.contains(law, 1e-9)) == (gap < 1e-10) or 1e-10 < gap < 1e-8


@given(ruled())
def test_identity_and_distance_from_the_front(case):
    p, q, b = case
    tv, excess = total_variation(p, q), pareto.excess(p, q, b)
    assert pareto.rejection_probability(q, b) + pareto.optimal_loss(p, q, b) == pytest.approx(tv + excess, abs=1e-12)
    over = np.maximum(b, np.minimum(1.0, np.divide(p, q, out=np.ones_like(p), where=q > 0)))
    assert pareto.excess(p, q, over) == pytest.approx(0.0, abs=1e-15)
    ordinary = np.maximum(p - q, 0.0)
    if ordinary.sum() > 0:  # the ordinary residual is optimal for every over-accepting rule
        law = ordinary / ordinary.sum()
        assert pareto.loss(p, q, over, law) == pytest.approx(pareto.optimal_loss(p, q, over), abs=1e-12)
        if pareto.rejection_probability(q, over) > 1e-12:
            assert pareto.optimal_residual(p, q, over) == pytest.approx(law, abs=1e-12)
    under = np.where(q > 0, 0.5 * np.minimum(1.0, np.divide(p, q, out=np.ones_like(p), where=q > 0)), 1.0)
    assert pareto.excess(p, q, under) == pytest.approx(0.5 * (1 - tv), abs=1e-12)


@given(ruled(), st.integers(0, 1000))
def test_any_rule_rejects_at_least_tv_to_its_output(case, seed):
    p, q, b = case
    law = np.random.default_rng(seed).dirichlet(np.ones(len(p)))
    pi = pareto.output_kernel(q, b, law)
    assert pareto.rejection_probability(q, b) >= total_variation(q, pi) - 1e-12
    own = np.minimum(1.0, np.divide(pi, q, out=np.ones_like(q), where=q > 0))
    assert pareto.rejection_probability(q, own) == pytest.approx(total_variation(q, pi), abs=1e-12)
    bias = float(total_variation(pi, p))
    assert pareto.front(p, q, min(1.0, bias)) <= pareto.rejection_probability(q, b) + 1e-12


@given(pairs(), st.integers(0, 20))
def test_epsilon_rule_and_the_budget_that_it_spends(pair, twentieths):
    p, q = pair
    budget = twentieths / 20
    eps, tv = pareto.epsilon_for_budget(p, q, budget), total_variation(p, q)
    b = pareto.epsilon_acceptance(p, q, eps)
    assert b * q == pytest.approx(np.minimum(q, p + eps), abs=1e-14)
    assert pareto.rejection_probability(q, b) == pytest.approx(np.maximum(q - p - eps, 0).sum(), abs=1e-12)
    assert pareto.optimal_loss(p, q, b) == pytest.approx(np.minimum(np.maximum(q - p, 0), eps).sum(), abs=1e-12)
    assert pareto.optimal_loss(p, q, b) == pytest.approx(min(budget, tv), abs=1e-12)
    assert pareto.rejection_probability(q, b) == pytest.approx(float(pareto.front(p, q, budget)), abs=1e-12)
    assert pareto.budget_acceptance(p, q, budget) == pytest.approx(b)
    assert eps <= np.maximum(q - p, 0).max() + 1e-15  # no larger than needed


@settings(max_examples=40)
@given(pairs(), st.integers(0, 20))
def test_clip_kernel_is_on_the_front_and_flattest(pair, twentieths):
    p, q = pair
    tv, pi = float(total_variation(p, q)), pareto.clip_kernel(p, q, twentieths / 20)
    bias = min(twentieths / 20, tv)
    assert pi.sum() == pytest.approx(1.0, abs=1e-12)
    assert total_variation(pi, p) == pytest.approx(bias, abs=1e-12)
    assert total_variation(q, pi) == pytest.approx(tv - bias, abs=1e-12)
    n, cost = len(p), np.zeros(len(p) + 1)
    cost[-1] = 1.0  # laws between p and q in every coordinate are the front; minimise the largest gap
    a_ub = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))]])
    a_eq = np.vstack([np.append(np.ones(n), 0), np.append(np.where(q > p, 1.0, 0.0), 0)])
    bounds = [*zip(np.minimum(p, q), np.maximum(p, q), strict=True), (0, None)]
    found = linprog(cost, a_ub, np.append(p, -p), a_eq, [1.0, bias + p[q > p].sum()], bounds=bounds, method="highs")
    assert np.abs(pi - p).max() == pytest.approx(found.fun, abs=1e-9)


def test_rows_are_independent_and_b_zero_and_one_are_the_ends():
    chain = spiky(5, 4, seed=3, zeros=0.3)
    p, q = chain.target, chain.draft
    eps = np.linspace(0, 0.3, 20).reshape(4, 5)
    whole = pareto.epsilon_acceptance(p, q, eps)
    assert np.array_equal(whole[2, 3], pareto.epsilon_acceptance(p[2, 3], q[2, 3], eps[2, 3]))
    assert np.array_equal(pareto.epsilon_for_budget(p, q, 0.1)[1, 2], pareto.epsilon_for_budget(p[1, 2], q[1, 2], 0.1))
    assert pareto.optimal_loss(p, q, 0.0) == pytest.approx(np.zeros((4, 5)))
    assert pareto.optimal_residual(p, q, 0.0) == pytest.approx(p)
    assert pareto.optimal_loss(p, q, 1.0) == pytest.approx(total_variation(p, q))
    assert pareto.optimal_residuals(p, q, 1.0).contains(q).all()  # nothing rejected: every residual will do


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: pareto.optimal_loss([0.5, 0.5], [1.0], 1.0), "target and draft"),
        (lambda: pareto.optimal_loss([0.5, 0.5], [0.5, 0.6], 1.0), "draft"),
        (lambda: pareto.optimal_loss([0.5, 0.5], [0.5, 0.5], 1.5), "accept"),
        (lambda: pareto.optimal_loss([0.5, 0.5], [0.5, 0.5], [1.0, 1.0, 1.0]), "accept"),
        (lambda: pareto.front([0.5, 0.5], [0.5, 0.5], -0.1), "budget"),
        (lambda: pareto.epsilon_acceptance([0.5, 0.5], [0.5, 0.5], -1.0), "eps"),
        (lambda: pareto.epsilon_acceptance([0.5, 0.5], [0.5, 0.5], float("nan")), "eps"),
        (lambda: pareto.loss([0.5, 0.5], [0.5, 0.5], 1.0, [0.5, 0.4]), "residual"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def output_law(start: Array, kernels: Array) -> Array:
    """Law of x_1..x_T under any kernels: `target_law` of an instance that has them as its target."""
    return target_law(Chain(start, kernels, kernels))


@pytest.mark.parametrize("seed", range(6))
def test_chain_identity_and_sequence_bounds(seed):
    chain = spiky(3, 4, seed, zeros=0.2)
    rng = np.random.default_rng(seed)
    for accept in (pareto.epsilon_acceptance(chain.target, chain.draft, 0.1), rng.random(chain.target.shape)):
        t = pareto_chain.tradeoff(chain, accept)
        assert t.reject + t.optimal_bias == pytest.approx(t.tv + t.excess, abs=1e-12)
        assert t.bias == pytest.approx(t.optimal_bias, abs=1e-12)
        ours, theirs = output_law(chain.start, t.kernels), target_law(chain)
        exact = 0.5 * float(np.abs(ours - theirs).sum())
        assert pareto_chain.sequence_tv(chain, t.kernels) == pytest.approx(exact, abs=1e-13)
        assert t.lower <= exact + 1e-12
        assert exact <= min(t.bias.sum(), t.bias_on_target.sum()) + 1e-12
        assert t.upper == pytest.approx(min(1.0, t.bias.sum(), t.bias_on_target.sum()))
    residual = rng.dirichlet(np.ones(3), size=(4, 3))  # a poor residual: more bias, and the bounds still hold
    poor = pareto_chain.tradeoff(chain, 0.5, residual)
    assert poor.bias.sum() > poor.optimal_bias.sum()
    assert pareto_chain.sequence_tv(chain, poor.kernels) <= poor.upper + 1e-12


def test_where_a_bias_is_spent_does_not_matter_in_total_variation():
    chain = spiky(4, 5, seed=2)
    easy = np.zeros((5, 4, 1))
    easy[:, :2] = 0.3
    for eps in (easy, 0.3 - easy):
        t = pareto_chain.tradeoff(chain, pareto.epsilon_acceptance(chain.target, chain.draft, eps[..., 0]))
        assert t.reject.sum() + t.bias.sum() == pytest.approx(t.tv.sum(), abs=1e-12)
        assert t.bias.sum() > 0.01


def test_sequence_tv_estimate_agrees_with_enumeration():
    chain = spiky(3, 4, seed=7, zeros=0.2)
    chain = Chain(np.eye(3)[0], chain.draft, chain.target)
    t = pareto_chain.tradeoff(chain, pareto.epsilon_acceptance(chain.target, chain.draft, 0.2))
    exact = pareto_chain.sequence_tv(chain, t.kernels)
    found = pareto_chain.estimate_sequence_tv(chain, t.kernels, 40_000, np.random.default_rng(1))
    # Terms in [0, 1] with this mean: the standard deviation is at most sqrt(m (1 - m)).
    assert found.standard_error <= np.sqrt(exact * (1 - exact) / 40_000) * 1.1
    assert abs(found.value - exact) < Z * found.standard_error
    other = pareto_chain.tradeoff(chain, 1.0)  # negative control: another rule's kernels are told apart
    assert abs(found.value - pareto_chain.sequence_tv(chain, other.kernels)) > 10 * found.standard_error


def test_sequence_tv_refuses_what_it_cannot_enumerate():
    chain = iid([0.5, 0.5], [0.5, 0.5], horizon=40)
    with pytest.raises(ValueError, match="estimate_sequence_tv"):
        pareto_chain.sequence_tv(chain, chain.draft)
