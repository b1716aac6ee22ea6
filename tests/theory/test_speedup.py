"""Closed forms of speed-up: the published values, sums against formulas, simulation, and the edges."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.theory import speedup as s

ALPHA = st.floats(0.0, 1.0)
COST = st.floats(0.0, 2.0)
Z = 6.2
"""Two-sided normal tail 6e-10: false alarm of one assertion below 1e-9."""


def test_doctests() -> None:
    result = doctest.testmod(s)
    assert result.attempted >= 10 and not result.failed


def test_a_break_even_point_imports_no_scipy() -> None:
    """A server asks for one in the middle of its work, and the import takes a second and 50 MB."""
    code = "import sys; from outrider.theory import speedup as s; s.break_even_acceptance(3, 0.0, 1.5); "
    code += "print('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("alpha", "cost", "length", "value"),
    [(0.8, 0.05, 8, 3.092), (0.6, 0.1, 3, 1.674), (0.9, 0.02, 19, 6.365), (0.5, 0.4, 1, 1.071)],
)
def test_best_lengths_of_the_literature(alpha: float, cost: float, length: int, value: float) -> None:
    best = s.best_length(alpha, cost)
    assert best.length == length
    assert best.speedup == pytest.approx(value, abs=5e-4)
    assert abs(s.best_length_continuous(alpha, cost) - length) < 1


@given(alpha=ALPHA, length=st.integers(0, 40))
def test_sum_of_powers(alpha: float, length: int) -> None:
    terms = [alpha**i for i in range(length + 1)]
    assert s.tokens_per_call(alpha, length) == pytest.approx(math.fsum(terms), rel=1e-9)
    assert s.tokens_per_call_by_position([alpha] * length) == pytest.approx(math.fsum(terms), rel=1e-9)
    assert s.tokens_per_call_root(alpha, alpha, length) == pytest.approx(math.fsum(terms), rel=1e-9)
    without = math.fsum(terms[:-1]) if length else 1.0
    assert s.tokens_per_call(alpha, length, bonus=False) == pytest.approx(without, rel=1e-9)


def test_edges() -> None:
    assert s.tokens_per_call(0.0, 7) == 1.0
    assert s.tokens_per_call(1.0, 7) == 8.0
    assert s.tokens_per_call(1.0, 7, bonus=False) == 7.0
    assert s.tokens_per_call(0.75, math.inf) == 4.0
    assert s.tokens_per_call(1.0, math.inf) == math.inf
    assert s.tokens_per_call(0.75, 500) == pytest.approx(4.0, rel=1e-12)
    assert s.tokens_per_call_by_position([]) == 1.0
    assert s.tokens_per_call_root(1.0, 0.3, 0) == 1.0
    assert s.tokens_per_call_tree(0.5, 2) == pytest.approx(1.75)


def test_simulated_calls() -> None:
    rng, runs, alpha, length = np.random.default_rng(5), 40_000, 0.7, 3
    coins = rng.random((runs, length)) < alpha
    accepted = np.cumprod(coins, axis=1).sum(1)
    power = alpha ** np.arange(length + 1)
    mean = s.tokens_per_call(alpha, length) - 1
    second = sum((2 * k - 1) * power[k] for k in range(1, length + 1))  # E[X^2] from the survival function
    error = math.sqrt((second - mean**2) / runs)
    assert abs(accepted.mean() - mean) < Z * error
    wrong = s.tokens_per_call(alpha, length + 1) - 1  # negative control: one power too many is seen
    assert abs(accepted.mean() - wrong) > Z * error


@given(alpha=ALPHA, cost=st.floats(0.001, 0.999))
def test_one_draft_helps_exactly_above_its_cost(alpha: float, cost: float) -> None:
    if alpha > cost + 1e-9:
        best = s.best_length(alpha, cost)
        assert best.speculate
        assert best.speedup >= (1 + alpha) / (1 + cost) - 1e-12
    elif alpha < cost - 1e-9:
        assert not s.best_length(alpha, cost).speculate


@given(alpha=st.floats(0.05, 0.97), cost=st.floats(0.01, 1.0))
def test_continuous_length_is_stationary(alpha: float, cost: float) -> None:
    root = s.best_length_continuous(alpha, cost)

    def value(g: float) -> float:
        return (1 - alpha ** (g + 1)) / ((1 - alpha) * (g * cost + 1))

    around = [value(max(root + d, 0.0)) for d in (-1e-3, 1e-3)]
    assert value(root) >= max(around) - 1e-12
    scanned = s.best_length(alpha, cost, longest=400).length
    assert scanned in (math.floor(root), math.ceil(root))


@given(length=st.integers(1, 12), cost=COST, verify=st.floats(0.5, 3.0))
def test_break_even(length: int, cost: float, verify: float) -> None:
    alpha = s.break_even_acceptance(length, cost, verify)
    if alpha == math.inf:
        assert s.speedup(1.0, length, cost, verify) < 1
    elif alpha == 0.0:
        assert s.speedup(0.0, length, cost, verify) >= 1
    else:
        assert s.speedup(alpha, length, cost, verify) == pytest.approx(1.0, abs=1e-9)


def test_verification_costs_in_three_ways() -> None:
    table = [1.0, 1.0, 1.1, 1.3, 2.9]
    by_list = s.best_length(0.8, 0.05, table, longest=4)
    by_function = s.best_length(0.8, 0.05, lambda g: table[g], longest=4)
    assert by_list == by_function
    assert by_list.length == 3  # the jump at 4 is not worth its token
    assert s.wall_clock_speedup(2.0, 3, 0.01, 0.001, 0.013) == pytest.approx(2.0 * 10 / 16)
    assert s.operation_factor(0.0, 4, 0.1) == pytest.approx(5.4)
    assert s.operation_factor(1.0, 4, 0.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: s.tokens_per_call(1.2, 3), "alpha"),
        (lambda: s.tokens_per_call(0.5, -1), "length"),
        (lambda: s.tokens_per_call(0.5, 1.5), "length"),
        (lambda: s.tokens_per_call_by_position([0.5, float("nan")]), "acceptance"),
        (lambda: s.tokens_per_call_by_position([0.5, 1.5]), r"acceptance\[1\]"),
        (lambda: s.speedup(0.5, 3, -0.1), "draft_cost"),
        (lambda: s.speedup(0.5, 3, 0.1, [1.0, 1.0]), "verify_cost has 2 entries"),
        (lambda: s.best_length_continuous(1.0, 0.1), "alpha"),
        (lambda: s.best_of([1.2, 1.4], 0.1), "start with 1"),
        (lambda: s.wall_clock_speedup(0.5, 1, 1, 1, 1), "tokens"),
        (lambda: s.wall_clock_speedup(1.5, 0, 1, 1, 0), "positive"),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
