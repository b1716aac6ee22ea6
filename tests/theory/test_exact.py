"""The enumeration itself: lossless rules return the target's law, lossy ones the law that Theorem 4 says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from outrider.theory import chains, exact, simulate
from outrider.theory.chains import Chain
from tests.theory.instances import pairs, sparse_chains, spiky


def test_the_target_distribution_is_the_product_of_its_kernels() -> None:
    chain = spiky(2, 3, seed=0)
    law = exact.target_law(chain)
    for x in np.ndindex(2, 2, 2):
        paths = chain.start * chain.target[0, :, x[0]]
        assert law[x] == pytest.approx(
            paths.sum() * chain.target[1, x[0], x[1]] * chain.target[2, x[1], x[2]], abs=1e-15
        )


@pytest.mark.parametrize(
    ("states", "horizon", "drafts", "length"),
    [(3, 4, 1, None), (3, 3, 2, None), (2, 3, 3, None), (3, 4, 1, 2), (3, 4, 1, 0), (2, 4, 2, 2), (3, 3, 1, 9)],
)
def test_speculative_decoding_keeps_the_targets_distribution(
    states: int, horizon: int, drafts: int, length: int | None
) -> None:
    chain = spiky(states, horizon, seed=horizon)
    law = exact.speculative(chain, drafts, length)
    np.testing.assert_allclose(law.output, exact.target_law(chain), atol=1e-14)
    assert law.rejections.sum() == pytest.approx(1.0, abs=1e-12)
    assert law.calls.sum() == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=25)
@given(sparse_chains(states=3, horizon=3))
def test_it_keeps_it_with_zeros_point_masses_and_disjoint_supports(chain: Chain) -> None:
    wanted = exact.target_law(chain)
    for law in (
        exact.speculative(chain),
        exact.speculative(chain, length=1),
        exact.block(chain),
        exact.block(chain, 2),
    ):
        np.testing.assert_allclose(law.output, wanted, atol=1e-13)


@settings(max_examples=10)
@given(sparse_chains(states=2, horizon=3))
def test_batches_keep_it_too(chain: Chain) -> None:
    np.testing.assert_allclose(exact.speculative(chain, drafts=3).output, exact.target_law(chain), atol=1e-13)


@pytest.mark.parametrize(("states", "horizon", "length"), [(3, 4, None), (2, 6, None), (3, 4, 2), (2, 6, 3), (2, 5, 9)])
def test_block_verification_keeps_the_distribution_and_rejects_less_than_any_token_rule(
    states: int, horizon: int, length: int | None
) -> None:
    chain = spiky(states, horizon, seed=7)
    block, token = exact.block(chain, length), exact.speculative(chain, length=length)
    np.testing.assert_allclose(block.output, exact.target_law(chain), atol=1e-14)
    assert block.expected_rejections < token.expected_rejections
    assert block.expected_calls < token.expected_calls


def test_blocks_of_one_token_are_speculative_decoding() -> None:
    chain = spiky(3, 4, seed=1)
    block, token = exact.block(chain, 1), exact.speculative(chain, length=1)
    np.testing.assert_allclose(block.rejections, token.rejections, atol=1e-14)
    np.testing.assert_allclose(block.calls, token.calls, atol=1e-14)


@settings(max_examples=40)
@given(pairs(most=5))
def test_a_lossy_token_has_the_distribution_and_the_loss_of_theorem_4(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    chain = chains.iid(q, p, horizon=1)
    accept = simulate.over_acceptance(0.15)
    b = accept(p, q)
    reject = float(((1 - b) * q).sum())
    losses = {}
    for residual in simulate.RESIDUALS:
        law = exact.speculative(chain, accept=accept, residual=residual)
        losses[residual] = 0.5 * float(abs(law.output - p).sum())
        assert law.expected_rejections == pytest.approx(reject, abs=1e-12)
    assert losses["optimal"] == pytest.approx(float(np.maximum(b * q - p, 0).sum()), abs=1e-12)
    assert losses["optimal"] <= min(losses["target"], losses["draft"]) + 1e-12
    # Theorem 5: an over-accepting rule spends exactly the rejections that it saves.
    assert reject + losses["optimal"] == pytest.approx(float(np.maximum(p - q, 0).sum()), abs=1e-12)


def test_a_biased_residual_is_seen() -> None:
    """The check of losslessness would notice a rule that is not: resampling from the target or from the draft."""
    chain = spiky(3, 3, seed=2)
    for residual in ("target", "draft"):
        law = exact.speculative(chain, residual=residual)
        assert abs(law.output - exact.target_law(chain)).sum() > 0.01


def test_an_extreme_acceptance_is_followed() -> None:
    chain = spiky(3, 3, seed=3)
    all_in = exact.speculative(chain, accept=lambda p, q: np.ones_like(q))
    np.testing.assert_allclose(
        all_in.output, exact.target_law(Chain(chain.start, chain.draft, chain.draft)), atol=1e-14
    )
    assert all_in.expected_rejections == 0.0 and all_in.expected_calls == pytest.approx(1.0)
    none = exact.speculative(chain, accept=lambda p, q: np.zeros_like(q))
    np.testing.assert_allclose(none.output, exact.target_law(chain), atol=1e-14)
    assert none.expected_rejections == pytest.approx(3.0) and none.expected_calls == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"drafts": 0}, "drafts must be at least 1"),
        ({"length": -1}, "length must be at least 0"),
        ({"drafts": 2, "residual": "target"}, "drafts must be 1"),
        ({"residual": "best"}, "residual must be optimal"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact.speculative(spiky(2, 2, seed=0), **wrong)


def test_large_instances_are_refused() -> None:
    for enumerate_it in (exact.target_law, exact.speculative, exact.block):
        with pytest.raises(ValueError, match="small enough to enumerate"):
            enumerate_it(chains.best_guess(states=7, horizon=50))
    with pytest.raises(ValueError, match="length must be at least 1"):
        exact.block(spiky(2, 2, seed=0), 0)
