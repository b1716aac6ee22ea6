"""What rejections cost a target whose state cannot be cut: the formula against a simulation of the rule itself, and its limits."""

from __future__ import annotations

import doctest
import random

import numpy as np
import pytest

from outrider.theory import recurrent
from outrider.theory.recurrent import MERGED, best_length, gathered, reread, speedup
from outrider.theory.speedup import tokens_per_call


def simulate(acceptance: list[float], calls: int, seed: int, merged: int = MERGED) -> tuple[np.ndarray, np.ndarray]:
    """[calls] tokens read again, and whether they had a forward of their own, by keeping the text itself."""
    chance, behind, rows, forwards = random.Random(seed), list[str](), np.zeros(calls), np.zeros(calls)
    for i in range(calls):
        rows[i], forwards[i] = len(behind), len(behind) > merged
        if forwards[i]:
            behind = []
        accepted = next((d for d, a in enumerate(acceptance) if chance.random() >= a), len(acceptance))
        behind = [] if accepted == len(acceptance) else [*behind, "anchor", *["draft"] * accepted]
    return rows, forwards


@pytest.mark.parametrize("acceptance", [[0.5], [0.8] * 4, [0.9, 0.5, 0.2], [0.3] * 8])
def test_the_formula_is_the_mean_of_the_rule(acceptance: list[float]) -> None:
    """Means of 400 independent runs of 300 calls behind a run-in: 6.2 standard errors, one false alarm in a billion."""
    found = reread(acceptance)
    runs = [simulate(acceptance, 400, seed) for seed in range(400)]
    for exact, k in ((found.rows, 0), (found.forwards, 1)):
        if exact < 1e-3:  # too seldom to be counted here
            continue
        means = np.array([run[k][100:].mean() for run in runs])
        error = means.std(ddof=1) / len(means) ** 0.5
        assert abs(means.mean() - exact) < 6.2 * error + 1e-9
        assert (
            abs(means.mean() - 1.05 * exact) > 6.2 * error or exact < 0.2
        )  # negative control: five per cent off is seen


def test_limits() -> None:
    assert reread([1.0] * 5).rows == 0.0
    assert speedup([1.0] * 5, 0.0, 1.0, 0.5) == pytest.approx(6.0)
    assert speedup([0.8] * 4, 0.05) <= speedup(
        [0.8] * 4, 0.05, merged=1000
    )  # without a cost of rows a forward is what counts
    assert speedup([0.8] * 4, 0.05, 1.0, 0.05) > speedup([0.8] * 4, 0.05, 1.0, 0.05, merged=1000)


def test_the_best_draft_is_shorter_where_tokens_are_read_again_and_none_where_it_does_not_pay() -> None:
    assert best_length(0.3, 8, 0.02, 0.15) == (0, 1.0)
    longest = [best_length(0.8, 8, 0.02, cost)[0] for cost in (0.0, 0.01, 0.05)]
    assert longest == sorted(longest, reverse=True)


def stationary(acceptance: list[float], merged: int) -> tuple[float, float]:
    """The same by the Markov chain of what has gathered before a call: its stationary distribution, as a linear system."""
    reached = np.concatenate([[1.0], np.cumprod(acceptance)])
    lost, states = reached[:-1] - reached[1:], merged + len(acceptance) + 1
    step = np.zeros((states, states))
    for before in range(states):
        kept = before if before <= merged else 0
        step[before, 0] += reached[-1]
        for d, chance in enumerate(lost):
            step[before, kept + d + 1] += chance
    system = np.vstack([step.T - np.eye(states), np.ones(states)])
    share = np.linalg.lstsq(system, np.append(np.zeros(states), 1.0), rcond=None)[0]
    return float(share @ np.arange(states)), float(share[merged + 1 :].sum())


@pytest.mark.parametrize("acceptance", [[0.0], [1.0], [0.5], [0.8] * 4, [0.9, 0.5, 0.2], [0.3] * 8, [1.0, 0.0]])
@pytest.mark.parametrize("merged", [1, 5, MERGED])
def test_the_closed_form_is_the_stationary_distribution(acceptance: list[float], merged: int) -> None:
    found = reread(acceptance, merged)
    assert (found.rows, found.forwards) == pytest.approx(stationary(acceptance, merged), abs=1e-9)


def test_without_a_limit_it_is_one_replay_times_the_calls_until_a_draft_is_kept() -> None:
    for alpha, n in ((0.8, 4), (0.95, 6), (0.6, 2)):
        kept = alpha**n
        assert gathered([alpha] * n) == pytest.approx((tokens_per_call(alpha, n) - (n + 1) * kept) / kept)
        assert gathered([alpha] * n) == pytest.approx(reread([alpha] * n, 3000).rows)
    assert gathered([1.0]) == 0.0 and gathered([0.5, 0.0]) == float("inf")


def test_the_examples_are_right() -> None:
    assert not doctest.testmod(recurrent).failed
