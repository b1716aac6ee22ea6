"""Simulation against exact values. Fixed seeds; a correct program fails one of these with probability below 1e-9 each."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import chi2

from outrider.theory import chains, exact, rejections, simulate
from outrider.theory.chains import Chain
from outrider.theory.simulate import Estimate, Simulation
from tests.theory.instances import ALARM, Array, Z, spiky

RUNS = 20_000


def chi_square(result: Simulation, law: Array) -> tuple[float, float]:
    """(statistic, its critical value) of the outputs against `law` (V, ..., V); impossible outputs are infinite."""
    counts = np.bincount(np.ravel_multi_index(tuple(result.tokens.T), law.shape), minlength=law.size)
    expected = law.ravel() * len(result.tokens)
    if counts[expected == 0].any():
        return math.inf, 0.0
    rare = expected < 10  # pooled: the statistic is chi-square only where expected counts are not small
    seen = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    keep = wanted > 0
    return float(((seen - wanted)[keep] ** 2 / wanted[keep]).sum()), float(chi2.isf(ALARM, keep.sum() - 1))


@pytest.mark.parametrize(
    ("drafts", "length"), [(1, None), (2, None), (4, None), (5, None), (1, 0), (1, 3), (2, 4), (1, 1)]
)
def test_the_papers_chain(drafts: int, length: int | None) -> None:
    """20,000 runs of 50 tokens over 7 states, as in Figure 2; exact mean and standard deviation."""
    result = simulate.speculative(chains.best_guess(), RUNS, 1, drafts, length)
    for estimate in (result.rejections, result.oracle_calls):
        assert estimate.z is not None and abs(estimate.z) < Z
        assert estimate.exact is not None
    np.testing.assert_array_equal(result.tokens.shape, (RUNS, 50))


@pytest.mark.parametrize("drafts", [1, 2, 3, 4, 5])
def test_mean_and_spread_for_every_number_of_drafts(drafts: int) -> None:
    chain = spiky(5, 20, seed=drafts, zeros=0.2)
    result = simulate.speculative(chain, RUNS, drafts, drafts)
    law = rejections.rejection_law(chain, drafts)
    assert result.rejections.z is not None and abs(result.rejections.z) < Z
    counts = result.rejected.sum(axis=1)
    values = np.arange(len(law.pmf)) - law.mean
    fourth = float(law.pmf @ values**4)
    spread = math.sqrt((fourth - law.variance**2) / RUNS)
    assert abs(((counts - law.mean) ** 2).mean() - law.variance) < Z * spread


def test_calls_are_counted_as_the_relation_says() -> None:
    result = simulate.speculative(chains.best_guess(), 500, 2, drafts=3)
    np.testing.assert_array_equal(result.calls, result.rejected.sum(axis=1) + 1 - result.rejected[:, -1])


@pytest.mark.parametrize(("drafts", "length"), [(1, None), (2, None), (3, None), (1, 1), (2, 2), (1, 0)], ids=str)
@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_outputs_follow_the_target(drafts: int, length: int | None, zeros: float) -> None:
    chain = spiky(4, 3, seed=21, zeros=zeros)
    statistic, critical = chi_square(simulate.speculative(chain, RUNS, 3, drafts, length), exact.target_law(chain))
    assert statistic < critical


@pytest.mark.parametrize(("states", "horizon", "length"), [(3, 4, None), (2, 6, None), (3, 4, 2), (2, 6, 3), (2, 6, 1)])
@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_block_verification_against_its_enumeration(
    states: int, horizon: int, length: int | None, zeros: float
) -> None:
    chain = spiky(states, horizon, seed=5, zeros=zeros)
    law = exact.block(chain, length)
    result = simulate.block(chain, RUNS, 4, length)
    statistic, critical = chi_square(result, exact.target_law(chain))
    assert statistic < critical
    for seen, pmf in ((result.rejected.sum(axis=1), law.rejections), (result.calls, law.calls)):
        k = np.arange(len(pmf))
        mean = float(pmf @ k)
        moments = rejections.Moments(mean, math.sqrt(max(0.0, float(pmf @ (k - mean) ** 2))))
        estimate = Estimate.of(seen, moments)
        assert estimate.z is not None and abs(estimate.z) < Z


@pytest.mark.parametrize("residual", simulate.RESIDUALS)
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.3])
def test_lossy_rules_follow_their_own_distribution(residual: str, epsilon: float) -> None:
    chain, accept = spiky(4, 3, seed=22), simulate.over_acceptance(epsilon)
    result = simulate.lossy(chain, RUNS, 5, accept, residual)
    law = exact.speculative(chain, accept=accept, residual=residual)
    statistic, critical = chi_square(result, law.output)
    assert statistic < critical
    assert result.rejections.exact == pytest.approx(law.expected_rejections, abs=1e-12)
    assert result.rejections.z is not None and abs(result.rejections.z) < Z
    calls = Estimate.of(result.calls, mean=law.expected_calls)
    assert calls.z is not None and abs(calls.z) < Z


def test_the_papers_chain_when_lossy() -> None:
    for residual in simulate.RESIDUALS:
        result = simulate.lossy(chains.best_guess(), RUNS, 6, simulate.over_acceptance(0.05), residual)
        assert result.rejections.z is not None and abs(result.rejections.z) < Z


def test_without_epsilon_the_lossy_rule_is_speculative_decoding() -> None:
    chain = chains.best_guess()
    result = simulate.lossy(chain, 100, 0, simulate.over_acceptance(0.0))
    assert result.rejections.exact == pytest.approx(rejections.expected_rejections(chain), abs=1e-11)


# -- negative controls: the same tests notice what is wrong -------------------------------------------------------------


def test_a_wrong_number_of_drafts_is_noticed() -> None:
    chain = chains.best_guess()
    result = simulate.speculative(chain, RUNS, 1, drafts=4)
    for wrong in (3, 5):
        estimate = Estimate.of(result.rejected.sum(axis=1), rejections.rejection_moments(chain, wrong))
        assert estimate.z is not None and abs(estimate.z) > Z


def test_a_lossy_output_is_noticed() -> None:
    chain = spiky(4, 3, seed=22)
    for accept, residual in ((simulate.over_acceptance(0.1), "optimal"), (simulate.over_acceptance(0.0), "draft")):
        statistic, critical = chi_square(simulate.lossy(chain, RUNS, 5, accept, residual), exact.target_law(chain))
        assert statistic > critical


def test_swapped_distributions_are_noticed() -> None:
    chain = spiky(4, 3, seed=22)
    swapped = Chain(chain.start, chain.target, chain.draft)
    statistic, critical = chi_square(simulate.block(swapped, RUNS, 5), exact.target_law(chain))
    assert statistic > critical


# -- the small print ---------------------------------------------------------------------------------------------------


def test_a_seed_repeats_and_another_does_not() -> None:
    chain = chains.best_guess()
    for run in (simulate.speculative, simulate.block):
        first, again, other = (run(chain, 50, seed).tokens for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


def test_degenerate_pairs() -> None:
    perfect, hopeless = chains.iid([0.3, 0.7], [0.3, 0.7], 5), chains.iid([1.0, 0.0], [0.0, 1.0], 5)
    for run in (simulate.speculative, simulate.block):
        good, bad = run(perfect, 50, 0), run(hopeless, 50, 0)
        assert not good.rejected.any() and (good.calls == 1).all()
        assert bad.rejected.all() and (bad.calls == 5).all() and (bad.tokens == 1).all()
    single = simulate.speculative(Chain([1.0], np.ones((3, 1, 1)), np.ones((3, 1, 1))), 10, 0)  # pyright: ignore
    assert single.rejections == Estimate(0.0, 0.0, 0.0, 0.0)


def test_an_estimate_says_how_far_it_is() -> None:
    samples, root = [1.0, 2.0, 3.0], math.sqrt(3)
    assert Estimate.of(samples) == Estimate(2.0, pytest.approx(1 / root), None, None)
    known = Estimate.of(samples, rejections.Moments(1.0, 3.0))
    assert known == Estimate(2.0, pytest.approx(root), 1.0, pytest.approx(1 / root))
    assert Estimate.of([2.0, 2.0], mean=2.0).z == 0.0
    assert Estimate.of([2.0, 2.0], mean=2.5).z == -math.inf


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda c: simulate.speculative(c, 1, 0), "runs"),
        (lambda c: simulate.speculative(c, 10, -1), "seed"),
        (lambda c: simulate.speculative(c, 10, 0, drafts=0), "drafts"),
        (lambda c: simulate.speculative(c, 10, 0, length=-1), "length"),
        (lambda c: simulate.block(c, 10, 0, length=0), "length"),
        (lambda c: simulate.lossy(c, 10, 0, simulate.over_acceptance(0.1), "best"), "residual"),
        (lambda c: simulate.lossy(c, 10, 0, lambda p, q: p + 1), "accept"),
        (lambda c: simulate.lossy(c, 10, 0, lambda p, q: p[0]), "accept"),
        (lambda c: simulate.over_acceptance(-0.1), "epsilon"),
        (lambda c: Estimate.of([1.0]), "samples"),
    ],
)
def test_wrong_arguments_are_refused(call, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        call(spiky(2, 2, seed=0))
