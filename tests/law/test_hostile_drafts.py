"""EX-7 at the level of a rule: every pattern of acceptance, coins at the ends of their range, and drafts that lie."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from outrider.contained import defect_of
from outrider.engine.sanitize import sanitize_draft
from outrider.errors import ConfigError, RequestError
from outrider.noise import Noise
from outrider.types import POINT_MASS, Draft, Proposal
from outrider.verify import LOSSLESS, RULES, Match, SpeculativeSampling, load_rule
from outrider.verify.chain import verify_chains
from outrider.verify.numerics import as_weights, draw
from outrider.verify.tree import verify_forest
from tests.law.lab import Enumerator, examine
from tests.law.worlds import Shape, chain, random_world

RULE = SpeculativeSampling()
BOTH = pytest.mark.parametrize("judge", [verify_chains, verify_forest], ids=["closed form", "plain"])
ENDS = (0.0, 2.0**-53, 2.0**-32, 0.5, 1 - 2.0**-32, 1 - 2.0**-53, 1.0)


class Coins(Noise):
    """accept: one coin per depth; final: one for all."""

    accept: tuple[float, ...]
    final: float

    def uniform(self, b, depth, lane, index=0):
        return self.accept[depth - 1] if lane == "accept" else self.final


def coins(accept, final, sequences=1) -> Coins:
    noise = Coins((0,) * sequences, (0,) * sequences)
    object.__setattr__(noise, "accept", tuple(accept))
    object.__setattr__(noise, "final", final)
    return noise


@BOTH
@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("declared", [True, False])
def test_every_accept_pattern(judge, length, declared):
    """All 2^K scripts of coins: the path is the accepted head of the draft, the last token comes from the row it ends at."""
    vocab = length + 2
    half = torch.full((length + 1, vocab), 0.0, dtype=torch.float64)
    for d in range(length + 1):
        half[d, 0], half[d, d + 1] = 0.5, 0.5  # token 0 is drafted everywhere; row d alone can emit token d + 1
    distribution = torch.zeros(1, vocab, dtype=torch.float64)
    distribution[0, 0] = 1.0
    q = Proposal(distribution, (0,) * length) if declared else None
    draft = Draft(torch.zeros(length, dtype=torch.int64), tuple(range(-1, length - 1)), (length,), q)
    for pattern in product([True, False], repeat=length):
        verdict = judge(half, draft, coins([0.25 if yes else 0.75 for yes in pattern], 0.9))
        head = next((d for d, yes in enumerate(pattern) if not yes), length)
        assert verdict.path == (tuple(range(head)),)
        assert verdict.next_token == (head + 1,)
        assert verdict.judged == (min(head + 1, length),)
        assert verdict.risk == (pytest.approx(0.5 * verdict.judged[0]),)
        assert verdict.bias == (0.0,)


@pytest.mark.parametrize("vocab", [3, 700, 4096, 4097, 9000, 20_480])
@pytest.mark.parametrize("u", ENDS)
def test_no_token_without_probability_is_drawn(vocab, u):
    """Zeros at both ends, in the middle and at block borders; any coin of [0, 1], the ends included."""
    rng = np.random.default_rng(vocab)
    rows = np.zeros((5, vocab))
    rows[0] = rng.random(vocab) * (rng.random(vocab) < 0.3)
    rows[1, vocab // 2] = 1.0
    rows[2, [0, vocab - 1]] = [1e-30, 1e-30]
    rows[3, vocab // 3] = 5e-324
    rows[3, vocab // 3 + 1] = 1.0
    rows[4, min(1024, vocab - 1)] = 0.3
    rows[0, 1] = 0.1
    token, total = draw(as_weights(torch.from_numpy(rows)), [u] * 5)
    assert (rows[np.arange(5), token.numpy()] > 0).all()
    assert total.numpy() == pytest.approx(rows.sum(1))


@pytest.mark.parametrize("vocab", [50, 4096, 4097, 20_000])
def test_draws_are_the_inverse_cdf(vocab):
    """The token is the cell of the cumulative sum that u falls into, at 300 places next to the borders of cells."""
    rng = np.random.default_rng(vocab)
    p = rng.dirichlet(np.full(vocab, 0.3))
    p[rng.random(vocab) < 0.2] = 0
    p /= p.sum()
    cdf = np.cumsum(p)
    cells = rng.choice(np.flatnonzero(p > 1e-9), size=150)
    u = np.concatenate([cdf[cells] - p[cells] + 1e-13, cdf[cells] - 1e-13])
    weight = as_weights(torch.from_numpy(p)[None]).expand(300, -1)
    token, _ = draw(weight.contiguous(), u.tolist())
    assert token.tolist() == [*cells, *cells]


@BOTH
@pytest.mark.parametrize("u", ENDS)
def test_accept_coin_at_its_ends(judge, u):
    """A token without target probability is refused by every coin; one the target wants more than the drafter never is."""
    p = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    q = Proposal(torch.tensor([[1.0, 0.0]], dtype=torch.float64), (0,))
    for draft in (Draft(torch.tensor([0]), (-1,), (1,), q), Draft(torch.tensor([0]), (-1,), (1,))):
        verdict = judge(p, draft, coins([u], u))
        assert (verdict.path, verdict.next_token) == (((),), (1,))
    q = Proposal(torch.tensor([[0.9, 0.1]], dtype=torch.float64), (0,))
    verdict = judge(p, Draft(torch.tensor([1]), (-1,), (1,), q), coins([min(u, 1 - 2.0**-53)], u))
    assert (verdict.path, verdict.next_token) == (((0,),), (0,))


@BOTH
def test_equal_distributions_never_refuse(judge):
    """p == q bit for bit: acceptance is one for every coin of (0, 1), and the ledger says so."""
    rng = np.random.default_rng(1)
    p = torch.softmax(torch.from_numpy(rng.normal(size=(4, 3000)) * 3), -1).float()
    token = torch.multinomial(p[:3].double(), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    draft = Draft(token, (-1, 0, 1), (3,), Proposal(p[:3], (0, 1, 2)))
    for u in (2.0**-53, 0.5, 1 - 2.0**-53):
        verdict = judge(p, draft, coins([u] * 3, u))
        assert verdict.accepted == (3,)
        assert verdict.risk[0] < 1e-6


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5, 0.0])
def test_a_distribution_that_cannot_have_produced_its_token_counts_as_a_point_mass(judge, bad):
    p = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]], dtype=torch.float64)
    q = torch.tensor([[bad, 0.5, 0.5]], dtype=torch.float64)
    lie = Draft(torch.tensor([0]), (-1,), (1,), Proposal(q, (0,)))
    for accept, final in product((0.1, 0.3), (0.01, 0.5, 0.99)):
        assert judge(p, lie, coins([accept], final)) == judge(p, replace(lie, q=None), coins([accept], final))


@BOTH
def test_nan_elsewhere_in_a_distribution_leaves_a_valid_token_and_a_finite_ledger(judge):
    p = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]], dtype=torch.float64)
    q = torch.tensor([[0.8, math.nan, 0.1]], dtype=torch.float64)
    draft = Draft(torch.tensor([0]), (-1,), (1,), Proposal(q, (0,)))
    verdict = judge(p, draft, coins([0.9], 0.99))
    assert verdict.path == ((),)
    assert verdict.next_token == (2,)
    assert verdict.risk == (pytest.approx(0.75),)


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_target_distribution_without_mass_is_an_error_and_never_a_token(judge, bad):
    p = torch.full((2, 3), bad, dtype=torch.float64)
    with pytest.raises(RequestError, match="sequence 0"):
        judge(p, Draft(torch.tensor([0]), (-1,), (1,)), coins([0.5], 0.5))


class Liar(Enumerator):
    """A drafter that declares a distribution and always proposes a token the distribution cannot produce."""

    def _draws(self, prefix, kids, drawn, weight):
        yield tuple(self.world.vocab - 1 for _ in kids), weight


@pytest.mark.parametrize("siblings", ["iid", "without_replacement"])
def test_a_token_outside_its_distribution_leaves_the_output_distribution_alone(siblings):
    """Given that token the output has the target's distribution; so has any mixture with honest drafts. The ledger stays exact."""
    rng = np.random.default_rng(2)
    worlds = []
    for shape in (chain(1), chain(2), Shape((-1, -1, 0), (True,) * 3, siblings)):
        for _ in range(20):
            world = random_world(rng, 3, shape)
            world.q[:] = rng.dirichlet(np.ones(3), size=len(world.q)) * [1, 1, 0]
            world.q /= world.q.sum(1, keepdims=True)
            worlds.append(world)
    for judge in (verify_forest, RULE):
        found = examine(judge, worlds, rng, enumerator=Liar)
        assert max(found.distribution.max(), found.ledger.max(), found.spread.max()) <= 1e-12


GOOD = Draft(
    torch.tensor([1, 2, 0]),
    (-1, 0, -1),
    (2, 1),
    Proposal(torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.3, 0.5]]), (0, 1, POINT_MASS)),
)


FOUR = torch.ones(1, 4) / 4
"""A distribution over another vocabulary."""


def test_drafts_that_are_right_pass():
    for draft in (GOOD, Draft.empty(4), replace(GOOD, q=None)):
        assert defect_of(draft, len(draft.counts), [3] * len(draft.counts)) == ""
        assert sanitize_draft(draft, 3) == (draft, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parent": (-1, 1, -1)}, "node 1 has parent 1"),
        ({"parent": (-1, 0, 0)}, "node 2 has parent 0"),
        ({"parent": (-1, -2, -1)}, "node 1 has parent -2"),
        ({"counts": (2, 2)}, "counts that sum to 4"),
        ({"counts": (4, -1)}, "counts that sum to 3"),
        ({"counts": (2, 1, 0)}, "trees for 3 sequences"),
        ({"counts": (2.0, 1.0)}, "not whole numbers"),
        ({"token": torch.tensor([1, 2])}, "2 tokens and 3 parents"),
        ({"token": torch.tensor([1.0, 2.0, 0.0])}, "tokens of type torch.float32"),
        ({"q": Proposal(torch.ones(2, 3) / 3, (0, 1))}, "2 row numbers for 3 nodes"),
        ({"q": Proposal(torch.ones(2, 3) / 3, (0, 2, 0))}, "row numbers outside its 2 distributions"),
        ({"q": Proposal(torch.ones(2, 3) / 3, (0, 0, -2))}, "row numbers outside its 2 distributions"),
        ({"q": Proposal(torch.ones(1, 2) / 2, (0, -1, -1), torch.tensor([0, 1, 2]))}, "support of shape"),
    ],
)
def test_a_draft_without_structure_is_none(change, words):
    assert words in defect_of(replace(GOOD, **change), 2, [3, 3])


@pytest.mark.parametrize(
    ("change", "tokens", "row"),
    [
        ({"token": torch.tensor([1, 3, 0])}, (1, 0), None),
        ({"token": torch.tensor([1, 2, -1])}, (1, 2), (0, 1)),
        ({"q": Proposal(torch.ones(2, 3) / 2, (0, -1, 1))}, (1, 2, 0), None),
        ({"q": Proposal(torch.tensor([[math.nan, 0.5, 0.5], [0.2, 0.3, 0.5]]), (-1, 0, 1))}, (1, 2, 0), (-1, -1, 1)),
        ({"q": Proposal(torch.tensor([[1.5, -0.5, 0.0], [0.2, 0.3, 0.5]]), (1, -1, 0))}, (1, 2, 0), (1, -1, -1)),
        ({"q": Proposal(torch.ones(1, 4) / 4, (0, -1, -1))}, (1, 2, 0), None),
        ({"q": Proposal(FOUR, (0, -1, -1), sound=FOUR)}, (1, 2, 0), None),
    ],
)
def test_what_a_draft_says_wrongly_is_not_used(change, tokens, row):
    """A token outside the vocabulary goes with what hangs below it; what is no distribution is not declared any more."""
    kept, broken = sanitize_draft(replace(GOOD, **change), 3)
    assert broken
    assert kept.tokens == tokens == tuple(kept.token.tolist())
    assert (None if kept.q is None else kept.q.row) == row


@pytest.mark.parametrize("name", ["speculative_sampling", "block"])
def test_a_proposal_without_distributions_is_point_masses(name):
    draft = Draft.join([([1, 2], [-1, 0])], Proposal(torch.empty(0, 3), (POINT_MASS, POINT_MASS)))
    assert defect_of(draft, 1, [2]) == ""
    kept, broken = sanitize_draft(draft, 3)
    plain = replace(draft, q=None)
    assert (kept.q, kept.tokens, broken) == (None, (1, 2), 0)
    p, noise = torch.ones(3, 3) / 3, Noise((5,), (0,))
    assert load_rule(name)(p, kept, noise, [0.0]) == load_rule(name)(p, plain, noise, [0.0])


def test_rules_have_names():
    assert {"speculative_sampling", "match", "block", "k_seq", "tv_budget"} <= set(RULES)
    assert isinstance(load_rule("match"), Match)
    assert isinstance(load_rule("auto"), SpeculativeSampling)
    with pytest.raises(ConfigError, match="did you mean 'match'"):
        load_rule("mach")
    for name in RULES:
        rule = load_rule(name)
        assert rule.name == name
        assert rule.lossless == (name in LOSSLESS)
        assert (rule.tv_limit == 0.0) == rule.lossless
