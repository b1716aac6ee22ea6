"""Shared rows against enumeration, and the shrinkage of rates against its definition and by simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from outrider.theory.shared_rows import SharedRows
from outrider.theory.shrinkage import STRONGEST, Prior, prior


def instances(count: int, sequences: int, depth: int) -> list[np.ndarray]:
    """Survivals [B, D] of random conditional acceptances, some of them certain and some impossible."""
    draws = np.random.default_rng(5)
    out = []
    for _ in range(count):
        chances = draws.uniform(size=(sequences, depth))
        chances[draws.uniform(size=chances.shape) < 0.1] = 1.0
        chances[draws.uniform(size=chances.shape) < 0.1] = 0.0
        out.append(np.cumprod(chances, axis=1))
    return out


def gain(survival: np.ndarray, lengths: tuple[int, ...]) -> float:
    return float(sum(row[:n].sum() for row, n in zip(survival, lengths, strict=True)))


def test_no_other_use_of_the_rows_gains_more() -> None:
    for survival in instances(30, 3, 4):
        shared = SharedRows(survival)
        for rows, deepest in product(range(13), range(5)):
            share = shared.share(rows, deepest)
            every = [x for x in product(range(deepest + 1), repeat=3) if sum(x) <= rows]
            assert share.gain == pytest.approx(max(gain(survival, x) for x in every), abs=1e-12)
            assert share.gain == pytest.approx(gain(survival, share.lengths), abs=1e-12)
            assert share.rows == sum(share.lengths) <= rows and max(share.lengths) <= deepest
            assert shared.gains(rows)[deepest] == pytest.approx(share.gain, abs=1e-12)


@pytest.mark.parametrize("dear", [0.05, 0.3])
def test_no_other_lengths_at_all_are_faster(dear) -> None:
    seconds = lambda rows, deepest: max(1.0, 0.7 + dear * (3 + rows)) + 0.08 * deepest  # noqa: E731
    for survival in instances(15, 3, 4):
        share = SharedRows(survival).best(seconds)
        speed = lambda x: (3 + gain(survival, x)) / seconds(sum(x), max(x))  # noqa: B023, E731
        assert speed(share.lengths) == pytest.approx(max(speed(x) for x in product(range(5), repeat=3)), rel=1e-12)


def test_equal_sequences_get_equal_lengths() -> None:
    survival = np.tile(0.7 ** np.arange(1, 6), (4, 1))
    for length in range(6):
        assert SharedRows(survival).share(4 * length).lengths == (length,) * 4


def test_without_sequences_there_is_nothing_to_share() -> None:
    shared = SharedRows(np.empty((0, 3)))
    assert shared.share(4.0).lengths == () and shared.gains(4.0).tolist() == [0.0] * 4


def test_rows_that_gain_nothing_are_not_taken() -> None:
    share = SharedRows([[0.5, 0.0, 0.0], [0.9, 0.8, 0.0]]).share(100.0)
    assert share.lengths == (1, 2) and share.rows == 3.0


def test_rows_that_are_seldom_proposed_cost_less() -> None:
    """A sequence whose drafter proposes in a quarter of the steps: four of its rows cost one, and gain what one gains."""
    share = SharedRows([[0.9, 0.8], [0.5, 0.4]], use=[0.25, 1.0]).share(1.5)
    assert share.lengths == (2, 1) and share.rows == pytest.approx(1.5)
    assert share.gain == pytest.approx(0.25 * 1.7 + 0.5)
    wide = SharedRows([[0.9, 0.8], [0.5, 0.4]], use=[4.0, 1.0]).share(1.0)
    assert wide.lengths == (0, 1), "a level of a tree of four rows gains less per row"


def test_the_posterior_is_that_of_the_beta_distribution() -> None:
    mean, strength, hits, tries = 0.3, 5.0, 4.0, 9.0
    grid = (np.arange(20000) + 0.5) / 20000
    weight = grid ** (strength * mean + hits - 1) * (1 - grid) ** (strength * (1 - mean) + tries - hits - 1)
    assert Prior(mean, strength).posterior(hits, tries) == pytest.approx((grid * weight).sum() / weight.sum(), abs=1e-6)


def test_the_moments_are_exact_in_expectation() -> None:
    """Of two rates and three tries each, all outcomes enumerated: E[Q] is what `prior` solves."""
    m, s, n, k = 0.4, 3.0, 3, 2
    rho = 1 / (s + 1)
    rise = lambda x, j: np.prod([x + i for i in range(j)])  # noqa: E731
    from math import comb

    chance = [comb(n, h) * rise(s * m, h) * rise(s * (1 - m), n - h) / rise(s, n) for h in range(n + 1)]
    assert sum(chance) == pytest.approx(1.0)
    spread = k * sum(c * n * (h / n - m) ** 2 for h, c in enumerate(chance))
    assert spread == pytest.approx(m * (1 - m) * (k + rho * (n * k - k)), rel=1e-12)


def test_shrunk_rates_are_nearer_to_the_truth_than_shares_and_than_the_mean() -> None:
    """Beta rates, 12 tries each: the mean squared error of the estimate beside that of the two it lies between. With 4,000 rates a
    tenth of difference lies beyond one chance in a billion."""
    draws = np.random.default_rng(2)
    truth = draws.beta(0.6 * 4, 0.4 * 4, size=4000)
    tries = np.full(4000, 12.0)
    hits = draws.binomial(12, truth).astype(float)
    found = prior(hits, tries)
    assert found.mean == pytest.approx(0.6, abs=0.03) and found.strength == pytest.approx(4.0, rel=0.2)
    error = lambda guess: float(((guess - truth) ** 2).mean())  # noqa: E731
    assert error(found.posterior(hits, tries)) < 0.9 * min(error(hits / tries), error(np.full(4000, found.mean)))


def test_equal_rates_are_told_to_be_equal() -> None:
    """A control: with one rate for all, nothing is left of the differences of shares."""
    draws = np.random.default_rng(3)
    hits = draws.binomial(40, 0.7, size=400).astype(float)
    found = prior(hits, np.full(400, 40.0))
    assert found.strength > 200 and np.ptp(found.posterior(hits, 40.0)) < 0.1 * np.ptp(hits / 40)


def test_without_evidence_the_guess_stays() -> None:
    guess = Prior(0.3, 7.0)
    assert prior([], [], guess) == guess and prior([0.0], [0.0], guess) == guess
    assert prior([1.0], [1.0], guess).strength == 7.0
    assert prior([5.0, 5.0], [10.0, 10.0], Prior(0.5, 1.0)).strength == STRONGEST
