"""EX-1 for the optimal choice among i.i.d. siblings: distribution, ledger, optimality; by enumeration and against the min-cut
bound."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch

from outrider.theory.transport import optimal_iid
from outrider.verify import transport
from outrider.verify.multidraft import KSeq
from outrider.verify.transport import OptimalTransport, best_choice, choose
from tests.law.lab import COARSE, EDGE, EXACT, SHARES, Enumerator, chances_in_turn, check_rule, examine, some
from tests.law.worlds import Shape, index, random_world, rounded

RULE = OptimalTransport()


def chances(p: np.ndarray, q: np.ndarray, drawn: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(P(each candidate is the chosen one | tokens), m): the rule's own kernels; that they are right is what is tested below."""
    piece, choice = best_choice(torch.from_numpy(p)[None], torch.from_numpy(q / q.sum())[None], len(drawn))
    return np.array(choice.chances(piece[list(drawn)].tolist())), q / q.sum() * choice.multiplier[piece.numpy()]


class TransportEnumerator(Enumerator):
    """At a node of i.i.d. siblings: the first of equal tokens has all their chance, and passes with min(1, p / m)."""

    near = 1e-11

    def _tests(self, kids, drawn, prefix, r) -> tuple[list[float], np.ndarray]:
        if not self._all(kids, "iid"):
            return super()._tests(kids, drawn, prefix, r)
        chosen, mixed = chances(r, self.world.q[index(prefix, self.world.vocab)], drawn)
        keep = []
        for j, x in enumerate(drawn):
            share = sum(chosen[i] for i, y in enumerate(drawn) if y == x) if x not in drawn[:j] else 0.0
            keep.append(share * (1.0 if r[x] >= mixed[x] else r[x] / mixed[x]))
        rest = np.maximum(r - mixed, 0)
        return chances_in_turn(keep), rest / rest.sum() if rest.sum() > 0 else r


PAIR = (True, True)


check = partial(check_rule, RULE, TransportEnumerator)


@SHARES
def test_float32(share):
    rng, count = np.random.default_rng(43), some(40, share)
    worlds = [rounded(random_world(rng, 4, Shape((-1, -1), PAIR)), torch.float32) for _ in range(count)]
    check(worlds, 3, torch.float32, COARSE, 1e-6)


@SHARES
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_few_pieces_cost_acceptance_and_never_the_distribution(monkeypatch, pieces, share):
    monkeypatch.setattr(transport, "EVERY_TOKEN", 0)
    monkeypatch.setattr(transport, "PIECES", pieces)
    rng = np.random.default_rng(44)
    check([random_world(rng, 4, Shape((-1, -1), PAIR)) for _ in range(some(60, share))], 4)


def pairs_of_distributions(rng: np.random.Generator, vocab: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Smooth and sharp distributions, with tokens that one of the two never draws, and equal ones."""
    for sharp in (0.1, 0.5, 3.0):
        for _ in range(6):
            p, q = rng.dirichlet(np.full(vocab, sharp), size=2)
            yield p, q
            for distribution in (p, q):
                distribution[rng.integers(vocab)] = 0
            yield p / p.sum(), q / q.sum()
    yield p / p.sum(), p / p.sum()


@pytest.mark.parametrize(("vocab", "k"), [(2, 2), (3, 2), (3, 3), (5, 2), (4, 4), (40, 2), (40, 5), (200, 3)])
def test_it_accepts_what_the_cut_allows(vocab, k):
    """Acceptance is 1 + min over H of p(H) - q(H)^k to rounding, and the choice of a candidate has the distribution it claims."""
    rng = np.random.default_rng([45, vocab, k])
    for p, q in pairs_of_distributions(rng, vocab):
        piece, choice = best_choice(torch.from_numpy(p)[None], torch.from_numpy(q)[None], k)
        mixed = q * choice.multiplier[piece.numpy()]
        assert mixed.sum() == pytest.approx(1.0, abs=1e-11)
        assert np.minimum(p, mixed).sum() == pytest.approx(float(optimal_iid(p, q, k).acceptance), abs=1e-11)
        if vocab**k > 256:
            continue
        distribution = np.zeros(vocab)
        for drawn in itertools.product(np.flatnonzero(q > 0), repeat=k):
            np.add.at(
                distribution, list(drawn), q[list(drawn)].prod() * np.array(choice.chances(piece[list(drawn)].tolist()))
            )
        assert np.abs(distribution - mixed).max() < 1e-12


@pytest.mark.parametrize(("k", "loss"), [(2, 1e-3), (4, 1e-3), (8, 1.5e-3), (30, 3e-3)])
def test_a_real_vocabulary_comes_close_to_the_optimum(k, loss):
    rng = np.random.default_rng(46)
    for spread in (0.0, 0.05, 0.3, 1.0, 2.0, 4.0) * 2:
        logits = 2.5 * rng.normal(size=32_000) - 1.1 * np.log1p(np.arange(32_000))
        p, q = (np.exp(x - np.logaddexp.reduce(x)) for x in (logits, logits + spread * rng.normal(size=32_000)))
        piece, choice = best_choice(torch.from_numpy(p)[None], torch.from_numpy(q / q.sum())[None], k)
        mixed = q / q.sum() * choice.multiplier[piece.numpy()]
        best = float(optimal_iid(p, q / q.sum(), k).acceptance)
        assert best - loss <= np.minimum(p, mixed).sum() <= best + 1e-9
        assert mixed.sum() == pytest.approx(1.0, abs=1e-9)


def test_it_accepts_no_less_than_k_seq():
    rng = np.random.default_rng(47)
    worlds = [random_world(rng, 3, Shape((-1, -1, -1), (True,) * 3)) for _ in range(10)]
    ours = examine(RULE, worlds, rng, edge=1e-11, enumerator=TransportEnumerator).accepted
    from tests.law.test_kseq_rule import KSeqEnumerator

    other = examine(KSeq(), worlds, rng, edge=1e-11, enumerator=KSeqEnumerator).accepted
    assert (ours >= other - EXACT).all()
    assert (ours > other + 1e-2).any()


def wrong_multiplier(p: torch.Tensor, draft, noise):
    """The mistake of testing the chosen candidate with the multiplier that was aimed at by one candidate fewer."""
    original = transport.choose
    transport.choose = lambda p, q, k: original(p, q, k - 1)
    try:
        return RULE(p, draft, noise)
    finally:
        transport.choose = original


def sequential_chances(p: torch.Tensor, draft, noise):
    """The mistake of choosing among the candidates uniformly while testing as if the best had been chosen."""
    original = transport.CandidateChoice.chances
    transport.CandidateChoice.chances = lambda self, pieces: [1 / len(pieces)] * len(pieces)
    try:
        return RULE(p, draft, noise)
    finally:
        transport.CandidateChoice.chances = original


@pytest.mark.parametrize("liar", [wrong_multiplier, sequential_chances])
def test_control_a_wrong_choice_is_seen(liar):
    rng = np.random.default_rng(48)
    worlds = [random_world(rng, 3, Shape((-1, -1, -1), (True,) * 3)) for _ in range(6)]
    assert examine(liar, worlds, rng, edge=EDGE, enumerator=TransportEnumerator).distribution.max() > 1e-3


def test_pieces_need_not_be_in_order_to_rounding():
    """Equal ratios may come in any order, and empty pieces anywhere."""
    choice = choose(np.array([0.0, 0.25, 0.0, 0.75]), np.array([0.0, 0.5, 0.0, 0.5]), 2)
    assert choice.multiplier[[1, 3]] @ [0.5, 0.5] == pytest.approx(1.0, abs=1e-15)
