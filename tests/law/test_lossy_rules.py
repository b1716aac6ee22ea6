"""Lossy rules: the distribution of a position is the one the theory names, its bias is metered exactly, and a budget is never
overrun.

Enumerated on partitions of the coins (see lab.py); the reference is `outrider.theory`, which shares no code with the rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from outrider.errors import CapabilityError, ConfigError
from outrider.noise import Noise
from outrider.theory import lossy as theory
from outrider.types import Draft, Proposal
from outrider.verify import LOSSLESS, RULES, load_rule
from outrider.verify.lossy import Lossy, Position, bias_of, exact
from outrider.verify.tree import SpeculativeSampling
from tests.law.lab import SHARES, Enumerator, Probe, assemble, some
from tests.law.lab import ScriptedNoise as Scripted
from tests.law.worlds import Shape, World, chain, index, prefixes, random_world

EXACT = 1e-12
LOSSY = [name for name in RULES if name not in LOSSLESS]


class LossyEnumerator(Enumerator):
    """Cells of a chain rule with acceptance function b; what may be spent runs down along the path."""

    rule: Lossy

    def _walk(self, node, prefix, weight, token, coins, left=None) -> Iterator[Probe]:
        left = self.rule.tv_limit if left is None else left
        world, kids = self.world, self.nodes[node + 1]
        p = world.p[index(prefix, world.vocab)]
        if not kids:
            yield from self._finals(p, len(prefix) + 1, weight, token, coins)
            return
        for (x,), probability in self._draws(prefix, kids, (), 1.0):
            q = world.q[index(prefix, world.vocab)] if world.shape.has_q[kids[0]] else np.eye(world.vocab)[x]
            b, rest, bias = accept_of(self.rule, p, q, left)
            mine, mass, depth = list(token), weight * probability, len(prefix) + 1
            mine[kids[0]] = x
            if b[x] > 0:
                kept = {**coins, (depth, 0): self._pick(0.0, b[x])}
                yield from self._walk(kids[0], (*prefix, x), mass * b[x], mine, kept, left - bias)
            if b[x] < 1:
                distribution = rest / rest.sum() if rest.sum() > 0 else p
                refused = {**coins, (depth, 0): self._pick(b[x], 1.0)}
                yield from self._finals(distribution, depth, mass * (1 - b[x]), mine, refused)


def accept_of(rule: Lossy, p: np.ndarray, q: np.ndarray, left: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Acceptance, residual weights and bias within what is left, in numpy, from a wish that the theory's tables give below."""
    plan = rule.accept(Position(torch.from_numpy(p)[None], torch.from_numpy(q)[None], left))
    b, rest = np.where(p > 1e-30, plan.accept[0].numpy(), 0.0), plan.rest[0].numpy()
    if (
        abs(1 - (b * q).sum() - rest.sum()) > 1e-12
    ):  # what the target forbids is refused: the rest that is optimal for such an acceptance
        rest = np.maximum(p - b * q, 0)
        rest *= (1 - (b * q).sum()) / rest.sum()
    allowance = max(0.0, min(rule.per_token, left))
    bias = np.maximum(b * q + rest - p, 0).sum()
    if bias > allowance:
        lossless = np.divide(p, q, out=np.ones_like(p), where=q > p)
        share = allowance / bias
        b, rest, bias = lossless + share * (b - lossless), (1 - share) * np.maximum(p - q, 0) + share * rest, allowance
    return b, rest, float(bias)


def run(rule: Lossy, worlds: list[World], seed: int):
    """Output distribution over strings of full length, mean bias, and the worst bias of any outcome, of every world."""
    rng = np.random.default_rng(seed)
    kind = type("Bound", (LossyEnumerator,), {"rule": rule})
    probes = [probe for i, world in enumerate(worlds) for probe in kind(i, world, rng, 1e-11).probes()]
    p, draft = assemble(worlds, probes, torch.float64)
    verdict = rule(p, draft, Scripted((0,) * len(probes), (0,) * len(probes), tuple(probes), 0.4))
    out = []
    for i, world in enumerate(worlds):
        mine = [b for b, probe in enumerate(probes) if probe.case == i]
        mass = np.zeros(prefixes(world.vocab, world.shape.depth + 1))
        bias = gap = 0.0
        for b in mine:
            tokens = [draft.tokens[k] for k in verdict.path[b]] + [verdict.next_token[b]]
            mass[index(tokens, world.vocab)] += probes[b].weight
            bias += probes[b].weight * verdict.bias[b]
            gap += probes[b].weight * (verdict.risk[b] - (verdict.judged[b] - len(verdict.path[b])))
        out.append((total_variation(world, mass), bias, max(verdict.bias[b] for b in mine), gap, mass))
    return out


def total_variation(world: World, mass: np.ndarray) -> float:
    """Distance of the distribution of strings of depth + 1 tokens from the target's; shorter outputs go on with the target."""
    vocab, ended, target = world.vocab, np.zeros(1), np.ones(1)
    for d in range(1, world.shape.depth + 2):
        start = prefixes(vocab, d - 1)
        distributions = world.p[start - vocab ** (d - 1) : start]
        ended = (ended[:, None] * distributions).ravel() + mass[start : start + vocab**d]
        target = (target[:, None] * distributions).ravel()
    return float(np.abs(ended - target).sum() / 2)


@SHARES
@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("has_q", [True, False], ids=["distribution", "point mass"])
def test_one_position_is_as_far_off_as_its_bias_says(name, has_q, share):
    """Theorem 4 of Yin et al. 2024, on pairs of distributions: total variation of the output = metered bias; E[risk] =
    rejections."""
    rng = np.random.default_rng([41, len(name)])
    worlds = [random_world(rng, 4, chain(1, has_q)) for _ in range(some(60, share))]
    for world, (distance, bias, _, gap, _) in zip(worlds, run(load_rule(name), worlds, 2), strict=True):
        # the position's own distance: the bonus behind it is exact, so the distance of two tokens is that of the first
        assert distance <= bias + EXACT
        if has_q:
            assert distance == pytest.approx(bias, abs=1e-11)
        assert abs(gap) <= EXACT
        assert world.vocab == 4


@pytest.mark.parametrize("name", LOSSY)
def test_a_budget_bounds_the_sequence(name):
    """Chains of three: no outcome spends more than the budget, and the distribution of the text is within E[bias] of the
    target's."""
    rng = np.random.default_rng([42, len(name)])
    rule = load_rule(f"{name}:per_token=0.3,per_sequence=0.4")
    worlds = [random_world(rng, 3, chain(3)) for _ in range(12)]
    for distance, bias, worst, gap, _ in run(rule, worlds, 3):
        assert worst <= 0.4 + EXACT
        assert distance <= bias + EXACT
        assert abs(gap) <= EXACT


@pytest.mark.parametrize("name", LOSSY)
def test_without_a_budget_it_is_exact(name):
    """A spent budget reverts to speculative sampling: same path, same token, from the same coins; no bias for any rule."""
    rng = np.random.default_rng(43)
    rule, lossless = load_rule(f"{name}:per_sequence=0"), SpeculativeSampling()
    for seed in range(40):
        p, q = (torch.from_numpy(rng.dirichlet(np.full(6, 0.5), size=n)) for n in (4, 3))
        token = torch.multinomial(q, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
        draft = Draft(token, (-1, 0, 1), (3,), Proposal(q, (0, 1, 2)))
        noise = Noise((seed,), (5,))
        one, two = rule(p, draft, noise), lossless(p, draft, noise)
        assert one.bias == (0.0,)
        if name in ("typical", "top_k"):  # a gate that happens to cost nothing is used as it is
            continue
        assert (one.path, one.next_token, one.judged) == (two.path, two.next_token, two.judged)
        assert one.risk == pytest.approx(two.risk, abs=1e-9)


def test_the_budget_rule_lies_on_the_front():
    """Theorem 5: rejection probability + bias = TV, spending min(budget, TV)."""
    rng = np.random.default_rng(44)
    for budget in (0.0, 0.01, 0.05, 0.2, 1.0):
        worlds = [random_world(rng, 4, chain(1)) for _ in range(30)]
        for world, (_, bias, _, _, _) in zip(
            worlds, run(load_rule(f"tv_budget:per_token={budget}"), worlds, 4), strict=True
        ):
            distance = np.abs(world.p[0] - world.q[0]).sum() / 2
            may = (
                distance - world.q[0][world.p[0] <= 1e-30].sum()
            )  # what is forbidden is refused whatever the budget is
            b, _, spent = accept_of(load_rule(f"tv_budget:per_token={budget}"), world.p[0], world.q[0], math.inf)
            assert bias == pytest.approx(min(budget, may), abs=1e-11)
            assert 1 - (b * world.q[0]).sum() + spent == pytest.approx(distance, abs=1e-11)


THEORY = {
    "over_acceptance": lambda p, q: theory.epsilon(p, q, 0.05),
    "lenience": lambda p, q: theory.lenience(p, q, 0.8),
    "mentored": lambda p, q: theory.mentored(p, q, 0.05),
    "typical": lambda p, q: theory.typical(p, q, 0.09, 0.3),
    "top_k": lambda p, q: theory.top_k(p, q, 3),
    "neighbours": lambda p, q: theory.neighbours(p, q, np.arange(len(p))[:, None], 0.1, 16),
    "cluster": lambda p, q: theory.cluster(p, q, np.linspace(0, 1, len(p))[:, None], 14, 0.15, 0.1),
}


@pytest.mark.parametrize("name", list(THEORY))
def test_rules_are_those_of_the_theory(name):
    """`outrider.theory.lossy` and the engine's rules were written apart; they name the same distribution and the same bias."""
    rng = np.random.default_rng(45)
    rule = load_rule(f"{name}:per_token=1")
    for _ in range(40):
        p, q = rng.dirichlet(np.full(7, 0.4), size=2)
        b, rest, bias = accept_of(rule, p, q, math.inf)
        known = THEORY[name](p, q)
        assert np.abs(b * q + rest - known.kernel).max() <= 1e-7  # mentored: two searches for one root
        assert bias == pytest.approx(float(known.bias), abs=1e-7)
        assert 1 - (b * q).sum() == pytest.approx(float(known.reject), abs=1e-7)


def test_top_k_and_typical_are_off_the_front():
    """Control: gates refuse tokens that an exact rule would keep, so they pay more rejections for the same bias."""
    rng = np.random.default_rng(46)
    excess = {"typical": 0.0, "top_k": 0.0}
    for _ in range(40):
        p, q = rng.dirichlet(np.full(7, 0.6), size=2)
        for name in excess:
            b, _, bias = accept_of(load_rule(name), p, q, math.inf)
            excess[name] = max(excess[name], 1 - (b * q).sum() + bias - np.abs(p - q).sum() / 2)
    assert min(excess.values()) > 0.01


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tv_budget:per_tokn=0.1", "did you mean 'per_token'"),
        ("tv_budget:per_token=2", "between 0 and 1"),
        ("tv_budget:per_token", "must be a number"),
        ("lenience:l=zero", "must be a number, got 'zero'"),
        ("match:k=2", "has no options"),
        ("tv_budgt", "did you mean 'tv_budget'"),
    ],
)
def test_bad_words_are_named(text, words):
    with pytest.raises(ConfigError, match=words):
        load_rule(text)


def test_a_tree_is_refused():
    with pytest.raises(CapabilityError, match="chains only"):
        load_rule("tv_budget")(torch.full((3, 2), 0.5), Draft(torch.tensor([0, 1]), (-1, -1), (2,)), Noise((0,), (0,)))


def test_exact_acceptance_spends_nothing():
    rng = np.random.default_rng(47)
    p, q = (torch.from_numpy(x)[None] for x in rng.dirichlet(np.full(5, 0.5), size=2))
    assert bias_of(exact(Position(p, q, 0.0)), Position(p, q, 0.0)) <= 1e-15
    assert Shape((-1,), (True,)).depth == 1
