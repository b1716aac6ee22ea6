"""Theorem 3 for any number of drafts: enumeration, closed forms, limits, prefix sharing and trees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.theory import batch, chains, exact, rejections
from outrider.theory.chains import Chain
from tests.theory.instances import Array, normalised, pairs, sparse_chains, spiky


def literal_residual(p: Array, q: Array, drafts: int) -> tuple[float, Array]:
    """(rho_M, p^{M+1}) by the normalised recursion, as printed."""
    rho = 1.0
    for _ in range(drafts):
        over = np.maximum(p - q, 0)
        if over.sum() == 0:
            return 0.0, p
        rho, p = rho * over.sum(), over / over.sum()
    return rho, p


@settings(max_examples=100)
@given(pairs(), st.integers(1, 6))
def test_the_unnormalised_chain_is_the_printed_one(pair: tuple[Array, Array], drafts: int) -> None:
    p, q = pair
    rho, law = literal_residual(p, q, drafts)
    mass = batch.root_rejection(p, q, drafts)
    np.testing.assert_allclose(mass, rho * law, atol=1e-13)
    assert batch.improvement(p, q, drafts) == pytest.approx(float(batch.total_variation(p, q)) - rho, abs=1e-13)
    steps = [g for g, _ in zip(batch.residuals(p, q), range(drafts), strict=False)]
    np.testing.assert_array_equal(steps[-1], mass)
    for one, more in itertools.pairwise(steps):
        assert (more <= one + 1e-16).all()  # pointwise, not only in sum
    assert (batch.root_rejection(p, q, math.inf) <= mass + 1e-16).all()


@settings(max_examples=40)
@given(sparse_chains(states=2, horizon=3), st.integers(1, 3))
def test_theorem_3_is_the_enumeration(chain: Chain, drafts: int) -> None:
    wanted = exact.speculative(chain, drafts).expected_rejections
    assert batch.expected_rejections(chain, drafts) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("states", "horizon", "drafts"), [(3, 3, 2), (2, 3, 3), (2, 2, 4), (3, 2, 3)])
def test_theorem_3_on_dense_instances(states: int, horizon: int, drafts: int) -> None:
    chain = spiky(states, horizon, seed=3)
    wanted = exact.speculative(chain, drafts).expected_rejections
    assert batch.expected_rejections(chain, drafts) == pytest.approx(wanted, abs=1e-14)
    # the printed form: the sum of total variations less the improvement under f
    assert printed_form(chain, drafts, first=1.0) == pytest.approx(wanted, abs=1e-13)


def test_the_first_position_is_a_root() -> None:
    """The paper leaves f of the empty prefix open. It is one: with zero the formula misses the enumeration."""
    chain = spiky(3, 3, seed=3)
    wanted = exact.speculative(chain, 2).expected_rejections
    assert abs(printed_form(chain, 2, first=0.0) - wanted) > 0.01


def printed_form(chain: Chain, drafts: int, first: float) -> float:
    """sum E TV - sum over f of (TV - rho_M), with f of the empty prefix equal to `first`."""
    pi, f, total = chain.start, first * chain.start, 0.0
    for p, q in zip(chain.target, chain.draft, strict=True):
        chainwise = [literal_residual(a, b, drafts) for a, b in zip(p, q, strict=True)]
        rho, law = np.array([r for r, _ in chainwise]), np.array([x for _, x in chainwise])
        distance = np.maximum(p - q, 0).sum(axis=1)
        total += pi @ distance - f @ (distance - rho)
        f, pi = (pi - f) @ np.maximum(p - q, 0) + (f * rho) @ law, pi @ p
    return float(total)


def test_the_printed_loop_would_be_biased() -> None:
    """Algorithm 4 as printed takes one residual too many when all drafts are refused. The output is then not p."""
    p, q = spiky(6, 1, seed=0).target[0, 0], spiky(6, 1, seed=0).draft[0, 0]
    for drafts in (1, 2, 3):
        accepted = p - batch.root_rejection(p, q, drafts)
        rho, right = literal_residual(p, q, drafts)
        _, printed = literal_residual(p, q, drafts + 1)
        assert abs(accepted + rho * right - p).sum() < 1e-14
        assert abs(accepted + rho * printed - p).sum() > 1e-3


# -- closed forms -----------------------------------------------------------------------------------------------------

UNIT = st.integers(0, 20).map(lambda k: k / 20)


@settings(max_examples=150)
@given(UNIT, UNIT, st.one_of(st.integers(1, 300), st.just(math.inf)))
def test_bernoulli_distributions_have_a_closed_form(p: float, q: float, drafts: float) -> None:
    wanted = batch.improvement([1 - p, p], [1 - q, q], drafts)
    assert batch.bernoulli_improvement(p, q, drafts) == pytest.approx(float(wanted), abs=1e-12)


@pytest.mark.parametrize(
    ("draft", "plateau"), [(0.1, 0.4), (0.2, 0.3), (0.3, 0.2), (0.65, 0.15), (0.85, 0.35), (0.95, 0.45)]
)
def test_plateaus_of_figure_3_upper(draft: float, plateau: float) -> None:
    """The curve labelled Ber(0.3) in the paper ends at 0.10; the formula says 0.20, so it is labelled wrongly."""
    assert batch.bernoulli_improvement(0.5, draft, math.inf) == pytest.approx(plateau, abs=1e-12)
    assert float(batch.improvement([0.5, 0.5], [1 - draft, draft], 2000)) == pytest.approx(plateau, abs=1e-9)


@pytest.mark.parametrize(("ratio", "plateau"), [(2, 0.5), (5, 0.8), (10, 0.9), (15, 0.9333), (20, 0.95), (50, 0.98)])
def test_plateaus_of_figure_3_lower(ratio: int, plateau: float) -> None:
    assert batch.uniform_improvement(ratio, math.inf) == pytest.approx(plateau, abs=5e-5)
    assert batch.uniform_improvement(50, 250) == pytest.approx(0.974, abs=5e-4)


@pytest.mark.parametrize(("wide", "narrow"), [(4, 2), (6, 1), (6, 4), (3, 3)])
@pytest.mark.parametrize("drafts", [1, 2, 5, math.inf])
def test_uniform_distributions_have_a_closed_form(wide: int, narrow: int, drafts: float) -> None:
    outer, inner = np.full(wide, 1 / wide), np.r_[np.full(narrow, 1 / narrow), np.zeros(wide - narrow)]
    covered = batch.improvement(inner, outer, drafts)
    assert batch.uniform_improvement(wide / narrow, drafts) == pytest.approx(float(covered), abs=1e-14)
    missed = batch.improvement(outer, inner, drafts)
    assert batch.uniform_improvement(narrow / wide, drafts) == pytest.approx(float(missed), abs=1e-14)


@settings(max_examples=60)
@given(pairs())
def test_the_limit_is_what_the_draft_never_proposes(pair: tuple[Array, Array]) -> None:
    p, q = pair
    limit = float(batch.total_variation(p, q)) - float(p[q == 0].sum())
    assert float(batch.improvement(p, q, math.inf)) == pytest.approx(limit, abs=1e-14)
    assert float(batch.improvement(p, q, 3000)) == pytest.approx(limit, abs=1e-12)  # the rarest token has mass >= 1/21


# -- chains -----------------------------------------------------------------------------------------------------------


def test_the_papers_instance() -> None:
    """Figures 2b, 2c and 5 on the instance of `best_guess`; the paper's own is near, not equal."""
    short, long = chains.best_guess(7, 50, 10), chains.best_guess(7, 100, 10)
    wanted = [16.4049, 14.0901, 13.8684, 12.1045]
    np.testing.assert_allclose(batch.sweep(short, [1, 4, 5, 2000]), wanted, atol=5.1e-5)
    assert batch.expected_rejections(short, math.inf) == pytest.approx(12.0994, abs=5e-5)
    counts = [1, 2, 5, 10, 20, 50, 150, 200, 400, 1000, 2000]
    wanted = [33.535, 30.868, 28.598, 27.443, 26.609, 25.851, 25.338, 25.256, 25.113, 25.005, 24.968]
    np.testing.assert_allclose(batch.sweep(long, counts), wanted, atol=5.1e-4)
    assert batch.expected_rejections(long, math.inf) == pytest.approx(24.952, abs=5e-4)


def test_the_papers_values_are_typical_of_such_instances() -> None:
    """Over seeds 0 to 59 the digitised 16.41, 14.22 and 14.01 lie within one standard deviation of the mean."""
    values = np.array([batch.sweep(chains.best_guess(7, 50, seed), [1, 2, 4, 5]) for seed in range(60)])
    np.testing.assert_allclose(values.mean(axis=0), [16.245, 14.924, 14.034, 13.812], atol=5.1e-4)
    np.testing.assert_allclose(values.std(axis=0), [0.30, 0.26, 0.23, 0.23], atol=8e-3)
    paper = np.array([16.41, 14.22, 14.01])
    assert (abs(paper - values.mean(axis=0)[[0, 2, 3]]) < values.std(axis=0)[[0, 2, 3]]).all()


@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_very_many_drafts_reach_the_limit(zeros: float) -> None:
    chain = chains.best_guess(5, 20, 0) if zeros == 0.0 else spiky(5, 20, seed=2, zeros=zeros, spread=1.0)
    limit = batch.expected_rejections(chain, math.inf)
    assert batch.expected_rejections(chain, 20_000) == pytest.approx(limit, rel=1e-3)
    assert limit > 1.0


@settings(max_examples=60)
@given(sparse_chains(states=4, horizon=4))
def test_more_drafts_never_hurt_and_never_more_than_halve(chain: Chain) -> None:
    values = [batch.expected_rejections(chain, m) for m in (1, 2, 3, 5, 40, math.inf)]
    assert all(more <= fewer + 1e-12 for fewer, more in itertools.pairwise(values))
    assert values[-1] >= batch.rejection_floor(chain) - 1e-12
    assert batch.rejection_floor(chain) >= (values[0] - 1) / 2 - 1e-12


def test_constant_total_variation_buys_at_most_one_token_a_call() -> None:
    """Rejection rate d / (1 + d - rho_M): from 1/d to at most 1/d + 1 tokens per call."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    d = float(batch.total_variation(p, q))
    for drafts in (1, 2, 5, math.inf):
        rho = float(batch.root_rejection(p, q, drafts).sum())
        rate = batch.per_position(chains.iid(q, p, 400), drafts)[-1]
        assert rate == pytest.approx(d / (1 + d - rho), abs=1e-12)
    assert 1 / rate == pytest.approx(1 / d + 1)


def test_one_draft_is_theorem_1_and_sweeps_are_single_calls() -> None:
    chain = spiky(6, 25, seed=9, zeros=0.2)
    np.testing.assert_allclose(batch.per_position(chain, 1), rejections.per_position(chain), atol=1e-14)
    np.testing.assert_allclose(
        batch.sweep(chain, [5, 2, 2, 9]), [batch.expected_rejections(chain, m) for m in (5, 2, 2, 9)], atol=1e-13
    )
    assert batch.sweep(chain, []).shape == (0,)


# -- prefix sharing and trees, against enumerations of their own -------------------------------------------------------


def laws_of(p: Array, q: Array, tokens: list[int]) -> Iterator[tuple[float, int, int | None]]:
    """(chance, output, index of the accepted one or None) of trying `tokens` in order."""
    chance = 1.0
    for m, token in enumerate(tokens):
        accept = min(1.0, p[token] / q[token])
        yield chance * accept, token, m
        chance *= 1 - accept
        over = np.maximum(p - q, 0)
        p = over / over.sum() if over.sum() > 0 else p
    yield from ((chance * float(p[y]), y, None) for y in range(len(p)))


def shared_enumeration(chain: Chain, drafts: int) -> float:
    """Expected rejections with prefix sharing, over all tuples of whole drafts and all coins."""

    def sequences(n: int, last: int) -> list[tuple[float, tuple[int, ...]]]:
        found = [(1.0, ())]
        for i in range(n, chain.horizon):
            found = [
                (w * c, (*s, y)) for w, s in found for y, c in enumerate(chain.draft[i, s[-1] if s else last]) if c
            ]
        return found

    def follow(n: int, last: int, alive: list[tuple[int, ...]]) -> float:
        if n == chain.horizon:
            return 0.0
        total = 0.0
        for chance, y, taken in laws_of(chain.target[n, last], chain.draft[n, last], [s[0] for s in alive]):
            if chance > 0:
                rest = [s[1:] for s in alive if s[0] == y]
                total += chance * (1 + call(n + 1, y) if taken is None else follow(n + 1, y, rest))
        return total

    def call(n: int, last: int) -> float:
        if n == chain.horizon:
            return 0.0
        return sum(
            math.prod(w for w, _ in choice) * follow(n, last, [s for _, s in choice])
            for choice in itertools.product(sequences(n, last), repeat=drafts)
        )

    return sum(weight * call(0, x) for x, weight in enumerate(chain.start) if weight)


@pytest.mark.parametrize(("states", "horizon", "drafts"), [(2, 3, 2), (2, 2, 3), (3, 2, 2), (2, 3, 1)])
def test_prefix_sharing_is_its_enumeration(states: int, horizon: int, drafts: int) -> None:
    chain = spiky(states, horizon, seed=13)
    by_position = batch.shared_per_position(chain, drafts)
    assert by_position.sum() == pytest.approx(shared_enumeration(chain, drafts), abs=1e-13)


def test_prefix_sharing_beats_the_batch_at_the_same_cost() -> None:
    chain = chains.best_guess()
    np.testing.assert_allclose(batch.sweep(chain, [2, 4, 8]), [15.002, 14.090, 13.475], atol=5.1e-4)
    shared = [batch.shared_per_position(chain, m).sum() for m in (1, 2, 4, 8)]
    np.testing.assert_allclose(shared, [16.405, 14.841, 13.677, 12.703], atol=5.1e-4)


@settings(max_examples=30)
@given(sparse_chains(states=3, horizon=4), st.integers(1, 5))
def test_prefix_sharing_never_hurts(chain: Chain, drafts: int) -> None:
    shared = batch.shared_per_position(chain, drafts)
    assert shared.sum() <= batch.expected_rejections(chain, drafts) + 1e-12
    if drafts == 1:
        np.testing.assert_allclose(shared, batch.per_position(chain, 1), atol=1e-13)


def tree_enumeration(chain: Chain, branching: tuple[int, ...]) -> Array:
    """Probability of accepting each depth, over all trees of children and all coins."""
    out = np.zeros(len(branching))

    def visit(depth: int, last: int, weight: float) -> None:
        if depth == len(branching) or weight == 0:
            return
        p, q = chain.target[depth, last], chain.draft[depth, last]
        for kids in itertools.product(range(chain.states), repeat=branching[depth]):
            chance = weight * math.prod(float(q[k]) for k in kids)
            for c, y, taken in laws_of(p, q, list(kids)) if chance else ():
                if taken is not None:
                    out[depth] += chance * c
                    visit(depth + 1, y, chance * c)

    for x, weight in enumerate(chain.start):
        visit(0, x, float(weight))
    return out


@pytest.mark.parametrize("branching", [(2, 2), (3, 1, 2), (1, 1, 1), (1, 3)])
def test_trees_are_their_enumeration(branching: tuple[int, ...]) -> None:
    chain = spiky(3, 3, seed=17, zeros=0.2)
    np.testing.assert_allclose(batch.tree_acceptance(chain, branching), tree_enumeration(chain, branching), atol=1e-14)


def test_trees_of_independent_tokens_multiply() -> None:
    p, q = normalised([5, 3, 2]), normalised([2, 3, 5])
    node = 1 - float(batch.root_rejection(p, q, 3).sum())
    accepted = batch.tree_acceptance(chains.iid(q, p, 5), [3] * 5)
    np.testing.assert_allclose(accepted, node ** np.arange(1, 6), atol=1e-14)
    assert 1 + accepted.sum() == pytest.approx((1 - node**6) / (1 - node))


def test_wrong_arguments_are_refused() -> None:
    chain, fair = spiky(2, 2, seed=0), [0.5, 0.5]
    for call, name in (
        (lambda: batch.expected_rejections(chain, 0), "drafts"),
        (lambda: batch.sweep(chain, [1, 0]), "drafts"),
        (lambda: batch.shared_per_position(chain, 0), "drafts"),
        (lambda: batch.shared_per_position(chain, math.inf), "drafts"),  # pyright: ignore[reportArgumentType]
        (lambda: batch.tree_acceptance(chain, []), "branching"),
        (lambda: batch.tree_acceptance(chain, [2, 2, 2]), "branching"),
        (lambda: batch.tree_acceptance(chain, [0]), "branching"),
        (lambda: batch.improvement(fair, [0.5, 0.4], 2), "draft"),
        (lambda: batch.improvement(fair, [1.0], 2), "target and draft"),
        (lambda: batch.root_rejection([1.5, -0.5], fair, 2), "target"),
        (lambda: next(batch.residuals([math.nan, 1.0], fair)), "target"),
        (lambda: batch.bernoulli_improvement(1.5, 0.5, 2), "target"),
        (lambda: batch.bernoulli_improvement(0.5, math.nan, 2), "draft"),
        (lambda: batch.uniform_improvement(0.0, 2), "ratio"),
        (lambda: batch.uniform_improvement(math.inf, 2), "ratio"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
