"""Several candidates at one node: exactness by enumeration of all tuples, optima by linear programs and subsets."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.theory import batch, multidraft, transport, tuples, without_replacement
from outrider.theory.batch import total_variation
from outrider.theory.multidraft import kseq, recursive, spechub
from outrider.theory.transport import optimal_choice, optimal_iid, optimal_plan, optimal_without_replacement
from outrider.theory.without_replacement import all_inside, estimate_recursive_acceptance, recursive_acceptance
from tests.theory.instances import Array, Z, normalised, pairs, spiky

COUNTS = st.integers(1, 3)


def random_pairs(count: int, size: int, seed: int = 0, spread: float = 1.0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return tuple(rng.dirichlet(np.full(size, spread), size=(2, count)))  # pyright: ignore[reportReturnType]


# Exactness: the literal procedure, over every tuple that can be drawn, has the target's law and the stated acceptance.


@settings(max_examples=60)
@given(pairs(4), COUNTS)
def test_rules_for_independent_drafts_are_exact(pair, k):
    p, q = pair
    drawn = tuples.independent(q, k)
    assert drawn.probability.sum() == pytest.approx(1.0, abs=1e-12)
    law, acceptance = tuples.output(drawn, lambda t: tuples.recursive_outcome(p, q, t))
    assert law == pytest.approx(p, abs=1e-12)
    assert recursive(p, q, k).acceptance == pytest.approx(acceptance, abs=1e-12)
    rule = kseq(p, q, k)
    law, acceptance = tuples.output(drawn, lambda t: tuples.threshold_outcome(p, q, rule, t))
    assert law == pytest.approx(p, abs=1e-12)
    assert rule.acceptance == pytest.approx(acceptance, abs=1e-12)


@settings(max_examples=60)
@given(pairs(5), COUNTS)
def test_recursive_rejection_without_replacement_is_exact(pair, k):
    p, q = pair
    drawn = tuples.distinct(q, k)
    assert drawn.probability.sum() == pytest.approx(1.0, abs=1e-12)
    law, acceptance = tuples.output(drawn, lambda t: tuples.recursive_outcome(p, q, t, replacement=False))
    assert law == pytest.approx(p, abs=1e-12)
    assert recursive_acceptance(p, q, k) == pytest.approx(acceptance, abs=1e-12)


@settings(max_examples=60)
@given(pairs(6))
def test_spechub_is_exact(pair):
    p, q = pair
    hub = spechub(p, q)
    drawn = tuples.hub_pairs(hub)
    assert drawn.probability.sum() == pytest.approx(1.0, abs=1e-12)
    law, acceptance = tuples.output(drawn, lambda t: tuples.hub_outcome(hub, t))
    assert law == pytest.approx(p, abs=1e-12)
    assert hub.acceptance == pytest.approx(acceptance, abs=1e-12)
    plan = optimal_plan(p, drawn.tokens, drawn.probability)
    assert hub.acceptance <= plan.acceptance + 1e-9  # the best any rule can do with these pairs


def test_a_rule_that_is_wrong_is_seen_to_be_wrong():
    """Negative control: tests against the original target at every draft bias the output."""
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])
    rule = multidraft.Threshold(np.array(0.0), np.array(1.0), recursive(p, q, 1).residual)
    law, _ = tuples.output(tuples.independent(q, 2), lambda t: tuples.threshold_outcome(p, q, rule, t))
    assert np.abs(law - p).max() > 1e-2


# Optima.


@given(pairs(6), COUNTS)
def test_the_choice_that_attains_the_optimum_can_be_had(pair, k):
    """Its acceptance is the bound, and no set of tokens is chosen more often than one of its members is drawn."""
    p, q = pair
    m = optimal_choice(p, q, k)
    assert m.sum() == pytest.approx(1.0, abs=1e-10)
    assert np.minimum(p, m).sum() == pytest.approx(float(optimal_iid(p, q, k).acceptance), abs=1e-10)
    for inside in itertools.product([False, True], repeat=len(p)):
        h = np.array(inside)
        assert m[h].sum() <= 1.0 - max(0.0, 1.0 - q[h].sum()) ** k + 1e-10


@settings(max_examples=40)
@given(pairs(4), COUNTS, st.booleans())
def test_optimum_is_the_linear_program_and_the_best_subset(pair, k, replacement):
    p, q = pair
    drawn = tuples.independent(q, k) if replacement else tuples.distinct(q, k)
    best = (optimal_iid if replacement else optimal_without_replacement)(p, q, k)
    plan = optimal_plan(p, drawn.tokens, drawn.probability)
    assert best.acceptance == pytest.approx(plan.acceptance, abs=1e-8)
    cuts = []
    for inside in itertools.product([False, True], repeat=len(p)):
        h = np.array(inside)
        cuts.append(p[h].sum() - drawn.probability[h[drawn.tokens].all(axis=1)].sum())
    assert best.acceptance == pytest.approx(1.0 + min(cuts), abs=1e-10)
    h = best.blocked
    assert p[h].sum() - drawn.probability[h[drawn.tokens].all(axis=1)].sum() == pytest.approx(min(cuts), abs=1e-10)
    law, acceptance = np.zeros(len(p)), 0.0
    for n, weight in enumerate(drawn.probability):
        outcome = tuples.plan_outcome(plan, drawn, n)
        law, acceptance = law + weight * outcome.law, acceptance + weight * outcome.accepted.sum()
        others = np.setdiff1d(np.arange(len(p)), drawn.tokens[n])
        assert (outcome.accepted[others] == 0).all()  # only what was drawn is accepted
    assert law == pytest.approx(p, abs=1e-8)
    assert acceptance == pytest.approx(plan.acceptance, abs=1e-12)


def test_prefix_formula_without_replacement_on_random_pairs():
    for p, q in zip(*random_pairs(60, 5, seed=3), strict=True):
        for k in (2, 3):
            drawn = tuples.distinct(q, k)
            subsets = (np.array(h) for h in itertools.product([False, True], repeat=5))
            cut = min(p[h].sum() - drawn.probability[h[drawn.tokens].all(axis=1)].sum() for h in subsets)
            assert optimal_without_replacement(p, q, k).acceptance == pytest.approx(1 + cut, abs=1e-10)


@given(pairs())
def test_one_candidate_is_speculative_sampling_under_every_rule(pair):
    p, q = pair
    accept = 1.0 - float(total_variation(p, q))
    for value in (
        recursive(p, q, 1).acceptance,
        kseq(p, q, 1).acceptance,
        recursive_acceptance(p, q, 1),
        optimal_iid(p, q, 1).acceptance,
        optimal_without_replacement(p, q, 1).acceptance,
    ):
        assert value == pytest.approx(accept, abs=1e-12)


@settings(max_examples=60)
@given(pairs(5), st.integers(1, 4))
def test_recursive_rejection_is_theorem_3(pair, k):
    p, q = pair
    g = batch.root_rejection(p, q, k)
    rule = recursive(p, q, k)
    assert 1 - rule.acceptance == pytest.approx(float(g.sum()), abs=1e-12)
    assert (1 - rule.acceptance) * rule.residual == pytest.approx(g, abs=1e-12)


# Orderings.


@given(pairs(), st.integers(1, 12))
def test_no_rule_beats_the_optimum_and_kseq_never_loses_to_recursive(pair, k):
    p, q = pair
    slow, quick, best = recursive(p, q, k), kseq(p, q, k), optimal_iid(p, q, k).acceptance
    assert slow.acceptance <= quick.acceptance + 1e-12
    assert slow.acceptance == pytest.approx(1.0, abs=1e-12) or slow.slope <= quick.slope + 1e-9
    assert quick.acceptance <= best + 1e-12
    assert quick.acceptance >= (1 - (1 - 1 / k) ** k) * best - 1e-12
    assert best >= optimal_iid(p, q, max(1, k - 1)).acceptance - 1e-12


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_kseq_is_at_least_recursive_on_1200_random_pairs(k):
    for size, spread in ((5, 1.0), (20, 0.2), (3, 0.5)):
        p, q = random_pairs(100, size, seed=size, spread=spread)
        gap = kseq(p, q, k).acceptance - recursive(p, q, k).acceptance
        assert (gap >= -1e-12).all() and gap.mean() > 1e-3


@settings(max_examples=60)
@given(pairs(), st.integers(1, 10))
def test_steps_of_the_proof_that_kseq_is_at_least_recursive(pair, k):
    p, q = pair
    g = [1.0] + [1.0 - float(recursive(p, q, m).acceptance) for m in range(1, k + 1)]
    for a, b, c in zip(g, g[1:], g[2:], strict=False):
        assert b * b <= a * c + 1e-12  # log-convex
    slope = float(recursive(p, q, k).slope)
    assert slope == pytest.approx(sum(g[:k]), abs=1e-12)
    assert slope <= sum(g[k] ** (m / k) for m in range(k)) + 1e-9
    assert (1 - (1 - g[k]) / slope) ** k <= g[k] + 1e-12


def test_mean_acceptances_of_two_candidates_are_ordered():
    p, q = random_pairs(400, 5, seed=1)
    means = [
        (1 - total_variation(p, q)).mean(),
        recursive(p, q, 2).acceptance.mean(),
        kseq(p, q, 2).acceptance.mean(),
        recursive_acceptance(p, q, 2).mean(),
        optimal_iid(p, q, 2).acceptance.mean(),
        optimal_without_replacement(p, q, 2).acceptance.mean(),
    ]
    assert all(a + 0.005 < b for a, b in itertools.pairwise(means[:3]))
    assert means[2] + 0.005 < means[3] and means[2] + 0.005 < means[4]
    assert means[3] + 0.005 < means[5] and means[4] + 0.005 < means[5]
    hub = spechub(p, q).acceptance.mean()
    assert means[2] + 0.005 < hub < means[5] - 0.005


# Edges.


def test_edges():
    one, other = np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.5, 0.5])
    for rule in (recursive, kseq, optimal_iid):
        assert rule(one, other, 3).acceptance == 0.0  # disjoint
        assert rule(other, other, 3).acceptance == 1.0
    assert recursive_acceptance(one, other, 2) == 0.0 and recursive_acceptance(other, one, 3) == 0.0
    assert recursive_acceptance(other, other, 3) == 1.0
    assert recursive_acceptance(one, [0.0, 0.2, 0.8], 3) == 0.0
    assert recursive_acceptance(one, [1e-3, 0.2, 0.799], 3) == pytest.approx(1.0)  # the whole support is drawn
    assert optimal_without_replacement(one, [1e-3, 0.2, 0.799], 3).acceptance == pytest.approx(1.0)
    assert spechub(other, one).acceptance == 0.0 and spechub(one, one).acceptance == 1.0
    assert kseq(one, one, 4).slope == pytest.approx(1.0)
    assert spechub([1.0], [1.0]).acceptance == 1.0


def test_rows_are_independent():
    chain = spiky(5, 3, seed=9, zeros=0.3)
    p, q = chain.target, chain.draft
    for call in (
        lambda a, b: recursive(a, b, 3).residual,
        lambda a, b: kseq(a, b, 3).residual,
        lambda a, b: spechub(a, b).acceptance,
        lambda a, b: recursive_acceptance(a, b, 3),
        lambda a, b: optimal_iid(a, b, 3).blocked,
        lambda a, b: optimal_without_replacement(a, b, 3).acceptance,
    ):
        whole = call(p, q)
        assert whole.shape[:2] == (3, 5)
        assert np.array_equal(whole[2, 1], call(p[2, 1], q[2, 1]))


# Drawing without replacement at scale.


@settings(max_examples=40)
@given(pairs(5), st.integers(1, 4))
def test_distribution_of_the_drawn_set_is_that_of_enumeration(pair, k):
    _, q = pair
    drawn = tuples.distinct(q, k)
    exact = [drawn.probability[(drawn.tokens <= j).all(axis=1)].sum() for j in range(len(q))]
    assert all_inside(q, k) == pytest.approx(exact, abs=1e-10)


def test_distribution_of_the_drawn_set_with_rare_tokens():
    for q in (
        [0.5, 0.5 - 1e-9, 1e-9 - 1e-14, 1e-14],
        [1e-14, 1e-9 - 1e-14, 0.5 - 1e-9, 0.5],
        [1 - 3e-6, 1e-6, 1e-6, 1e-6],
    ):
        law = normalised(q)
        drawn = tuples.distinct(law, 3)
        exact = [drawn.probability[(drawn.tokens <= j).all(axis=1)].sum() for j in range(4)]
        assert all_inside(law, 3) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize(("size", "spread", "k"), [(5, 1.0, 3), (8, 0.2, 4), (60, 0.3, 2), (40, 0.5, 3)])
def test_estimator_without_replacement_agrees_with_enumeration(size, spread, k):
    p, q = (a[0] for a in random_pairs(1, size, seed=size, spread=spread))
    exact = float(recursive_acceptance(p, q, k))
    found = estimate_recursive_acceptance(p, q, k, 4000, np.random.default_rng(2))
    assert abs(found.value - exact) < Z * found.standard_error + 1e-12
    assert found.standard_error < 0.005
    wrong = float(recursive_acceptance(p, q, k - 1))  # negative control
    assert abs(found.value - wrong) > 10 * found.standard_error


@settings(max_examples=40)
@given(pairs(6), st.integers(1, 4))
def test_estimator_survives_every_edge(pair, k):
    p, q = pair
    found = estimate_recursive_acceptance(p, q, k, 50, np.random.default_rng(0))
    exact = float(recursive_acceptance(p, q, k))
    assert 0 <= found.value <= 1 + 1e-12
    if found.standard_error == 0.0 and exact in (0.0, 1.0):
        assert found.value == pytest.approx(exact, abs=1e-9)


def test_large_vocabularies():
    """Published budget: the optimum for V = 128,000, k = 8 in 50 ms; asserted with room for a busy machine."""
    p, q = (a[0] for a in random_pairs(1, 128_000, spread=0.05))
    start = time.perf_counter()
    best = float(optimal_iid(p, q, 8).acceptance)
    assert time.perf_counter() - start < 1.0
    slow, quick = float(recursive(p, q, 8).acceptance), float(kseq(p, q, 8).acceptance)
    assert 1 - float(total_variation(p, q)) < slow < quick < best < 1
    with_two = float(recursive_acceptance(p, q, 2))
    found = estimate_recursive_acceptance(p, q, 2, 200, np.random.default_rng(0))
    assert abs(found.value - with_two) < Z * found.standard_error + 1e-9
    with pytest.raises(ValueError, match="estimate_recursive_acceptance"):
        recursive_acceptance(p, q, 4)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: kseq([0.5, 0.5], [0.5, 0.5], 0), "drafts"),
        (lambda: recursive([0.5, 0.5], [0.5, 0.5, 0.0], 2), "target and draft"),
        (lambda: optimal_iid([0.5, np.nan], [0.5, 0.5], 2), "target"),
        (lambda: recursive_acceptance([0.5, 0.5], [1.5, -0.5], 2), "draft"),
        (lambda: all_inside([[0.5, 0.5]], 2), "draft"),
        (lambda: optimal_plan([0.5, 0.5], [[0], [2]], [0.5, 0.5]), "tokens"),
        (lambda: optimal_plan([0.5, 0.5], [[0]], [0.5, 0.5]), "tokens"),
        (lambda: tuples.recursive_outcome([0.5, 0.5], [0.5, 0.5], [2]), "tokens"),
        (lambda: estimate_recursive_acceptance([1.0], [1.0], 1, 1, np.random.default_rng(0)), "samples"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_limits_are_what_the_messages_say():
    assert without_replacement.LARGEST >= 1 << 18
    assert transport.optimal_iid([1.0], [1.0], 1).acceptance == 1.0
