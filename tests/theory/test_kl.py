"""KL fronts: the clip form against a general-purpose optimiser, the dynamic program against perturbed policies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from outrider.theory import kl, pareto
from outrider.theory.batch import total_variation
from outrider.theory.chains import best_guess
from outrider.theory.laws import kl_divergence, kl_unchecked
from outrider.theory.rejections import expected_rejections
from tests.theory.instances import Array, pairs, spiky

BOTH = ("target_first", "kernel_first")


def divergence(p: Array, pi: Array, direction: str) -> float:
    return float(kl_unchecked(p, pi) if direction == "target_first" else kl_unchecked(pi, p))


def least_rejection(p: Array, q: Array, budget: float, direction: str, starts: list[Array]) -> float:
    """min TV(q, pi) with the divergence at most `budget`, by SLSQP in (pi, slack >= q - pi)."""
    n = len(p)
    best = np.inf
    constraints = [
        {"type": "eq", "fun": lambda z: z[:n].sum() - 1.0},
        {"type": "ineq", "fun": lambda z: z[n:] - (q - z[:n])},
        {"type": "ineq", "fun": lambda z: budget - divergence(p, np.maximum(z[:n], 1e-12), direction)},
    ]
    bounds = [(1e-9, 1)] * n + [(0, 1)] * n
    for start, tolerance in itertools.product(starts, (1e-13, 1e-11, 1e-9)):
        z0 = np.append(start, np.maximum(q - start, 0))
        z = minimize(
            lambda z: z[n:].sum(),
            z0,
            bounds=bounds,
            constraints=constraints,
            options={"ftol": tolerance, "maxiter": 500},
        ).x
        # At its tightest tolerance the solver may call an optimum a failure: feasibility decides, not its flag.
        pi = z[:n]
        if abs(pi.sum() - 1) < 1e-9 and divergence(p, pi, direction) <= budget + 1e-8:
            best = min(best, float(np.maximum(q - pi, 0).sum()))
    return best


@pytest.mark.parametrize("direction", BOTH)
def test_mentored_is_the_optimum_of_a_general_solver(direction):
    rng = np.random.default_rng(0)
    for _ in range(6):
        p, q = rng.dirichlet(np.ones(4), size=2)
        budget = 0.3 * divergence(p, q, direction)
        rule = kl.mentored(p, q, budget, direction)
        assert rule.divergence == pytest.approx(budget, abs=1e-12)
        found = least_rejection(p, q, budget, direction, [p, 0.7 * p + 0.3 * q])
        assert float(rule.reject) == pytest.approx(found, abs=1e-6)
        assert float(rule.reject) <= found + 1e-7


@given(pairs(), st.integers(0, 20))
def test_clip_family_is_a_clip_and_on_the_total_variation_front(pair, twentieths):
    p, q = pair
    tv = float(total_variation(p, q))
    reject = min(tv, twentieths / 20)
    rule = kl.clip_rule(p, q, twentieths / 20)
    pi = rule.kernel
    assert pi.sum() == pytest.approx(1.0, abs=1e-12) and (pi >= 0).all()
    assert rule.reject == pytest.approx(reject, abs=1e-12)
    assert total_variation(q, pi) == pytest.approx(reject, abs=1e-12)
    assert total_variation(pi, p) == pytest.approx(tv - reject, abs=1e-12)
    assert pareto.output_kernel(q, rule.accept, rule.residual) == pytest.approx(pi, abs=1e-12)
    inside = p > 0
    if np.isfinite(rule.upper) and reject < tv:
        assert rule.lower <= 1 <= rule.upper
        assert pi[inside] == pytest.approx(np.clip(q, rule.lower * p, rule.upper * p)[inside], abs=1e-12)
        assert (pi[~inside] == 0).all()
    elif reject < tv:  # only tokens that the target never takes have lost mass
        assert (pi[inside] >= q[inside] - 1e-12).all()


@settings(max_examples=50)
@given(pairs(), st.sampled_from(BOTH), st.floats(0.0, 2.0))
def test_mentored_keeps_its_budget_and_wastes_none(pair, direction, budget):
    p, q = pair
    rule = kl.mentored(p, q, budget, direction)
    assert rule.divergence <= budget + 1e-12
    assert divergence(p, rule.kernel, direction) == pytest.approx(float(rule.divergence), abs=1e-12)
    if rule.reject > 1e-9:  # rejecting slightly less would overspend
        less = kl.clip_rule(p, q, rule.reject * (1 - 1e-6), direction)
        assert less.divergence > budget - 1e-12
    else:
        assert divergence(p, q, direction) <= budget + 1e-6


def test_ends_of_the_family():
    p, q = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.1, 0.5, 0.2, 0.2])
    assert np.array_equal(kl.clip_rule(p, q, 0.0).kernel, q)
    assert np.array_equal(kl.clip_rule(p, q, 1.0).kernel, p)
    assert kl.mentored(p, q, 0.0).kernel == pytest.approx(p)
    assert kl.mentored(p, q, 100.0).reject == 0.0
    assert np.isinf(kl.clip_rule(p, q, 0.1, "kernel_first").divergence)  # mass is left where the target has none
    assert kl.mentored(p, q, 0.2, "kernel_first").kernel[3] == 0.0
    rows = kl.mentored(np.stack([p, q]), np.stack([q, p]), [0.1, 0.0])
    assert rows.kernel[0] == pytest.approx(kl.mentored(p, q, 0.1).kernel, abs=1e-14)
    assert rows.kernel[1] == pytest.approx(q)


def test_kl_divergence_edges():
    assert kl_divergence([1.0, 0.0], [0.5, 0.5]) == pytest.approx(np.log(2))
    assert np.isinf(kl_divergence([0.5, 0.5], [1.0, 0.0]))
    with pytest.raises(ValueError, match="direction"):
        kl.mentored([0.5, 0.5], [0.5, 0.5], 0.1, "forward")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="budget"):
        kl.mentored([0.5, 0.5], [0.5, 0.5], -0.1)


@pytest.mark.parametrize("weight", [0.3, 1.0, 4.0])
def test_sequence_policy_objective_is_what_enumeration_says(weight):
    chain = spiky(3, 4, seed=1)
    policy = kl.sequence_policy(chain, weight)
    assert policy.kernels.sum(axis=2) == pytest.approx(np.ones((4, 3)), abs=1e-14)
    assert policy.objective == pytest.approx(policy.rejections + weight * policy.divergence, abs=1e-12)
    ours = theirs = chain.start[None]  # laws of the whole string, prompt included
    for pi, p in zip(policy.kernels, chain.target, strict=True):
        ours, theirs = ((a[:, :, None] * k).reshape(-1, 3) for a, k in ((ours, pi), (theirs, p)))
    assert policy.divergence == pytest.approx(float(kl_unchecked(ours.ravel(), theirs.ravel())), abs=1e-12)


def cost(chain, kernels: Array, weight: float) -> float:
    """E[N_rej] + weight * KL of any policy, forwards."""
    state, total = chain.start, 0.0
    for pi, p, q in zip(kernels, chain.target, chain.draft, strict=True):
        total += state @ (total_variation(q, pi) + weight * kl_unchecked(pi, p))
        state = state @ pi
    return float(total)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.5, 3.0]), st.floats(1e-4, 1.0))
def test_no_perturbed_policy_is_better(seed, weight, size):
    chain = spiky(3, 4, seed=seed % 5, zeros=0.2 * (seed % 2))
    policy = kl.sequence_policy(chain, weight)
    assert cost(chain, policy.kernels, weight) == pytest.approx(policy.objective, abs=1e-11)
    rng = np.random.default_rng(seed)
    for _ in range(10):
        other = np.where(chain.target > 0, rng.dirichlet(np.full(3, 0.5), size=(4, 3)), 0.0) + 1e-12 * chain.target
        other /= other.sum(axis=2, keepdims=True)
        mixed = (1 - size) * policy.kernels + size * other
        assert cost(chain, mixed, weight) >= policy.objective - 1e-11


def test_one_step_against_a_general_solver():
    rng = np.random.default_rng(4)
    weight = 0.7
    for _ in range(4):
        p, q = rng.dirichlet(np.ones(4), size=2)
        future = rng.random(4)
        pi = kl.bellman(p[None], q[None], future, weight)[0]

        def objective(z, p=p, future=future):
            return z[4:].sum() + weight * float(kl_unchecked(z[:4], p)) + z[:4] @ future

        constraints = [
            {"type": "eq", "fun": lambda z: z[:4].sum() - 1.0},
            {"type": "ineq", "fun": lambda z, q=q: z[4:] - (q - z[:4])},
        ]
        z0 = np.append(p, np.maximum(q - p, 0))
        found = minimize(
            objective, z0, bounds=[(1e-9, 1)] * 8, constraints=constraints, options={"ftol": 1e-14, "maxiter": 500}
        )
        ours = float(total_variation(q, pi)) + weight * float(kl_unchecked(pi, p)) + float(pi @ future)
        assert ours <= found.fun + 1e-9
        assert ours == pytest.approx(found.fun, abs=1e-6)


def test_price_of_divergence_moves_between_draft_and_target():
    chain = best_guess(states=4, horizon=6)
    exact = kl.sequence_policy(chain, 1e6)
    assert exact.rejections == pytest.approx(expected_rejections(chain), abs=1e-4)
    assert exact.divergence == pytest.approx(0.0, abs=1e-6)
    free = kl.sequence_policy(chain, 1e-4)
    assert free.rejections < 1e-2 and free.kernels == pytest.approx(chain.draft, abs=1e-2)
    path = [kl.sequence_policy(chain, w) for w in (0.1, 0.5, 1.0, 2.0, 5.0)]
    assert all(a.rejections <= b.rejections and a.divergence >= b.divergence for a, b in itertools.pairwise(path))
    with pytest.raises(ValueError, match="weight"):
        kl.sequence_policy(chain, 0.0)
