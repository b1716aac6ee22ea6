"""The closed form on chains and the plain rule on forests are one rule; and no sequence sees its neighbours."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from outrider.errors import RequestError
from outrider.noise import Noise
from outrider.transfer import fetch
from outrider.types import POINT_MASS, Draft, Proposal
from outrider.verify import Match, SpeculativeSampling, native, transport
from outrider.verify.block import BlockVerification
from outrider.verify.chain import verify_chains
from outrider.verify.multidraft import KSeq
from outrider.verify.transport import OptimalTransport
from outrider.verify.tree import sequential_tests, verify_forest
from tests.law.lab import EDGE, Enumerator, examine
from tests.law.test_block_rule import NEAR, BlockEnumerator
from tests.law.worlds import Shape, chain, random_world


def step(rng: np.random.Generator, sequences: int, vocab: int, dtype: torch.dtype, tree: bool = False):
    """A step with ragged drafts: distributions, point masses and both, support or not, near and far from the target."""
    counts = tuple(int(n) for n in rng.integers(0, 5, size=sequences))
    nodes = sum(counts)
    sharp = float(rng.choice([0.5, 2.0, 6.0]))
    p = torch.softmax(torch.from_numpy(rng.normal(size=(sequences + nodes, vocab)) * sharp), -1)
    greedy = torch.from_numpy(rng.random(len(p)) < 0.1)
    p[greedy] = 0
    p[greedy, int(rng.integers(vocab))] = 1
    q = torch.softmax(torch.from_numpy(rng.normal(size=(max(nodes, 1), vocab)) * sharp), -1)
    near = torch.from_numpy(rng.random(len(q)) < 0.5)
    q[near] = p[: len(q)][near] if len(p) >= len(q) else q[near]
    parent: list[int] = []
    for low, n in zip(np.cumsum([0, *counts]), counts, strict=False):
        parent += [int(rng.integers(low - 1, k)) if tree else k - 1 for k in range(low, low + n)]
        parent[low:] = [-1 if up < low else up for up in parent[low:]]
    token = torch.multinomial(q, 1, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))[:nodes, 0]
    row = tuple(k if rng.random() < 0.8 else POINT_MASS for k in range(nodes))
    mode: Literal["iid", "without_replacement"] = "iid" if rng.random() < 0.5 else "without_replacement"
    proposal = [None, Proposal(q.to(dtype), row, None, mode), Proposal(q.to(dtype), row, None, mode)][
        int(rng.integers(3))
    ]
    if proposal is not None and rng.random() < 0.3:
        support = torch.from_numpy(rng.permutation(vocab)[: max(vocab * 2 // 3, 1)])
        distributions = proposal.probs[:, support]
        proposal = Proposal(distributions / distributions.sum(1, keepdim=True).clamp(min=1e-30), row, support, mode)
    noise = Noise(
        tuple(int(s) for s in rng.integers(2**40, size=sequences)),
        tuple(int(s) for s in rng.integers(900, size=sequences)),
    )
    return p.to(dtype), Draft(token, tuple(parent), counts, proposal), noise


@pytest.mark.parametrize(
    ("vocab", "sequences", "rounds"), [(2, 8, 50), (7, 8, 80), (300, 4, 20), (5000, 3, 6), (1024 * 5, 2, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("native", ["1", "0"])
def test_twins_agree_bit_for_bit(vocab, sequences, rounds, dtype, native, monkeypatch):
    monkeypatch.setenv("OUTRIDER_NATIVE", native)
    rng = np.random.default_rng([21, vocab])
    for _ in range(rounds):
        p, draft, noise = step(rng, sequences, vocab, dtype)
        assert draft.is_chain
        assert verify_chains(p, draft, noise) == verify_forest(p, draft, noise)


@pytest.mark.parametrize("rule", [SpeculativeSampling(), BlockVerification()], ids=lambda rule: rule.name)
@pytest.mark.parametrize(
    ("vocab", "sequences", "rounds"), [(2, 8, 40), (7, 8, 60), (300, 4, 15), (5000, 3, 5), (1024 * 5, 2, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_accelerator_decides_as_the_host_does(rule, vocab, sequences, rounds, dtype, monkeypatch):
    """The twins of `device.py`, here on the CPU: the same verdict as the plain passes, bit for bit."""
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    rng = np.random.default_rng([26, vocab])
    for _ in range(rounds):
        p, draft, noise = step(rng, sequences, vocab, dtype)
        assert fetch(rule.launch(p, draft, noise)) == [rule(p, draft, noise)]


@pytest.mark.parametrize(
    ("rule", "enumerator", "edge"),
    [(SpeculativeSampling(), Enumerator, EDGE), (BlockVerification(), BlockEnumerator, NEAR)],
    ids=lambda x: getattr(x, "name", ""),
)
def test_an_accelerator_keeps_the_distribution(rule, enumerator, edge):
    """Output distribution and ledger by enumeration: distributions, point masses, both, and a draft vocabulary."""
    rng = np.random.default_rng(27)
    shapes = [chain(1), chain(2), chain(3), Shape((-1, 0), (True, False)), chain(2, has_q=False)]
    worlds = [random_world(rng, 3, shape) for shape in shapes for _ in range(6)]
    for some in (worlds, [random_world(rng, 4, chain(2), np.array([2, 0, 3])) for _ in range(6)]):
        found = examine(
            lambda p, draft, noise: fetch(rule.launch(p, draft, noise))[0], some, rng, edge=edge, enumerator=enumerator
        )
        assert max(found.distribution.max(), found.ledger.max()) < 1e-11


@pytest.mark.parametrize("rule", [SpeculativeSampling(), BlockVerification()], ids=lambda rule: rule.name)
def test_an_accelerator_draws_again_where_nothing_is_left(rule):
    """q exceeds p nearly everywhere, so rounding may leave a residual without mass: both draw from the row itself then."""
    p = torch.full((3, 4), 0.25)
    q = Proposal(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]), (0, 1))
    draft = Draft(torch.tensor([1, 0]), (-1, 0), (2,), q)
    for seed in range(50):
        noise = Noise((seed,), (7,))
        assert fetch(rule.launch(p, draft, noise)) == [rule(p, draft, noise)]


@pytest.mark.parametrize("rule", [SpeculativeSampling(), BlockVerification()], ids=lambda rule: rule.name)
def test_an_accelerator_says_when_there_is_no_distribution(rule):
    bad = torch.tensor([[0.0, 0.0], [0.5, 0.5]])
    with pytest.raises(RequestError, match="no positive finite sum"):
        fetch(rule.launch(bad, Draft(torch.tensor([1]), (-1,), (1,)), Noise((1,), (1,))))


def test_a_rule_of_ones_own_is_asked_and_not_its_ancestor():
    """`launch` belongs to a `__call__`: a subclass with another one is called, also where an accelerator could decide."""

    class Mine(SpeculativeSampling):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    assert getattr(SpeculativeSampling.__call__, "launch", None) is not None
    assert getattr(Mine.__call__, "launch", None) is None


@pytest.mark.parametrize("rule", [SpeculativeSampling(), Match()], ids=lambda rule: rule.name)
def test_a_step_may_judge_nobody(rule):
    """A step of prompt chunks alone has no sequence with a verdict."""
    verdict = rule(torch.zeros(0, 7), Draft.empty(0), Noise((), ()))
    assert (verdict.path, verdict.next_token, verdict.judged, verdict.risk) == ((), (), (), ())


@pytest.mark.parametrize("rule", [SpeculativeSampling(), Match()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize(("vocab", "rounds"), [(5, 40), (700, 10), (5000, 6)])
def test_no_sequence_sees_its_neighbours(rule, tree, vocab, rounds):
    """Alone, in a batch, and in the batch reversed: the same path, token and ledger, bit for bit."""
    rng = np.random.default_rng([22, vocab])
    for _ in range(rounds):
        p, draft, noise = step(rng, 6, vocab, torch.float32, tree)
        together = rule(p, draft, noise)
        order = [5, 4, 3, 2, 1, 0]
        rows = order + [6 + k for b in order for k in range(draft.offsets[b], draft.offsets[b + 1])]
        reverse = rule(p[rows], draft.take(order), noise.take(order))
        for b in range(6):
            low, high = draft.offsets[b], draft.offsets[b + 1]
            alone = rule(p[[b, *range(6 + low, 6 + high)]], draft.take([b]), noise.take([b]))
            assert [k + low for k in alone.path[0]] == list(together.path[b])
            for name in ("next_token", "judged", "risk", "spread"):
                assert getattr(alone, name)[0] == getattr(together, name)[b] == getattr(reverse, name)[5 - b], name


RULES_WITH_PASSES = [SpeculativeSampling(), BlockVerification(), KSeq(), OptimalTransport()]


@pytest.mark.parametrize("rule", RULES_WITH_PASSES, ids=lambda rule: rule.name)
@pytest.mark.parametrize(("vocab", "rounds"), [(5, 40), (700, 20), (5000, 6)])
def test_native_and_plain_passes_give_one_verdict(rule, vocab, rounds, monkeypatch):
    """Same path, token and judged positions; the ledger to rounding. Coins within rounding of a threshold: none in these steps."""
    rng = np.random.default_rng([24, vocab])
    for _ in range(rounds):
        p, draft, noise = step(rng, 4, vocab, torch.float64, rule.trees)
        monkeypatch.setenv("OUTRIDER_NATIVE", "1")
        native = rule(p, draft, noise)
        monkeypatch.setenv("OUTRIDER_NATIVE", "0")
        plain = rule(p, draft, noise)
        assert (native.path, native.next_token, native.judged) == (plain.path, plain.next_token, plain.judged)
        assert native.risk == pytest.approx(plain.risk, abs=1e-9)
        assert native.spread == pytest.approx(plain.spread, abs=1e-9)


@pytest.mark.parametrize("vocab", [5, 40, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_damaged_distribution_leaves_the_ledger_of_block_verification_finite(vocab, dtype, monkeypatch):
    """NaN in q, which the engine takes out before it is judged: all twins count its mass as lost, and no variance."""
    rng, rule, damaged = np.random.default_rng([29, vocab]), BlockVerification(), 0
    for _ in range(40):
        p, draft, noise = step(rng, 4, vocab, dtype)
        if draft.q is None:
            continue
        draft.q.probs[0, int(rng.integers(draft.q.probs.shape[1]))] = float("nan")
        monkeypatch.setenv("OUTRIDER_NATIVE", "1")
        found = [rule(p, draft, noise), fetch(rule.launch(p, draft, noise))[0]]
        monkeypatch.setenv("OUTRIDER_NATIVE", "0")
        plain = rule(p, draft, noise)
        damaged += 1.0 in plain.risk or max(plain.risk) > 1.0
        for verdict in found:
            assert verdict.risk == pytest.approx(plain.risk, abs=1e-5)
            assert verdict.spread == pytest.approx(plain.spread, abs=1e-5)
        assert np.isfinite(plain.risk).all() and np.isfinite(plain.spread).all()
    assert damaged


def test_native_transport_is_its_twin():
    """One node of k i.i.d. siblings: chances, residual and its total, from pieces that both sort tokens into."""
    rng = np.random.default_rng(25)
    for vocab, k, tolerance in ((300, 2, 1e-7), (300, 5, 1e-7), (6000, 2, 1e-5), (6000, 3, 1e-5)):
        for sharp in (0.3, 1.0, 3.0):
            p, q = (torch.from_numpy(rng.dirichlet(np.full(vocab, sharp))).unsqueeze(0) for _ in range(2))
            q = 0.6 * p + 0.4 * q
            tokens = rng.choice(vocab, size=k, p=q[0].numpy() / float(q.sum())).tolist()
            tokens[-1] = tokens[0] if rng.random() < 0.5 else tokens[-1]
            found = native.transport(p, q, tokens, transport.PIECES, transport.gauss_points((k + 1) // 2))
            if found is None:
                pytest.skip("needs a C++ compiler")
            plain = transport.plain_choice(p, q, tokens)
            assert sequential_tests(found.taken) == [pytest.approx(test, abs=tolerance) for test in plain.tests]
            assert found.left == pytest.approx(plain.risk, abs=tolerance)
            assert (found.rest - plain.rest).abs().max() < tolerance


def test_dispatch():
    """The public rule takes the closed form exactly for chains, and both readings are the same there."""
    rng = np.random.default_rng(23)
    rule = SpeculativeSampling()
    for tree in (False, True):
        p, draft, noise = step(rng, 20, 5, torch.float64, tree)
        assert rule(p, draft, noise) == verify_forest(p, draft, noise)
