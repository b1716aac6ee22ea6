"""Experts touched by the rows of a verification: the formula against enumeration and simulation, and what follows from it."""

from __future__ import annotations

import doctest
from itertools import combinations, pairwise, product

import numpy as np
import pytest

from outrider.theory import experts
from outrider.theory.experts import Routing, VerificationCost, best_length, possible_gain, simulate_touched
from outrider.theory.hardware import HARDWARE, MODELS
from outrider.theory.roofline import Setting, forward, predict

SIX_SIGMA = 6.2
"""Standard errors that a mean is off by once in a billion."""


def test_doctests() -> None:
    result = doctest.testmod(experts)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("repeat", [0.0, 0.4, 1.0])
def test_the_formula_is_the_enumerated_mean(repeat: float) -> None:
    """Every sequence of three rows' sets of 2 of 4 experts, with sets of unequal, dependent probability."""
    sets = list(combinations(range(4), 2))
    weight = np.array([0.35, 0.05, 0.2, 0.1, 0.05, 0.25])
    share = [sum(w for w, s in zip(weight, sets, strict=True) if e in s) for e in range(4)]
    total = mass = 0.0
    for path in product(range(6), repeat=3):
        p = weight[path[0]]
        for above, below in pairwise(path):
            p *= (1 - repeat) * weight[below] + repeat * (above == below)
        total += p * len(set().union(*(sets[i] for i in path)))
        mass += p
    assert mass == pytest.approx(1.0, abs=1e-12)
    assert Routing(tuple(share), repeat).touched(3) == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize(("rows", "sequences", "repeat"), [(1, 1, 0.0), (5, 1, 0.0), (5, 1, 0.6), (3, 2, 0.3)])
def test_the_formula_is_the_simulated_mean(rows: int, sequences: int, repeat: float) -> None:
    """Unequal shares of 24 experts. False-alarm rate one in a billion; the formula without repeats must fail where rows repeat."""
    share = np.random.default_rng(1).uniform(0.5, 2.0, 24)
    routing = Routing(tuple((6 * share / share.sum()).tolist()), repeat)
    mean, error = simulate_touched(routing, rows, samples=1500, sequences=sequences)
    assert abs(mean - routing.touched(rows, sequences)) <= SIX_SIGMA * error + 1e-9
    if repeat:
        assert abs(mean - Routing(routing.share).touched(rows, sequences)) > SIX_SIGMA * error


def test_statistics_of_a_router_give_the_routing_back() -> None:
    """6000 rows of 4 of 16 experts that repeat with probability 0.5. Tolerance: 6 standard errors of a share, widened for the
    correlation of rows (a factor 3), and 0.05 of the repeat, above 6 of its."""
    truth, rng, current = Routing.uniform(16, 4, 0.5), np.random.default_rng(3), None
    rows = []
    for _ in range(6000):
        if current is None or rng.random() >= truth.repeat:
            current = rng.permutation(16)[:4]
        rows.append(current)
    found = Routing.measured(np.array(rows), 16)
    assert np.abs(np.array(found.share) - 0.25).max() < 6 * (3 * 0.25 * 0.75 / 6000) ** 0.5
    assert abs(found.repeat - 0.5) < 0.05 and found.used == pytest.approx(4.0)


def test_limits() -> None:
    routing = Routing.uniform(64, 8, 0.3)
    counts = [routing.touched(n) for n in range(1, 200)]
    assert counts[0] == pytest.approx(8.0) and counts[-1] == pytest.approx(64.0, abs=1e-3)
    assert all(a < b for a, b in pairwise(counts))
    assert Routing.uniform(4, 4).touched(9) == 4.0 and Routing.uniform(64, 8, 1.0).touched(9) == pytest.approx(8.0)
    assert VerificationCost(routing, 0.0).relative(8) == 1.0
    for bad in (
        lambda: Routing((1.5,)),
        lambda: Routing.uniform(4, 5),
        lambda: routing.touched(0),
        lambda: Routing((0.1,), 2.0),
    ):
        with pytest.raises(ValueError):
            bad()


def test_a_mixture_shortens_drafts_where_a_dense_model_of_its_active_size_does_not() -> None:
    """Same weights per row, same acceptance: the mixture's best length is the shorter, and the dense choice is slower on it."""
    cost = VerificationCost(Routing.uniform(64, 8, 0.3), 0.8)
    sparse = [cost.relative(n) for n in range(1, 10)]
    for acceptance in (0.5, 0.7, 0.9):
        length, speed = best_length(acceptance, 0.01, sparse)
        dense, _ = best_length(acceptance, 0.01, [1.0] * 9)
        worse = experts.tokens_per_call(acceptance, dense) / (sparse[dense] + 0.01 * dense)
        assert length <= dense and speed >= worse
        assert (length < dense and speed > 1.05 * worse) or acceptance == 0.9


def test_no_choice_of_a_length_gains_more_than_is_possible() -> None:
    """The gain over a length is that of the best one, so it is at least 1 over each, and 1 over the best itself."""
    times = [VerificationCost(Routing.uniform(64, 8, 0.4), 0.8).relative(n) for n in range(1, 10)]
    for acceptance in (0.0, 0.5, 0.8, 1.0):
        length, speed = best_length(acceptance, 0.02, times)
        gains = [possible_gain(acceptance, 0.02, times, n) for n in range(9)]
        assert min(gains) == gains[length] == pytest.approx(1.0) and gains[0] == pytest.approx(speed)
    with pytest.raises(ValueError, match="10 rows"):
        possible_gain(0.5, 0.0, times, 9)


def test_the_roofline_reads_the_touched_experts() -> None:
    """One row reads the active weights, many rows all of them; arithmetic is that of the active ones."""
    model, setting = MODELS["30b-a3b"], Setting(HARDWARE["h100"], batch=1, context=0)
    assert model.active == pytest.approx(3.35e9, rel=0.01)  # 3.3 billion by its authors
    assert model.read_bytes(rows=1) == pytest.approx(2 * model.active)
    assert model.read_bytes(rows=10_000) == pytest.approx(model.weight_bytes())
    assert forward(model, setting, 4).seconds > 2 * forward(model, setting, 1).seconds
    assert forward(MODELS["8b"], setting, 4).seconds == forward(MODELS["8b"], setting, 1).seconds
    assert (
        predict(model, MODELS["0.6b"], setting, 0.8).best.length
        < predict(MODELS["8b"], MODELS["0.6b"], setting, 0.8).best.length
    )
