"""EX-1 for block verification: its output distribution equals the target's, and its accepted length is the one the theory names.

The coins of a block are one per depth and all are looked at, so the cells are other ones than for token-by-token rules: the
longest prefix i whose coin is below h_i is kept. Enumerated, so nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from outrider.errors import CapabilityError
from outrider.noise import Noise
from outrider.types import Draft
from outrider.verify.block import BlockVerification
from outrider.verify.tree import SpeculativeSampling
from tests.law.lab import COARSE, EXACT, Enumerator, Probe, check_rule, examine
from tests.law.worlds import Shape, World, chain, index, random_world, rounded

RULE = BlockVerification()
NEAR = 1e-9
"""How near to the ends of a cell coins are placed. h is a ratio of two small numbers where p is nearly q."""


class BlockEnumerator(Enumerator):
    """Cells of the coins of a chain that is judged as a block; thresholds by the paper's formulas, in numpy."""

    near = NEAR

    def probes(self) -> Iterator[Probe]:
        for token, weight in self._drafts((), 1.0):
            yield from self._cells(token, weight)

    def _distributions(self, prefix: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
        world, k = self.world, len(prefix)
        place = index(prefix, world.vocab)
        drawn = k < len(world.shape.parent) and world.shape.has_q[k]
        return world.p[place], world.q[place] if drawn else None

    def _drafts(self, prefix: tuple[int, ...], weight: float) -> Iterator[tuple[tuple[int, ...], float]]:
        if len(prefix) == len(self.world.shape.parent):
            yield prefix, weight
            return
        q = self._distributions(prefix)[1]
        if q is None:
            point = int(self.world.point[index(prefix, self.world.vocab), 0])
            yield from self._drafts((*prefix, point), weight)
            return
        for x in np.flatnonzero(q):
            yield from self._drafts((*prefix, int(x)), weight * float(q[x]))

    def _cells(self, token: tuple[int, ...], weight: float) -> Iterator[Probe]:
        g = len(token)
        w, rest = [1.0], []
        for i in range(g):
            p, q = self._distributions(token[:i])
            q = np.eye(len(p))[token[i]] if q is None else q
            rest.append(np.maximum(w[i] * p - q, 0))
            reach = w[i] * p[token[i]]
            w.append(1.0 if reach >= q[token[i]] else reach / q[token[i]])
        rest.append(w[g] * self._distributions(token)[0])
        coins: dict[tuple[int, int], float] = {}
        for i in range(g, -1, -1):
            total = rest[i].sum()
            h = w[g] if i == g else 1.0 if total + 1.0 - w[i] <= 0 else total / (total + 1.0 - w[i])
            h = 1.0 if i == 0 else h
            distribution = rest[i] if total > 0 else self._distributions(token[:i])[0]
            if h > 0:
                kept = {**coins, (i, 0): self._pick(0.0, h)} if i else coins
                yield from self._finals(distribution, i + 1, weight * h, list(token), kept)
            if h >= 1:
                return
            coins[i, 0] = self._pick(h, 1.0)
            weight *= 1.0 - h


check = partial(check_rule, RULE, BlockEnumerator)


def test_float32():
    rng = np.random.default_rng(23)
    check([rounded(random_world(rng, 4, chain(2)), torch.float32) for _ in range(40)], 3, torch.float32, COARSE, 1e-6)


def test_a_batch_of_different_lengths():
    rng = np.random.default_rng(24)
    shapes = [Shape((), ()), chain(3), chain(1), Shape((), ()), chain(2, has_q=False), chain(2)]
    check([random_world(rng, 3, shape) for shape in shapes for _ in range(5)], 5)


def accepted_of_the_block(world: World, depth: int) -> float:
    """E[accepted] = sum over i and x^i of min over j <= i of q(x^j) p(x_(j+1) .. x_i | x^j) (Sun et al. 2025, Theorem 1)."""
    total = 0.0
    for i in range(1, depth + 1):
        for text in product(range(world.vocab), repeat=i):
            p = [world.p[index(text[:d], world.vocab)][text[d]] for d in range(i)]
            q = [world.q[index(text[:d], world.vocab)][text[d]] for d in range(i)]
            total += min(float(np.prod(q[:j]) * np.prod(p[j:])) for j in range(i + 1))
    return total


def test_it_accepts_what_the_theory_says_and_never_less_than_token_by_token():
    rng = np.random.default_rng(26)
    worlds = [random_world(rng, 3, chain(3)) for _ in range(60)]
    block = examine(RULE, worlds, rng, edge=NEAR, enumerator=BlockEnumerator).accepted
    token = examine(SpeculativeSampling(), worlds, rng).accepted
    for world, ours in zip(worlds, block, strict=True):
        assert ours == pytest.approx(accepted_of_the_block(world, 3), abs=EXACT)
    assert (block >= token - EXACT).all()
    assert (block > token + 1e-3).any()


def test_a_tree_is_refused():
    siblings = Draft(torch.tensor([0, 1]), (-1, -1), (2,))
    with pytest.raises(CapabilityError, match="chains only"):
        RULE(torch.full((3, 2), 0.5), siblings, Noise((0,), (0,)))


def wrong_residual(p: torch.Tensor, draft: Draft, noise: Noise):
    """The mistake of vllm-ascend #7807: block acceptance with the residual of token-by-token verification."""
    right = RULE(p, draft, noise)
    tokens = []
    for b, path in enumerate(right.path):
        at = draft.offsets[b] + len(path)
        if len(path) == draft.counts[b] or draft.q is None:
            tokens.append(right.next_token[b])
            continue
        row = b if not path else len(draft.counts) + path[-1]
        rest = (p[row] - draft.q.probs[draft.q.row[at]]).clamp(min=0)
        rest = rest if rest.sum() > 0 else p[row]
        cdf = rest.cumsum(0) / rest.sum()
        tokens.append(int((cdf <= noise.uniform(b, len(path) + 1, "final")).sum().clamp(max=p.shape[1] - 1)))
    return type(right)(right.path, tuple(tokens), right.judged, right.risk, right.spread, right.bias)


def test_control_the_wrong_residual_is_seen():
    rng = np.random.default_rng(27)
    worlds = [random_world(rng, 3, chain(2)) for _ in range(20)]
    assert examine(wrong_residual, worlds, rng, edge=NEAR, enumerator=BlockEnumerator).distribution.max() > 1e-3
