"""EX-1 for traversal verification: distribution, ledger and acceptance by enumeration of whole trees, against a reference of its
own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from outrider.verify import traversal
from outrider.verify.block import BlockVerification
from outrider.verify.traversal import Traversal
from outrider.verify.tree import SpeculativeSampling
from tests.law.lab import COARSE, EDGE, EXACT, Enumerator, Probe, after, assemble, check_rule, examine
from tests.law.worlds import Shape, chain, index, random_world, rounded

RULE = Traversal()


class TraversalEnumerator(Enumerator):
    """Draws the whole tree, then plays the leaves in turn; distributions and shares by recursion on plain arrays."""

    near = 1e-11

    def probes(self) -> Iterator[Probe]:
        stray = self.rng.integers(self.world.vocab, size=len(self.world.shape.parent)).tolist()
        for token, weight in self._forests([-1], stray, 1.0):
            yield from self._play(token, weight)

    def _forests(self, todo: list[int], token: list[int], weight: float) -> Iterator[tuple[list[int], float]]:
        if not todo:
            yield token, weight
            return
        node, *rest = todo
        kids = self.nodes[node + 1]
        for drawn, probability in self._draws(self._prefix(node, token), kids, (), 1.0):
            mine = list(token)
            for k, x in zip(kids, drawn, strict=True):
                mine[k] = x
            yield from self._forests(rest + kids, mine, weight * probability)

    def _prefix(self, node: int, token: list[int]) -> tuple[int, ...]:
        path = []
        while node >= 0:
            path.append(token[node])
            node = self.world.shape.parent[node]
        return tuple(reversed(path))

    def _turns(self, node: int, share: float, token: list[int]) -> Iterator[tuple[int, float, np.ndarray]]:
        world, prefix = self.world, self._prefix(node, token)
        distribution, gone = world.p[index(prefix, world.vocab)].copy(), []
        for k in self.nodes[node + 1]:
            x = token[k]
            q = after(world.q[index(prefix, world.vocab)], gone, world.shape.siblings)
            if not (world.shape.has_q[k] and q[x] > 0):
                q = np.eye(world.vocab)[x]
            else:
                gone.append(x)
            yield from self._turns(k, 1.0 if share * distribution[x] >= q[x] else share * distribution[x] / q[x], token)
            rest = np.maximum(share * distribution - q, 0)
            total = rest.sum()
            if total > 0:
                share, distribution = total / (total + 1 - share), rest / total
            elif node >= 0:
                share, distribution = 0.0, distribution
        yield node, share, distribution

    def _play(self, token: list[int], weight: float) -> Iterator[Probe]:
        depth_of, seen, number = {-1: 0}, {}, {}
        for k, up in enumerate(self.world.shape.parent):
            depth_of[k] = depth_of[up] + 1
            number[k] = seen.get(depth_of[k], 0)
            seen[depth_of[k]] = number[k] + 1
        coins: dict[tuple[int, int], float] = {}
        for node, share, distribution in self._turns(-1, 1.0, token):
            if node < 0:
                yield from self._finals(distribution, 1, weight, token, coins)
                return
            place = depth_of[node], number[node]
            if weight * share > 0:
                stands = {**coins, place: self._pick(0.0, share)}
                yield from self._finals(distribution, place[0] + 1, weight * share, token, stands)
            coins = {**coins, place: self._pick(share, 1.0)}
            weight *= 1.0 - share
            if weight <= 0:
                return


PAIR = (True, True)


check = partial(check_rule, RULE, TraversalEnumerator)


def test_float32():
    rng = np.random.default_rng(63)
    worlds = [rounded(random_world(rng, 3, Shape((-1, -1, 0), (True,) * 3)), torch.float32) for _ in range(20)]
    check(worlds, 3, torch.float32, COARSE, 1e-6)


def test_it_accepts_no_less_than_recursive_rejection():
    """On 60 trees of two by two, enumerated; and more on some: a doubtful token stands on what is below it."""
    rng = np.random.default_rng(64)
    worlds = [random_world(rng, 2, Shape((-1, -1, 0, 0, 1, 1), (True,) * 6)) for _ in range(40)]
    ours = examine(RULE, worlds, rng, edge=1e-11, enumerator=TraversalEnumerator).accepted
    other = examine(SpeculativeSampling(), worlds, rng).accepted
    assert (ours >= other - EXACT).all()
    assert (ours > other + 1e-2).any()


def test_on_chains_the_general_walk_is_block_verification():
    """The twin: the recursion over a chain, against the vectorised rule that judges chains."""
    rng = np.random.default_rng(65)
    worlds = [random_world(rng, 3, chain(3)) for _ in range(5)]
    probes = [p for i, w in enumerate(worlds) for p in TraversalEnumerator(i, w, rng, EDGE).probes()]
    p, draft = assemble(worlds, probes, torch.float64)
    from tests.law.lab import ScriptedNoise

    noise = ScriptedNoise((0,) * len(probes), (0,) * len(probes), tuple(probes), 0.5)
    fast = BlockVerification()(p, draft, noise)
    for b in range(0, len(probes), 7):
        path, token, _, _ = traversal.judge_sequence(p, draft, noise, b)
        assert (path, token) == (fast.path[b], fast.next_token[b])


def greedy_share(p: torch.Tensor, draft, noise):
    """The mistake of handing the parent's share on unchanged after a refusal."""
    original = traversal.c.clamp01
    traversal.c.clamp01 = lambda x: min(1.0, max(x, 0.5)) if x == x else 1.0
    try:
        return RULE(p, draft, noise)
    finally:
        traversal.c.clamp01 = original


def test_control_a_wrong_share_is_seen():
    rng = np.random.default_rng(66)
    worlds = [random_world(rng, 3, Shape((-1, -1, 0), (True,) * 3)) for _ in range(20)]
    assert examine(greedy_share, worlds, rng, edge=EDGE, enumerator=TraversalEnumerator).distribution.max() > 1e-3
