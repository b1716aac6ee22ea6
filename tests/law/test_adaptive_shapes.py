"""Trees whose shape depends on tokens that were drawn, in other branches too: the exact distribution of the output, by enumeration.

Every draft that an honest drafter may make is enumerated with its probability; for each of them the rule's own keep probabilities
and distributions give the distribution of its output, and the target continues it to three tokens. Nothing is sampled.
Control: a drafter that decides how many children a node has after it has seen them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest
import torch

from outrider.drafters.tree.chances import Belief, by_rank, plan
from outrider.types import Draft, Proposal
from outrider.verify.traversal import stops
from tests.law.lab import after
from tests.law.worlds import index, prefixes

V, DEPTH = 3, 2
Counts = Callable[[list[tuple[int, ...]], np.ndarray], list[int]]
"""(paths of the nodes of a level, their distributions q) -> children of each; they may depend on other branches."""


def world(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, 7])
    made = rng.dirichlet([0.6] * V, size=(2, prefixes(V, DEPTH + 1)))
    return made[0], made[1]


def draws(q: np.ndarray, count: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Tuples of `count` draws without replacement, with their probabilities."""
    for drawn in product(range(V), repeat=count):
        chance, gone = 1.0, []
        for x in drawn:
            chance *= float(after(q, gone, "without_replacement")[x])
            gone.append(x)
        if chance > 0:
            yield drawn, chance


def drafts(q: np.ndarray, counts: Counts, drop: bool) -> Iterator[tuple[list[tuple[int, ...]], float]]:
    """All drafts of two levels, as the paths of their nodes, with their probabilities."""
    (first,) = counts([()], q[[index((), V)]])
    for top, chance in draws(q[index((), V)], first):
        paths = [(x,) for x in top]
        if drop:
            paths = [path for path in paths if q[index((), V)][path[0]] > 0.3]
        below = counts(paths, np.array([q[index(path, V)] for path in paths])) if paths else []
        choices = [list(draws(q[index(path, V)], n)) for path, n in zip(paths, below, strict=True)]
        for some in product(*choices):
            nodes = paths + [(*path, x) for path, (drawn, _) in zip(paths, some, strict=True) for x in drawn]
            yield nodes, chance * float(np.prod([c for _, c in some]))


def output(p: np.ndarray, q: np.ndarray, counts: Counts, drop: bool = False) -> np.ndarray:
    """Distribution of the first three tokens, [V, V, V]."""
    out = np.zeros((V,) * (DEPTH + 1))
    for paths, chance in drafts(q, counts, drop):
        place = {(): -1} | {path: k for k, path in enumerate(paths)}
        parents = [place[path[:-1]] for path in paths]
        rows = [index(path[:-1], V) for path in paths]
        proposal = Proposal(torch.from_numpy(q), tuple(rows), None, "without_replacement") if paths else None
        draft = Draft.join([([path[-1] for path in paths], parents)], proposal)
        scored = torch.from_numpy(p[[index((), V), *(index(path, V) for path in paths)]])
        left = chance
        for stop in stops(scored, draft, 0):
            if stop.keep == 0.0:
                continue  # it has nothing left to put out
            text = () if stop.node < 0 else paths[stop.node]
            weight = stop.distribution[0].numpy() / float(stop.distribution.sum())
            for x in range(V):
                _continue(out, p, (*text, x), left * stop.keep * weight[x])
            left *= 1.0 - stop.keep
        assert left < 1e-12
    return out


def _continue(out: np.ndarray, p: np.ndarray, text: tuple[int, ...], chance: float) -> None:
    if len(text) == DEPTH + 1:
        out[text] += chance
        return
    for x in range(V):
        _continue(out, p, (*text, x), chance * p[index(text, V)][x])


def joint(p: np.ndarray) -> np.ndarray:
    out = np.zeros((V,) * (DEPTH + 1))
    _continue(out, p, (), 1.0)
    return out


def by_gain(paths: list[tuple[int, ...]], q: np.ndarray) -> list[int]:
    """What `ByGain` decides: from q and the chances of the nodes."""
    gains = [by_rank(Belief().drawn(float((row**2).sum())), 2) for row in q]
    chance = [0.4 + 0.2 * path[-1] if path else 1.0 for path in paths]
    return plan(list(zip(chance, gains, strict=True)), 3, 2, (0.6, 0.1)).counts


def by_neighbours(paths: list[tuple[int, ...]], q: np.ndarray) -> list[int]:
    """A shape that depends on tokens of other branches."""
    tokens = [path[-1] for path in paths if path]
    return [2] if not tokens else [(sum(tokens) + 2 * path[-1]) % 3 for path in paths]


def stopping(paths: list[tuple[int, ...]], q: np.ndarray) -> list[int]:
    """A chain that ends behind tokens it has little hope for."""
    return [int(not path or path[-1] != 1) for path in paths]


@pytest.mark.parametrize("counts", [by_gain, by_neighbours, stopping])
@pytest.mark.parametrize("seed", range(3))
def test_shapes_that_depend_on_drawn_tokens_are_exact(counts: Counts, seed: int) -> None:
    p, q = world(seed)
    np.testing.assert_allclose(output(p, q, counts), joint(p), atol=1e-12)


def test_control_children_that_are_dropped_after_they_were_drawn_bias_the_output() -> None:
    p, q = world(0)
    kept = np.abs(output(p, q, stopping) - joint(p)).ravel()
    dropped = np.abs(output(p, q, stopping, drop=True) - joint(p)).ravel()
    assert max(kept) < 1e-12
    assert dropped.sum() / 2 > 1e-3
