"""Theorems 1 and 2, the law of the number of rejections, and the relation between rejections and target calls."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from outrider.theory import chains, exact, rejections
from outrider.theory.chains import Chain
from outrider.theory.rejections import CountLaw
from tests.theory.instances import pairs, sparse_chains, spiky


def test_the_papers_instance() -> None:
    """Yin et al., Figure 2a: 16.41 rejections and a ratio of 3.05; in target calls the ratio is 2.92."""
    chain = chains.best_guess(states=7, horizon=50, seed=10)
    assert rejections.expected_rejections(chain) == pytest.approx(16.4049, abs=5e-5)
    assert rejections.rejection_moments(chain).standard_deviation == pytest.approx(3.329, abs=5e-4)
    assert 50 / rejections.expected_rejections(chain) == pytest.approx(3.048, abs=5e-4)
    assert rejections.calls(chain).tokens_per_call == pytest.approx(2.921, abs=5e-4)
    assert rejections.expected_rejections(chains.best_guess(7, 100, 10)) == pytest.approx(33.5348, abs=5e-5)


@pytest.mark.parametrize(("drafts", "deviation"), [(4, 2.739), (5, 2.679)])
def test_the_papers_batches(drafts: int, deviation: float) -> None:
    moments = rejections.rejection_moments(chains.best_guess(), drafts)
    assert moments.standard_deviation == pytest.approx(deviation, abs=5e-4)


@settings(max_examples=40)
@given(sparse_chains(states=3, horizon=3))
def test_theorem_1_is_the_enumeration(chain: Chain) -> None:
    assert rejections.expected_rejections(chain) == pytest.approx(
        exact.speculative(chain).expected_rejections, abs=1e-12
    )


@settings(max_examples=40)
@given(
    sparse_chains(states=2, horizon=3),
    st.sampled_from([(1, None), (2, None), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (2, 9)]),
)
def test_the_whole_distribution_is_the_enumeration(chain: Chain, case: tuple[int, int | None]) -> None:
    law = exact.speculative(chain, *case)
    np.testing.assert_allclose(rejections.rejection_law(chain, *case).pmf, law.rejections, atol=1e-13)
    np.testing.assert_allclose(rejections.call_law(chain, *case).pmf, law.calls, atol=1e-13)


@pytest.mark.parametrize(("states", "horizon", "drafts", "length"), [(3, 4, 1, 3), (3, 3, 2, 2), (2, 3, 3, None)])
def test_the_whole_distribution_on_dense_instances(states: int, horizon: int, drafts: int, length: int | None) -> None:
    chain = spiky(states, horizon, seed=5)
    law = exact.speculative(chain, drafts, length)
    np.testing.assert_allclose(rejections.rejection_law(chain, drafts, length).pmf, law.rejections, atol=1e-14)
    np.testing.assert_allclose(rejections.call_law(chain, drafts, length).pmf, law.calls, atol=1e-14)
    counts = rejections.calls(chain, drafts, length)
    assert counts.rejections == pytest.approx(law.expected_rejections, abs=1e-13)
    assert counts.calls == pytest.approx(law.expected_calls, abs=1e-13)


@pytest.mark.parametrize("drafts", [1, 2, 7, math.inf])
@pytest.mark.parametrize("length", [None, 0, 1, 4, 60])
def test_distribution_moments_and_expectations_agree(drafts: float, length: int | None) -> None:
    chain = spiky(5, 40, seed=11, zeros=0.3)
    counts = rejections.calls(chain, drafts, length)
    for law, moments, mean in (
        (
            rejections.rejection_law(chain, drafts, length),
            rejections.rejection_moments(chain, drafts, length),
            counts.rejections,
        ),
        (rejections.call_law(chain, drafts, length), rejections.call_moments(chain, drafts, length), counts.calls),
    ):
        assert law.pmf.sum() == pytest.approx(1.0, abs=1e-12)
        assert law.mean == pytest.approx(mean, abs=1e-10)
        assert moments.mean == pytest.approx(mean, abs=1e-10)
        assert moments.standard_deviation == pytest.approx(law.standard_deviation, abs=1e-7)


@pytest.mark.parametrize("drafts", [1, 3, math.inf])
def test_calls_are_rejections_plus_one_unless_the_last_token_was_one(drafts: float) -> None:
    chain = spiky(5, 30, seed=4)
    by_position = rejections.per_position(chain, drafts)
    counts = rejections.calls(chain, drafts)
    assert counts.calls == pytest.approx(by_position.sum() + 1 - by_position[-1], abs=1e-12)
    assert counts.rejections == pytest.approx(by_position.sum(), abs=1e-12)
    assert counts.bonus == 0.0
    assert counts.accepted == pytest.approx(30 - by_position.sum(), abs=1e-12)


@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_independent_tokens_give_the_renewal_rate(length: int) -> None:
    """Leviathan et al. (2023): (1 - a^{K+1}) / (1 - a) tokens per call; transients cancel between two horizons."""
    q, p = np.array([0.6, 0.3, 0.1]), np.array([0.3, 0.3, 0.4])
    alpha = float(np.minimum(p, q).sum())
    more, fewer = (rejections.calls(chains.iid(q, p, t), length=length).calls for t in (1300, 1000))
    assert 300 / (more - fewer) == pytest.approx((1 - alpha ** (length + 1)) / (1 - alpha), rel=1e-9)


def test_a_root_batch_has_its_own_acceptance() -> None:
    """1 + a1 (1 - a^K) / (1 - a) tokens per call, a1 the acceptance of the batch and a that of one draft."""
    q, p, length = np.array([0.6, 0.3, 0.1]), np.array([0.3, 0.3, 0.4]), 3
    alpha, root = 0.7, 1 - float(exact.speculative(chains.iid(q, p, 1), drafts=3).expected_rejections)
    more, fewer = (rejections.calls(chains.iid(q, p, t), drafts=3, length=length).calls for t in (1300, 1000))
    assert 300 / (more - fewer) == pytest.approx(1 + root * (1 - alpha**length) / (1 - alpha), rel=1e-9)


def test_lengths_beyond_the_horizon_are_the_horizon() -> None:
    chain = spiky(4, 9, seed=8)
    for drafts in (1, 3):
        long, free = rejections.calls(chain, drafts, 9), rejections.calls(chain, drafts)
        assert (long.calls, long.rejections, long.bonus) == pytest.approx((free.calls, free.rejections, 0.0), abs=1e-12)


@settings(max_examples=60)
@given(pairs())
def test_no_unbiased_rule_of_the_family_rejects_less(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Theorem 2 by linear programming: over kept mass a = b q <= q and replaced mass r >= 0 with a + r = p."""
    p, q = pair
    size = len(p)
    solution = linprog(
        np.r_[np.zeros(size), np.ones(size)],
        A_eq=np.hstack([np.eye(size), np.eye(size)]),
        b_eq=p,
        bounds=[(0, x) for x in q] + [(0, None)] * size,
    )
    assert solution.fun == pytest.approx(rejections.lower_bound(chains.iid(q, p, 1)), abs=1e-9)


def test_the_bound_holds_for_its_family_only() -> None:
    """Block verification is lossless, drafts one path, makes the same calls, and is below the bound."""
    chain = spiky(2, 8, seed=0)
    block = exact.block(chain)
    np.testing.assert_allclose(block.output, exact.target_law(chain), atol=1e-13)
    assert block.expected_rejections < 0.95 * rejections.lower_bound(chain)


def test_equal_distributions_never_reject_and_disjoint_ones_always() -> None:
    same = spiky(4, 6, seed=1)
    perfect = Chain(same.start, same.target, same.target)
    for drafts in (1, 3, math.inf):
        counts = rejections.calls(perfect, drafts)
        assert (counts.rejections, counts.calls, counts.tokens_per_call) == pytest.approx((0.0, 1.0, 6.0))
        assert rejections.rejection_law(perfect, drafts).pmf[0] == pytest.approx(1.0)
        hopeless = rejections.calls(chains.iid([1.0, 0.0], [0.0, 1.0], 6), drafts)
        assert (hopeless.rejections, hopeless.calls, hopeless.tokens_per_call) == pytest.approx((6.0, 6.0, 1.0))


def test_one_position_is_one_total_variation() -> None:
    chain = chains.iid([0.5, 0.5], [0.9, 0.1], 1)
    np.testing.assert_allclose(rejections.rejection_law(chain).pmf, [0.6, 0.4], atol=1e-15)
    np.testing.assert_array_equal(rejections.call_law(chain).pmf, [0.0, 1.0])


def test_chunked_and_repeated_kernels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = spiky(4, 20, seed=6)
    whole = [rejections.per_position(chain, m) for m in (1, 3)] + [rejections.rejection_law(chain, 2, 3).pmf]
    monkeypatch.setattr(chains, "_CHUNK", 40)
    assert len(list(chain.chunks())) == 10
    pieces = [rejections.per_position(chain, m) for m in (1, 3)] + [rejections.rejection_law(chain, 2, 3).pmf]
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-15)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8).filter(any), st.floats(0, 1))
def test_quantiles_are_the_least_sufficient_value(weights: list[int], level: float) -> None:
    law = CountLaw(np.array(weights) / sum(weights))
    k = law.quantile(level)
    assert law.pmf[k] > 0
    assert law.pmf[: k + 1].sum() >= level - 1e-12
    assert law.pmf[:k].sum() < level or law.pmf[:k].sum() == 0 or law.pmf[:k].sum() == pytest.approx(level)
    assert law.tail(k) + law.pmf[:k].sum() == pytest.approx(1.0)


def test_moments_of_a_known_distribution() -> None:
    """Constant total variation d: the rejections are binomial."""
    law = rejections.rejection_law(chains.iid([0.5, 0.5], [0.8, 0.2], 20))
    assert (law.mean, law.variance) == pytest.approx((6.0, 20 * 0.3 * 0.7))
    assert (law.quantile(0.0), law.quantile(0.5), law.quantile(1.0)) == (0, 6, 20)
    assert law.tail(0) == pytest.approx(1.0) and law.tail(21) == 0.0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda c: rejections.rejection_law(c, 0), "drafts"),
        (lambda c: rejections.calls(c, 1.5), "drafts"),
        (lambda c: rejections.per_position(c, -math.inf), "drafts"),
        (lambda c: rejections.calls(c, length=-1), "length"),
        (lambda c: rejections.call_law(c).quantile(1.5), "level"),
        (lambda c: rejections.call_law(c).quantile(math.nan), "level"),
    ],
)
def test_wrong_arguments_are_refused(call, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        call(spiky(2, 2, seed=0))
