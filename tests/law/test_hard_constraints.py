"""What the target forbids (probability 0 after processors) no rule emits: a constraint is not a part of what may be bent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from outrider.noise import Noise
from outrider.theory import lossy as theory
from outrider.types import Draft, Proposal
from outrider.verify import LOSSLESS, RULES, load_rule
from outrider.verify.lossy import AcceptancePlan, Lossy, Position
from tests.law.test_lossy_rules import EXACT, THEORY, accept_of, run
from tests.law.worlds import chain, random_world

LOSSY = [name for name in RULES if name not in LOSSLESS]
BENT = [
    "tv_budget:per_token=1",
    "over_acceptance:eps=1",
    "lenience:l=0.01",
    "mentored:kl=9",
    "typical:eps=0,delta=0",
    "top_k:k=99",
]


def forbidding(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Target distributions with forbidden tokens in every row, one row with a single token left."""
    p = rng.dirichlet(np.full(vocab, 0.7), size=rows)
    p[rng.random(p.shape) < 0.5] = 0.0
    p[:, 0] += 1e-3
    p[0] = np.eye(vocab)[0]
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_q", [True, False], ids=["distribution", "point mass"])
@pytest.mark.parametrize("name", BENT + list(LOSSLESS))
def test_no_rule_emits_a_forbidden_token(name: str, has_q: bool, dtype: torch.dtype) -> None:
    """Chains of four whose tokens are forbidden half of the time, at budgets that allow everything."""
    rng, vocab, length = np.random.default_rng(51), 9, 4
    rule = load_rule(name)
    for seed in range(60):
        p = torch.from_numpy(forbidding(rng, length + 1, vocab)).to(dtype)
        q = torch.from_numpy(rng.dirichlet(np.ones(vocab), size=length)).to(dtype)
        token = torch.multinomial(q, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
        draft = Draft(token, (-1, 0, 1, 2), (length,), Proposal(q, (0, 1, 2, 3)) if has_q else None)
        verdict = rule(p, draft, Noise((seed,), (5,)))
        tokens = [draft.tokens[k] for k in verdict.path[0]] + [verdict.next_token[0]]
        assert all(p[row, x] > 0 for row, x in enumerate(tokens))


@pytest.mark.parametrize("name", LOSSY)
def test_the_meter_is_right_where_tokens_are_forbidden(name: str) -> None:
    """Theorem 4 with zeros in p: the distance of the output is the metered bias, and the risk the mean of the rejections."""
    rng = np.random.default_rng([52, len(name)])
    worlds = [random_world(rng, 4, chain(1)) for _ in range(60)]
    for world in worlds:
        world.p[:] = forbidding(rng, len(world.p), 4)
    for world, (distance, bias, _, gap, mass) in zip(worlds, run(load_rule(name), worlds, 5), strict=True):
        assert distance == pytest.approx(bias, abs=1e-11)
        assert abs(gap) <= EXACT
        first = mass[1:5] + mass[5:21].reshape(4, 4).sum(1)  # strings of one token, and by the first of two
        assert first[world.p[0] == 0].max(initial=0.0) <= EXACT


def test_the_budget_rule_stays_on_the_front() -> None:
    """Rejections + bias = TV as before; the front now ends where only the draft's forbidden mass is refused."""
    rng = np.random.default_rng(53)
    for p, q in zip(forbidding(rng, 40, 6), rng.dirichlet(np.ones(6), size=40), strict=True):
        for budget in (0.0, 0.05, 1.0):
            b, _, bias = accept_of(load_rule(f"tv_budget:per_token={budget}"), p, q, math.inf)
            assert 1 - (b * q).sum() + bias == pytest.approx(np.abs(p - q).sum() / 2, abs=1e-11)
        assert 1 - (b * q).sum() == pytest.approx(q[p == 0].sum(), abs=1e-11)


@pytest.mark.parametrize("name", [name for name in THEORY if name != "mentored"])
def test_the_theory_says_the_same(name: str) -> None:
    rng = np.random.default_rng(54)
    rule = load_rule(f"{name}:per_token=1")
    for p, q in zip(forbidding(rng, 40, 6), rng.dirichlet(np.full(6, 0.5), size=40), strict=True):
        b, rest, bias = accept_of(rule, p, q, math.inf)
        known = theory.supported(p, q, THEORY[name](p, q))
        assert np.abs(b * q + rest - known.kernel).max() <= 1e-7
        assert bias == pytest.approx(float(known.bias), abs=1e-7)
        assert 1 - (b * q).sum() == pytest.approx(float(known.reject), abs=1e-7)


def test_mentored_spends_its_divergence_on_what_is_allowed() -> None:
    """The divergence KL(p || output) does not see tokens without p, so the theory's optimum bends there; the rule may not."""
    rng = np.random.default_rng(55)
    rule = load_rule("mentored:kl=0.05,per_token=1")
    for p, q in zip(forbidding(rng, 40, 6), rng.dirichlet(np.full(6, 0.5), size=40), strict=True):
        b, rest, _ = accept_of(rule, p, q, math.inf)
        out = b * q + rest
        kept = p > 0
        assert out[~kept].max(initial=0.0) == 0.0 and out.sum() == pytest.approx(1.0, abs=1e-12)
        assert (p[kept] * np.log(p[kept] / out[kept])).sum() <= 0.05 + 1e-9


def test_an_acceptance_of_ones_own_cannot_forget_it() -> None:
    """Whoever writes a new acceptance function need not think of bans."""

    def greedy(position: Position) -> AcceptancePlan:
        return AcceptancePlan(torch.ones_like(position.p), torch.zeros_like(position.p))

    p = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    for token in (0, 2):
        verdict = Lossy("mine", greedy)(p, Draft(torch.tensor([token]), (-1,), (1,)), Noise((1,), (3,)))
        assert (verdict.path, verdict.next_token, verdict.bias) == (((),), (1,), (0.0,))
