"""EX-1 for K-SEQ: distribution, ledger and acceptance by enumeration, against a reference of its own and against recursive
rejection."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from outrider.verify.multidraft import KSeq, solve_rho
from outrider.verify.tree import SpeculativeSampling
from tests.law.lab import COARSE, EDGE, EXACT, SHARES, Enumerator, check_rule, examine, some
from tests.law.worlds import Shape, index, random_world, rounded

RULE = KSeq()


def bisect(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """rho by 200 halvings: slow, and nothing in common with the rule's search."""

    def excess(rho: float) -> float:
        beta = min(np.minimum(q, p / rho).sum(), 1.0)
        return 1 - (1 - beta) ** k - rho * beta

    low, high = 1.0, float(k)
    if excess(low) <= 0:
        return low
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2


class KSeqEnumerator(Enumerator):
    """Node sets of i.i.d. siblings are tested against p itself with rho q; all others as by recursive rejection."""

    near = 1e-11

    def _tests(self, kids, drawn, prefix, r) -> tuple[list[float], np.ndarray]:
        if not self._all(kids, "iid"):
            return super()._tests(kids, drawn, prefix, r)
        q = self.world.q[index(prefix, self.world.vocab)]
        # the rule's own root: where p is nearly q every number near 1 is one, and all of them are exact (checked below)
        rho = solve_rho(torch.from_numpy(r)[None], torch.from_numpy(q)[None], len(kids))
        rest = np.maximum(r - rho * q, 0)
        tests = [1.0 if r[x] >= rho * q[x] else r[x] / (rho * q[x]) for x in drawn]
        return tests, rest / rest.sum() if rest.sum() > 0 else r


PAIR = (True, True)


check = partial(check_rule, RULE, KSeqEnumerator)


@SHARES
def test_float32(share):
    rng, count = np.random.default_rng(33), some(40, share)
    worlds = [rounded(random_world(rng, 4, Shape((-1, -1), PAIR)), torch.float32) for _ in range(count)]
    check(worlds, 3, torch.float32, COARSE, 1e-6)


def test_it_accepts_no_less_than_recursive_rejection():
    """Proved in docs/theory.md, section 3; here on 60 instances of three siblings, enumerated."""
    rng = np.random.default_rng(34)
    shape = Shape((-1, -1, -1), (True,) * 3)
    worlds = [random_world(rng, 3, shape) for _ in range(60)]
    ours = examine(RULE, worlds, rng, edge=1e-11, enumerator=KSeqEnumerator).accepted
    other = examine(SpeculativeSampling(), worlds, rng).accepted
    assert (ours >= other - EXACT).all()
    assert (ours > other + 1e-3).any()


@pytest.mark.parametrize("k", [2, 4, 8])
def test_the_root_and_what_it_hands_out(k):
    rng = np.random.default_rng(35)
    for _ in range(50):
        p, q = rng.dirichlet(np.full(40, 0.3), size=2)
        rho = solve_rho(torch.from_numpy(p)[None], torch.from_numpy(q)[None], k)
        assert rho == pytest.approx(bisect(p, q, k), abs=1e-10)
        beta = np.minimum(q, p / rho).sum()
        assert np.maximum(p - rho * q, 0).sum() == pytest.approx((1 - beta) ** k, abs=1e-11)


def test_distributions_that_agree_or_never_meet():
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    assert solve_rho(p, p, 3) == 1.0
    assert solve_rho(p, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64), 3) == 1.0


def loose(p: torch.Tensor, draft, noise):
    """The mistake of testing every sibling with rho = k, whose tests hand out too little."""
    from outrider.verify import multidraft

    original = multidraft.solve_rho
    multidraft.solve_rho = lambda p, q, k: float(k)
    try:
        return RULE(p, draft, noise)
    finally:
        multidraft.solve_rho = original


def test_control_a_wrong_rho_is_seen():
    rng = np.random.default_rng(36)
    worlds = [random_world(rng, 3, Shape((-1, -1), PAIR)) for _ in range(20)]
    assert examine(loose, worlds, rng, edge=EDGE, enumerator=KSeqEnumerator).distribution.max() > 1e-3
