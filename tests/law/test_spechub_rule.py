"""EX-1 for SpecHub: distribution, ledger and acceptance by enumeration, thresholds from the theory's own fill; and honest pairs."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from outrider.drafters.tree import draws
from outrider.theory import tuples
from outrider.theory.multidraft import spechub
from outrider.transfer import fetch
from outrider.verify.spechub import SpecHub
from outrider.verify.transport import OptimalTransport
from outrider.verify.tree import SpeculativeSampling
from tests.law.lab import COARSE, EDGE, EXACT, Enumerator, chances_in_turn, check_rule, examine
from tests.law.worlds import Shape, World, index, random_world, rounded

RULE = SpecHub()


class HubEnumerator(Enumerator):
    """A pair is accepted as `theory.tuples.hub_outcome` says; its second member is tested given that the first was not taken."""

    near = 1e-11

    def _tests(self, kids, drawn, prefix, r) -> tuple[list[float], np.ndarray]:
        q = self.world.q[index(prefix, self.world.vocab)]
        if not self._all(kids, "hub") or len(kids) != 2 or (q > 0).sum() < 2:
            return super()._tests(kids, drawn, prefix, r)
        outcome = tuples.hub_outcome(spechub(r / r.sum(), q / q.sum()), list(drawn))
        return chances_in_turn([float(outcome.accepted[x]) for x in drawn]), outcome.residual


PAIR = (True, True)


def full_world(rng: np.random.Generator, vocab: int, shape: Shape) -> World:
    return random_world(rng, vocab, shape, full=True)


check = partial(check_rule, RULE, HubEnumerator)


def test_float32():
    rng = np.random.default_rng(73)
    worlds = [rounded(full_world(rng, 4, Shape((-1, -1), PAIR, "hub")), torch.float32) for _ in range(40)]
    check(worlds, 3, torch.float32, COARSE, 1e-6)


@pytest.mark.parametrize("rule", [SpeculativeSampling(), OptimalTransport()], ids=lambda rule: rule.name)
def test_other_rules_judge_such_pairs_exactly(rule):
    """They test the second of a pair against the distribution it was drawn from given the first."""
    rng = np.random.default_rng(74)
    worlds = [full_world(rng, 3, Shape((-1, -1, 0, 0), (True,) * 4, "hub")) for _ in range(40)]
    assert examine(rule, worlds, rng, edge=1e-11).distribution.max() <= EXACT


def test_it_accepts_what_the_theory_says():
    rng = np.random.default_rng(75)
    worlds = [full_world(rng, 4, Shape((-1, -1), PAIR, "hub")) for _ in range(40)]
    accepted = examine(RULE, worlds, rng, edge=1e-11, enumerator=HubEnumerator).accepted
    want = [
        float(spechub(w.p[0] / w.p[0].sum(), w.q[0]).acceptance) if (w.q[0] > 0).sum() > 1 else None for w in worlds
    ]
    for got, expected in zip(accepted, want, strict=True):
        if expected is not None:
            assert got == pytest.approx(expected, abs=1e-11)


def test_control_pairs_taken_for_independent_draws_are_seen():
    """The same pairs under the label "iid" are judged by a distribution that they were not drawn from."""

    def mislabelled(p, draft, noise):
        from dataclasses import replace

        return OptimalTransport()(p, replace(draft, q=replace(draft.q, siblings="iid")), noise)

    rng = np.random.default_rng(76)
    worlds = [full_world(rng, 3, Shape((-1, -1), PAIR, "hub")) for _ in range(20)]
    assert examine(mislabelled, worlds, rng, edge=EDGE, enumerator=HubEnumerator).distribution.max() > 1e-3


def test_pairs_are_drawn_with_their_distribution():
    """On a grid of uniforms the frequencies of pairs are those of `theory.tuples.hub_pairs`; a point mass gives one token."""
    distribution = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    n = 400
    grid = [(i + 0.5) / n for i in range(n)]
    seen: dict[tuple[int, ...], float] = {}
    for u in grid:
        for v in (0.1, 0.3, 0.5, 0.7, 0.9):
            pair = tuple(fetch(draws.hub_pairs(distribution, [[u, v]]))[0].tokens[0])
            seen[pair] = seen.get(pair, 0.0) + 1 / (5 * n)
    drawn = tuples.hub_pairs(spechub([0.2, 0.3, 0.5], distribution[0].numpy()))
    want = {tuple(map(int, t)): float(w) for t, w in zip(drawn.tokens, drawn.probability, strict=True)}
    assert seen == pytest.approx(want, abs=1e-9)
    assert fetch(draws.hub_pairs(torch.tensor([[0.0, 1.0]]), [[0.4, 0.6]]))[0].tokens == [[1]]
