"""Rules that look at the distances of image codes: codes of several dimensions, tokens that are no codes, and known cases.

Their output distribution, bias and budget are enumerated with the other lossy rules (`test_lossy_rules.py`), on codes of a line.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from outrider.theory import lossy as theory
from outrider.verify import load_rule
from outrider.verify.codes import NONE, nearest
from outrider.verify.lossy import Lossy, Position, bias_of
from tests.law.test_lossy_rules import accept_of, run
from tests.law.worlds import chain, random_world

EXACT = 1e-12


def points_of(rng: np.random.Generator, size: int) -> torch.Tensor:
    return torch.from_numpy(rng.random((size, 3)))


RULES = {
    "neighbours:delta=0.3,k=3": lambda p, q, x: theory.neighbours(p, q, x, 0.3, 3),
    "cluster:k=4,gap=0.2,near=0.7": lambda p, q, x: theory.cluster(p, q, x, 4, 0.2, 0.7),
}


@pytest.mark.parametrize("spec", list(RULES))
def test_codes_of_several_dimensions_are_those_of_the_theory(spec: str) -> None:
    rng = np.random.default_rng(60)
    moved = 0
    for _ in range(60):
        points = points_of(rng, 9)
        p, q = rng.dirichlet(np.full(9, 0.5), size=2)
        rule, known = load_rule(spec, points), RULES[spec](p, q, points.numpy())
        b, rest, bias = accept_of(rule, p, q, math.inf)
        assert np.abs(b * q + rest - known.kernel).max() <= EXACT
        assert bias == pytest.approx(float(known.bias), abs=EXACT)
        moved += bias > 0.01
    assert moved > 20


@pytest.mark.parametrize("spec", list(RULES))
def test_chains_are_enumerated_with_such_codes(spec: str) -> None:
    """Exact output distribution of two tokens: within E[bias] of the target's, no outcome above the budget, and the
    ledger in expectation."""
    rng = np.random.default_rng(61)
    rule = load_rule(f"{spec},per_token=0.2,per_sequence=0.3", points_of(rng, 4))
    assert isinstance(rule, Lossy)
    worlds = [random_world(rng, 4, chain(2)) for _ in range(10)]
    spent = 0.0
    for distance, bias, worst, gap, mass in run(rule, worlds, 5):
        assert mass.sum() == pytest.approx(1.0, abs=1e-10)
        assert distance <= bias + EXACT
        assert worst <= 0.3 + EXACT
        assert abs(gap) <= EXACT
        spent += bias
    assert spent > 0.1


def test_tokens_that_are_no_codes_are_judged_exactly() -> None:
    """A class token has no neighbours: it neither gives nor gets."""
    p = torch.tensor([[0.3, 0.2, 0.1, 0.4]], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.4, 0.1, 0.4]], dtype=torch.float64)
    points = torch.tensor([[0.0], [0.1], [0.9]], dtype=torch.float64)
    for spec in RULES:
        accept = load_rule(spec, points).accept(Position(p, q, 1.0)).accept[0]
        assert float(accept[3]) == 1.0
        assert float(accept[1]) > 0.5  # exactly it would be accepted half of the time
        q_more = torch.tensor([[0.1, 0.0, 0.1, 0.8]], dtype=torch.float64)
        assert float(load_rule(spec, points).accept(Position(p, q_more, 1.0)).accept[0, 3]) == pytest.approx(0.5)


def scattered(rng: np.random.Generator, size: int, codes: list[int]) -> torch.Tensor:
    """Points of a vocabulary in which only some tokens are codes."""
    points = torch.full((size, 3), torch.nan, dtype=torch.float64)
    points[codes] = points_of(rng, len(codes))
    return points


@pytest.mark.parametrize("spec", list(RULES))
def test_codes_that_are_not_the_first_tokens_are_those_of_the_theory(spec: str) -> None:
    """Any tokens may be codes. Their numbers do not matter: moved to the front, the codes are accepted as before, bit for bit."""
    rng = np.random.default_rng(63)
    moved = 0
    for _ in range(60):
        codes = sorted(rng.choice(11, 7, replace=False).tolist())
        points = scattered(rng, 11, codes)
        p, q = rng.dirichlet(np.full(11, 0.5), size=2)
        rule, known = load_rule(spec, points), RULES[spec](p, q, points.numpy())
        b, rest, bias = accept_of(rule, p, q, math.inf)
        assert np.abs(b * q + rest - known.kernel).max() <= EXACT
        assert bias == pytest.approx(float(known.bias), abs=EXACT)
        others = [t for t in range(11) if t not in codes]
        assert np.allclose(b[others], np.minimum(1.0, p[others] / q[others]), atol=EXACT)
        front = [*codes, *others]
        first = load_rule(spec, points[codes]).accept(
            Position(*(torch.from_numpy(x[front])[None] for x in (p, q)), 1.0)
        )
        there = rule.accept(Position(*(torch.from_numpy(x)[None] for x in (p, q)), 1.0))
        assert torch.equal(first.accept[0], there.accept[0, front])
        moved += bias > 0.01
    assert moved > 20


@pytest.mark.parametrize("spec", list(RULES))
@pytest.mark.parametrize("codes", [[1, 2, 4], [0, 3], [2], []], ids=["three", "two", "one", "none"])
def test_chains_are_enumerated_with_codes_among_other_tokens(spec: str, codes: list[int]) -> None:
    """Exact output distribution of two tokens, the meter and the budget, with codes that are not the first tokens, and marks. With
    fewer than two codes nothing is near, and nothing is spent."""
    rng = np.random.default_rng([64, *codes])
    rule = load_rule(f"{spec},per_token=0.2,per_sequence=0.3", scattered(rng, 5, codes))
    worlds = [random_world(rng, 5, chain(2)) for _ in range(6)]
    spent = 0.0
    for distance, bias, worst, gap, mass in run(rule, worlds, 6):  # type: ignore[arg-type]
        assert mass.sum() == pytest.approx(1.0, abs=1e-10)
        assert distance <= bias + EXACT
        assert worst <= 0.3 + EXACT
        assert abs(gap) <= EXACT
        spent += bias
    assert spent > 0.02 if len(codes) > 1 else spent <= EXACT


@pytest.mark.parametrize("spec", list(RULES))
def test_one_position_is_as_far_off_as_its_bias_says_with_marks(spec: str) -> None:
    """The meter is the distance itself, not a bound of it: one position, codes among other tokens."""
    rng = np.random.default_rng(65)
    rule = load_rule(spec, scattered(rng, 5, [1, 2, 4]))
    for distance, bias, _, gap, _ in run(rule, [random_world(rng, 5, chain(1)) for _ in range(30)], 7):  # type: ignore[arg-type]
        assert distance == pytest.approx(bias, abs=1e-11)
        assert abs(gap) <= EXACT


def test_without_reach_both_are_speculative_sampling() -> None:
    rng = np.random.default_rng(62)
    p, q = (torch.from_numpy(x)[None] for x in rng.dirichlet(np.full(7, 0.5), size=2))
    for spec in ("neighbours:delta=0", "cluster:near=0"):
        here = Position(p, q, 1.0)
        assert bias_of(load_rule(spec).accept(here), here) <= 1e-15


def test_the_nearest_codes() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0], [3.0]], dtype=torch.float64)
    assert nearest(points, 2).tolist() == [[1, 2], [0, 2], [3, 1], [2, 1]]
    assert nearest(points[:2], 3).tolist() == [[1, NONE, NONE], [0, NONE, NONE]]
    many = torch.rand(700, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = torch.cdist(many, many, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    assert torch.equal(nearest(many, 5), whole.sort(dim=-1, stable=True).indices[:, :5])
    steps = (8 * many).round()  # most distances are met more than once
    whole = torch.cdist(steps, steps, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    assert torch.equal(nearest(steps, 40), whole.sort(dim=-1, stable=True).indices[:, :40])
    assert nearest(points[:1], 2).tolist() == [[NONE, NONE]]
    assert nearest(points[:0], 2).shape == (0, 2)
