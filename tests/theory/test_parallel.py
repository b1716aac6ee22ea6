"""Drafting in parallel: closed forms against simulated clocks, limits, and where it loses."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.theory import parallel
from outrider.theory.speedup import speedup, tokens_per_call
from tests.theory.instances import Z

V = [1.0, 1.01, 1.06, 1.12, 1.17, 1.21, 1.28, 1.36]
"""A measured verification cost: of a packed model of 160 million parameters, by drafts."""


def clock(step, tokens: int = 60_000) -> tuple[float, float]:
    """(rate, its standard error) of a simulated scheme. step: (rng, state) -> (tokens, time, state)."""
    rng, state, made, spent = np.random.default_rng(1), None, [], []
    while sum(made[-1:]) < tokens and len(made) < tokens:
        out, time, state = step(rng, state)
        made.append(out)
        spent.append(time)
    out, time = np.array(made, float), np.array(spent)
    rate = out.sum() / time.sum()
    block = len(out) // 200  # neighbouring steps depend on each other
    surplus = (out - rate * time)[: 200 * block].reshape(200, block).sum(1)
    return rate, float(surplus.std(ddof=1) * np.sqrt(200) / time.sum())


@pytest.mark.parametrize(("alpha", "length", "cost"), [(0.8, 4, 0.2), (0.6, 3, 0.5), (0.9, 6, 0.05)])
def test_pearl_by_its_clock(alpha: float, length: int, cost: float) -> None:
    """Two processes, coins tossed token by token. The first block after a rejection has `length` drafts here, as in the formula."""

    def step(rng, block):
        if not block:  # the first draft alone, while the block is made
            time = max(length * cost, 1.0)
            return 1, time, bool(rng.random() < alpha)
        kept = int((np.cumprod(rng.random(length if block == 2 else length - 1) < alpha)).sum())
        time = max(length * cost, V[length - 1])
        whole = kept == (length if block == 2 else length - 1)
        return kept + (not whole), time, 2 if whole else 0

    rate, error = clock(step)
    assert abs(rate - parallel.pearl_rate(alpha, length, cost, V)) < Z * error
    assert abs(rate - parallel.pearl_rate(alpha, length + 1, cost, V)) > Z * error  # negative control


@pytest.mark.parametrize(("alpha", "cost", "hit"), [(0.8, 0.1, 0.85), (0.6, 0.3, 0.5), (0.9, 0.3, 1.0)])
def test_speculated_outcomes_by_their_clock(alpha: float, cost: float, hit: float) -> None:
    def step(rng, there):
        kept = int((np.cumprod(rng.random(4) < alpha)).sum())
        wait = 0.0 if there or there is None else 4 * cost
        return kept + 1, wait + max(V[4], 4 * cost), bool(rng.random() < hit)

    rate, error = clock(step)
    assert abs(rate - parallel.speculated_rate(alpha, 4, cost, hit, V)) < Z * error
    assert abs(rate - speedup(alpha, 4, cost, V)) > Z * error  # sequential: every draft is waited for


def test_the_table_of_two_devices() -> None:
    """Rates at the best length for a draft model of 5 to 30% of the target, as computed independently (in tokens per forward)."""
    expected = {
        (0.6, 0.1): (1.56, 1.40, 1.87, 2.17),
        (0.8, 0.05): (2.53, 2.12, 2.98, 4.17),
        (0.8, 0.1): (2.16, 2.12, 2.88, 3.57),
        (0.8, 0.2): (1.72, 2.00, 2.71, 2.78),
        (0.9, 0.1): (2.78, None, None, 5.26),
        (0.9, 0.3): (1.73, 2.19, 2.97, 2.70),
    }
    lengths = range(1, 8)
    for (alpha, cost), row in expected.items():
        found = (
            max(speedup(alpha, n, cost, V) for n in lengths),
            parallel.best([parallel.pearl_rate(alpha, n, cost, V) for n in lengths])[1],
            parallel.best([parallel.speculated_rate(alpha, n, cost, 0.85, V) for n in lengths])[1],
            parallel.unlimited_rate(alpha, cost),
        )
        for x, y in zip(found, row, strict=True):
            assert y is None or x == pytest.approx(y, abs=0.006), (alpha, cost)


@given(alpha=st.floats(0, 1), cost=st.floats(0, 1), length=st.integers(1, 7))
def test_limits(alpha: float, cost: float, length: int) -> None:
    """Certain hits with free preparation hide the drafting, certain misses are sequential decoding."""
    rate = parallel.speculated_rate(alpha, length, cost, 0.0, V, branch_cost=0.0)
    assert rate == pytest.approx(speedup(alpha, length, cost, V))
    hidden = parallel.speculated_rate(alpha, length, cost, 1.0, V, branch_cost=0.0)
    assert hidden == pytest.approx(tokens_per_call(alpha, length) / V[length])
    pearl = parallel.pearl_rate(alpha, length, cost)
    assert 0 < pearl <= length * (1 + 1e-12)
    if cost > 0:
        assert pearl <= 1 / (1 - alpha) if alpha < 1 else pearl <= 1 / cost * (1 + 1e-9)
        assert parallel.unlimited_rate(alpha, cost) >= 1 - 1e-12


def test_shared_cores_lose() -> None:
    """On two cores that share a bus a target on one of them takes twice as long, and drafting beside it is a loss."""
    for alpha, cost in (0.8, 0.1), (0.8, 0.2), (0.9, 0.1):
        sequential = max(speedup(alpha, n, cost, V) for n in range(1, 8))
        split = max(parallel.shared_cores_rate(alpha, n, cost, 2.0, V) for n in range(1, 8))
        assert 0.45 < split / sequential < 0.75
        free = max(parallel.shared_cores_rate(alpha, n, cost, 1.0, V) for n in range(1, 8))
        assert free == pytest.approx(max(parallel.pearl_rate(alpha, n, cost, V) for n in range(1, 8)))


@given(alpha=st.floats(0.05, 0.95), length=st.integers(1, 6), decay=st.floats(0.2, 3.0))
def test_the_fan_out_misses_least(alpha: float, length: int, decay: float) -> None:
    counts = parallel.fan_out(alpha, length, 1000.0 * length, decay)
    assert counts.sum() == pytest.approx(1000.0 * length)
    least = parallel.miss_probability(alpha, np.maximum(counts, 1.0), decay)
    moved = counts.copy()
    moved[0] *= 0.9
    moved[1] += 0.1 * counts[0]
    if counts.min() > 2:
        assert least <= parallel.miss_probability(alpha, moved, decay) * (1 + 1e-9)


def test_doctests() -> None:
    result = doctest.testmod(parallel)
    assert result.attempted >= 6 and result.failed == 0


def test_refusals() -> None:
    for wrong in (
        lambda: parallel.pearl_rate(1.1, 3, 0.1),
        lambda: parallel.pearl_rate(0.8, 0, 0.1),
        lambda: parallel.unlimited_rate(0.8, 1.5),
        lambda: parallel.fan_out(0.8, 2, 10, 0.0),
        lambda: parallel.miss_probability(0.8, [0.5, 2], 1.0),
        lambda: parallel.shared_cores_rate(0.8, 3, 0.1, 0.5),
        lambda: parallel.best([]),
    ):
        with pytest.raises(ValueError):
            wrong()
