"""Block verification: the literal procedure over all drafts against the closed form, exactness on all strings, bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.theory import block, exact
from outrider.theory.block import conditionals, estimate_from_rows, estimate_lengths, expected_lengths, joint_law, judge
from outrider.theory.chains import Chain, iid
from outrider.theory.rejections import expected_rejections
from tests.theory.instances import Array, Z, sparse_chains, spiky


def laws(size: int, length: int, seed: int, spread: float = 1.0) -> tuple[list[Array], list[Array]]:
    """Laws that depend on the whole prefix."""
    rng = np.random.default_rng(seed)
    target = [rng.dirichlet(np.full(size, spread), size=(size,) * i) for i in range(length + 1)]
    return target, [rng.dirichlet(np.full(size, spread), size=(size,) * i) for i in range(length)]


def by_enumeration(target: list[Array], draft: list[Array]) -> list[Array]:
    """The joint law of (tau, X^tau, Y) from the coins, draft by draft."""
    size, length = len(target[0]), len(draft)
    joint = [np.zeros((size,) * (i + 1)) for i in range(length + 1)]
    for x in itertools.product(range(size), repeat=length):
        chance = float(np.prod([draft[i][x[: i + 1]] for i in range(length)]))
        if chance == 0.0:
            continue
        rows = np.array([target[i][x[:i]] for i in range(length + 1)])
        seen = judge(rows, np.array([draft[i][x[:i]] for i in range(length)]), np.array(x))
        for i in range(length + 1):
            joint[i][x[:i]] += chance * seen.length[i] * seen.residual[i]
    return joint


CASES = [(3, 2, 0, 1.0), (3, 4, 1, 1.0), (4, 3, 2, 0.5), (2, 6, 3, 1.0)]


@pytest.mark.parametrize("case", CASES)
def test_closed_form_is_the_procedure_and_the_output_is_exact(case):
    target, draft = laws(*case)
    joint = joint_law(target, draft)
    for closed, literal in zip(joint, by_enumeration(target, draft), strict=True):
        assert closed == pytest.approx(literal, abs=1e-15)
    assert sum(float(a.sum()) for a in joint) == pytest.approx(1.0, abs=1e-13)
    wanted = target[0]
    for law in target[1:]:
        wanted = wanted[..., None] * law
    assert block.string_law(target, draft) == pytest.approx(wanted, abs=1e-15)
    mean = sum(i * float(a.sum()) for i, a in enumerate(joint))
    lengths = expected_lengths(target, draft)
    assert lengths.block == pytest.approx(mean, abs=1e-13)
    assert lengths.token < lengths.block < lengths.upper
    for i, w in enumerate(block.weights(target, draft)):  # P(X^i = x, tau >= i)
        tail = sum(float(a.sum()) for a in joint[i:])
        assert w.sum() == pytest.approx(tail, abs=1e-13)


@settings(max_examples=60)
@given(sparse_chains(states=3, horizon=4))
def test_closed_form_with_zeros_ties_and_point_masses(chain):
    length = max(1, chain.horizon - 1)
    for x in range(chain.states):
        target, draft = conditionals(chain, 0, x, length)
        lengths = expected_lengths(target, draft)
        assert lengths.token <= lengths.block + 1e-12 and lengths.block <= lengths.upper + 1e-12
        if len(target) > length:
            for closed, literal in zip(joint_law(target, draft), by_enumeration(target, draft), strict=True):
                assert closed == pytest.approx(literal, abs=1e-14)


def test_weights_are_a_minimum_over_mixed_paths():
    """w_i(x) = min over j of q(x^j) p(x_{j+1..i} | x^j)."""
    target, draft = laws(3, 4, 5)
    w = block.weights(target, draft)
    for x in itertools.product(range(3), repeat=4):
        p = [target[i][x[: i + 1]] for i in range(4)]
        q = [draft[i][x[: i + 1]] for i in range(4)]
        assert w[4][x] == pytest.approx(min(np.prod(q[:j]) * np.prod(p[j:]) for j in range(5)), abs=1e-16)


def test_one_token_is_speculative_sampling():
    target, draft = laws(4, 1, 0)
    lengths = expected_lengths(target, draft)
    overlap = float(np.minimum(target[0], draft[0]).sum())
    assert [lengths.token, lengths.block, lengths.upper] == pytest.approx([overlap] * 3)
    assert joint_law(target, draft)[0] == pytest.approx(np.maximum(target[0] - draft[0], 0))


def test_a_token_that_fails_does_not_end_the_block():
    """Two tokens whose ratios are 1/2 and 2: token by token the block survives with 1/2, as a block with one."""
    half, quarter = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    seen = judge([quarter, half, half], [half, quarter], [0, 0])
    assert seen.reach == pytest.approx([0.5, 1.0])
    assert seen.length == pytest.approx([0.0, 0.0, 1.0])
    rows = judge(np.stack([[quarter, half, half]] * 2), np.stack([[half, quarter]] * 2), [[0, 0], [1, 1]])
    assert rows.length[0] == pytest.approx(seen.length)
    assert rows.length.sum(axis=1) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("case", [(3, 6), (2, 8), (4, 4)])
def test_fewer_rejections_than_the_bound_of_theorem_2(case):
    """The bound holds for rules that judge one token at a time; block verification is not one of them."""
    chain = spiky(*case, seed=4, spread=1.0)
    found = block.expected_rejections(chain)
    assert found < 0.97 * expected_rejections(chain)
    assert found == pytest.approx(block.expected_rejections(Chain(chain.start, chain.draft.copy(), chain.target)))


def test_rejections_to_the_horizon_are_those_of_the_enumerated_algorithm():
    for seed in range(3):
        chain = spiky(3, 4, seed, zeros=0.2)
        literal = exact.block(chain)
        assert literal.output == pytest.approx(exact.target_law(chain), abs=1e-13)
        assert block.expected_rejections(chain) == pytest.approx(literal.expected_rejections, abs=1e-12)


def sample(laws: list[Array], count: int, rng: np.random.Generator) -> np.ndarray:
    paths = np.zeros((count, 0), dtype=int)
    for law in laws:
        rows = law[tuple(paths.T)] if paths.shape[1] else np.broadcast_to(law, (count, len(law)))
        drawn = (np.cumsum(rows, axis=1) < rng.random((count, 1))).sum(axis=1)
        paths = np.column_stack([paths, drawn])
    return paths


@pytest.mark.parametrize("source", ["draft", "target"])
def test_estimates_from_paths_agree_with_enumeration(source):
    target, draft = laws(3, 4, 1)
    paths = sample((draft if source == "draft" else target)[:4], 30_000, np.random.default_rng(0))
    probs = [np.column_stack([a[i][tuple(paths[:, : i + 1].T)] for i in range(4)]) for a in (target, draft)]
    found, lengths = estimate_lengths(*probs, sampled_from=source), expected_lengths(target, draft)
    for name in ("token", "block", "upper"):
        estimate = getattr(found, name)
        assert abs(estimate.value - getattr(lengths, name)) < Z * estimate.standard_error
        assert estimate.standard_error < 0.01
    assert abs(found.token.value - lengths.block) > 8 * found.token.standard_error  # negative control


def test_estimates_from_rows_agree_with_enumeration():
    chain = iid(draft=[0.6, 0.3, 0.1], target=[0.2, 0.3, 0.5], horizon=4)
    lengths = expected_lengths(*conditionals(chain, 0, 0, 4))
    found = estimate_from_rows(chain.target[:, 0], chain.draft[:, 0], 30_000, np.random.default_rng(3))
    assert abs(found.block.value - lengths.block) < Z * found.block.standard_error
    assert abs(found.token.value - lengths.token) < Z * found.token.standard_error


def test_estimates_with_zeros():
    found = estimate_lengths([[0.0, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]])
    assert found.block.value == pytest.approx(1.0)
    found = estimate_lengths([[0.5, 0.5], [0.5, 0.5]], [[0.0, 0.5], [0.5, 0.5]], sampled_from="target")
    assert found.block.value == pytest.approx(1.0)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(1e-3, 1.0), st.floats(1e-3, 1.0)), min_size=1, max_size=8))
def test_bounds_hold_path_by_path(ratios):
    p, q = (np.array([r]) for r in zip(*ratios, strict=True))
    twice = (np.repeat(p, 2, axis=0), np.repeat(q, 2, axis=0))
    for source in ("draft", "target"):
        found = estimate_lengths(*twice, sampled_from=source)
        assert found.token.value <= found.block.value + 1e-12
        assert found.block.value <= found.upper.value + 1e-12 or source == "draft"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: joint_law([[0.5, 0.5]], [[0.5, 0.5]]), "target"),
        (lambda: expected_lengths([], []), "target"),
        (lambda: expected_lengths([[0.5, 0.5]], [[0.5, 0.6]]), "draft"),
        (lambda: expected_lengths([[0.5, 0.5], [[1.0], [1.0]]], [[0.5, 0.5]]), r"target\[1\]"),
        (lambda: judge([[0.5, 0.5]], [[0.5, 0.5]], [0]), "target"),
        (lambda: judge([[0.5, 0.5]] * 2, [[0.5, 0.5]], [2]), "tokens"),
        (lambda: judge([[0.5, 0.5]] * 2, [[1.0, 0.0]], [1]), "tokens"),
        (lambda: estimate_lengths([[0.5]], [[0.5], [0.5]]), "target and draft"),
        (lambda: estimate_lengths([[0.5]] * 2, [[0.0]] * 2), "draft"),
        (lambda: estimate_lengths([[0.5]] * 2, [[0.5]] * 2, "both"), "sampled_from"),  # pyright: ignore[reportArgumentType]
        (lambda: conditionals(iid([1.0], [1.0], 2), 1, 0, 2), "length"),
        (lambda: conditionals(iid([1.0], [1.0], 2), 0, 1, 2), "state"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
