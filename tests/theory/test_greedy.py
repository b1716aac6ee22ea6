"""Greedy certificates: least KL to a violation, by a general-purpose optimiser over all ways to violate."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from outrider.theory import greedy, lossy
from tests.theory.instances import Array, rows


def least_kl(p: Array, above: list[tuple[int, int]]) -> float:
    """min KL(p || q) over laws q with q[i] >= q[j] for all (i, j) in `above`.

    At the tightest tolerance SLSQP may stop at the optimum and call its line search a failure, depending on the
    machine's rounding. So several tolerances are asked and what counts is whether a point is feasible, not the flag.
    """
    constraints = [{"type": "eq", "fun": lambda z: z.sum() - 1.0}]
    constraints += [{"type": "ineq", "fun": lambda z, i=i, j=j: z[i] - z[j]} for i, j in above]

    def cost(z):
        return float((p * np.log(p / z)).sum())

    start = 0.5 * p + 0.5 / len(p)
    values = []
    for tolerance in (1e-15, 1e-13, 1e-11):
        z = minimize(cost, start, jac=lambda z: -p / z, bounds=[(1e-9, 1)] * len(p), constraints=constraints,
                     options={"ftol": tolerance, "maxiter": 1000}).x  # fmt: skip
        feasible = abs(z.sum() - 1) < 1e-9 and all(z[i] - z[j] > -1e-9 for i, j in above)
        values += [cost(z)] if feasible else []
    return min(values)


def random_laws(count: int, size: int) -> Array:
    return np.random.default_rng(6).dirichlet(np.ones(size), size=count)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_among_top_is_the_projection_over_every_violation(m):
    for p in random_laws(4, 5):
        best, others = int(p.argmax()), np.delete(np.arange(5), p.argmax())
        least = min(least_kl(p, [(int(i), best) for i in group]) for group in itertools.combinations(others, m))
        assert greedy.among_top(p, m) == pytest.approx(least, abs=1e-7)


@pytest.mark.parametrize("rule", ["margin", "factor", "top", "typical"])
def test_relaxed_rules_are_the_projection_over_every_violation(rule):
    for p in random_laws(4, 5):
        accepted = {
            "margin": greedy.within_margin(p, 0.1),
            "factor": greedy.within_factor(p, 0.6),
            "top": greedy.within_top(p, 2),
            "typical": p > lossy.typical_floor(p, eps=0.3, delta=0.6),
        }[rule]
        if accepted.all():
            assert np.isinf(greedy.accepted_if(p, accepted))
            continue
        outside = np.flatnonzero(~accepted)
        least = min(least_kl(p, [(int(y), i) for i in range(5) if i != y]) for y in outside)
        assert greedy.accepted_if(p, accepted) == pytest.approx(max(0.0, least), abs=1e-7)


@settings(max_examples=50)
@given(rows(5))
def test_strict_closed_form_and_agreement_of_the_three(p):
    top = np.sort(p)[::-1]
    a, b = top[0], top[1]
    closed = sum(x * np.log(2 * x / (a + b)) for x in (a, b) if x > 0)
    assert greedy.strict(p) == pytest.approx(max(closed, 0.0), abs=1e-14)
    assert greedy.accepted_if(p, greedy.within_top(p, 1)) == pytest.approx(float(greedy.strict(p)), abs=1e-14)
    assert greedy.strict(p) <= np.log(2) + 1e-15


@given(rows(6), st.integers(1, 5))
def test_bounds_and_monotonicity(p, m):
    value = float(greedy.among_top(p, m))
    assert 0.0 <= value <= np.log(m + 1) + 1e-14
    if m > 1:
        assert value >= greedy.among_top(p, m - 1) - 1e-14
    relaxed = [float(greedy.accepted_if(p, greedy.within_top(p, j))) for j in range(1, 7)]
    assert all(a <= b + 1e-14 for a, b in itertools.pairwise(relaxed))
    assert np.isinf(relaxed[-1])


@given(rows(5), rows(5))
def test_a_drafter_closer_than_the_certificate_is_accepted(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = float(np.where(p > 0, p * np.log(p / q), 0.0).sum())
    best = int(p.argmax())
    if kl < greedy.strict(p) - 1e-12:
        assert q.argmax() == best and (np.delete(q, best) < q[best]).all()
    if kl < greedy.among_top(p, 2) - 1e-12:
        assert (q >= q[best]).sum() <= 2
    accepted = greedy.within_factor(p, 0.5)
    if kl < greedy.accepted_if(p, accepted) - 1e-12:
        assert accepted[q.argmax()]


def test_small_margins_suprema_and_rows():
    margin = 1e-3
    p = np.array([0.35 + margin / 2, 0.35 - margin / 2, 0.3])
    assert greedy.strict(p) == pytest.approx(margin**2 / (2 * 0.7), rel=1e-5)
    for m in (1, 2, 4):
        assert greedy.among_top(np.eye(6)[2], m) == pytest.approx(np.log(m + 1))
    laws = random_laws(7, 6)
    assert greedy.among_top(laws, 3)[4] == pytest.approx(float(greedy.among_top(laws[4], 3)), abs=1e-15)
    accepted = greedy.within_margin(laws, 0.05)
    assert greedy.accepted_if(laws, accepted)[2] == pytest.approx(float(greedy.accepted_if(laws[2], accepted[2])))
    assert greedy.accepted_if([0.6, 0.4], [False, True]) == 0.0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: greedy.strict([1.0]), "m"),
        (lambda: greedy.among_top([0.5, 0.5], 2), "m"),
        (lambda: greedy.accepted_if([0.5, 0.5], [1, 0]), "accepted"),
        (lambda: greedy.accepted_if([0.5, 0.5], [True]), "accepted"),
        (lambda: greedy.within_margin([0.5, 0.5], -1.0), "margin"),
        (lambda: greedy.within_factor([0.5, 0.5], 1.5), "factor"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
