"""Cases for `lab`: forests, and a target and a drafter with everything in their distributions that can go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

Siblings = Literal["iid", "without_replacement", "hub"]


@dataclass(frozen=True)
class Shape:
    """A forest of one sequence. distribution[k]: whether node k is drawn from its declared distribution, or is a point mass."""

    parent: tuple[int, ...]
    has_q: tuple[bool, ...]
    siblings: Siblings = "iid"

    @property
    def depth(self) -> int:
        deep = [0] * len(self.parent)
        for k, up in enumerate(self.parent):
            deep[k] = 1 if up < 0 else deep[up] + 1
        return max(deep, default=0)

    def children(self, parent: int) -> list[int]:
        return [k for k, up in enumerate(self.parent) if up == parent]


def chain(length: int, has_q: bool = True) -> Shape:
    return Shape(tuple(range(-1, length - 1)), (has_q,) * length)


def shapes(siblings: Siblings = "iid") -> dict[str, Shape]:
    """Trees of several siblings, all drawn from their distributions."""
    pair = (True, True)
    return {
        "two": Shape((-1, -1), pair, siblings),
        "three": Shape((-1, -1, -1), (True,) * 3, siblings),
        "two by two": Shape((-1, -1, 0, 0, 1, 1), (True,) * 6, siblings),
        "uneven": Shape((-1, -1, -1, 1, 1, 4), (True,) * 6, siblings),
    }


def prefixes(vocab: int, depth: int) -> int:
    """How many strings of length 0 .. depth there are."""
    return sum(vocab**d for d in range(depth + 1))


def index(prefix: Sequence[int], vocab: int) -> int:
    """Number of a string among all strings, shorter ones first."""
    out = 0
    for x in prefix:
        out = out * vocab + x
    return out + prefixes(vocab, len(prefix)) - vocab ** len(prefix)


@dataclass
class World:
    """A target and a drafter that differ after every prefix. p: [strings up to depth, V]; q: the same; shape: the forest.

    point: [strings, children] the tokens of point masses. support: the tokens q may draw, None for all of them.
    """

    p: np.ndarray
    q: np.ndarray
    shape: Shape
    point: np.ndarray
    support: np.ndarray | None = None

    @property
    def vocab(self) -> int:
        return self.p.shape[1]


def random_distributions(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Distributions float64 [rows, vocab]: smooth, sharp, with zeros, one-hot, with ties, with subnormal entries."""
    distributions = rng.dirichlet(np.full(vocab, rng.choice([0.3, 1.0, 5.0])), size=rows)
    distributions[np.isnan(distributions).any(1)] = 1.0 / vocab
    kind = rng.integers(8, size=rows)
    top = distributions.argmax(1)
    for i in np.flatnonzero(kind < 5):
        if kind[i] == 0:
            distributions[i] = np.eye(vocab)[rng.integers(vocab)]
        elif kind[i] == 1:
            distributions[i, (top[i] + 1) % vocab] = 0
        elif kind[i] == 2:
            distributions[i] = rng.multinomial(4, np.full(vocab, 1 / vocab)) / 4
        elif kind[i] == 3:
            distributions[i, (top[i] + 1) % vocab] = 5e-310
        else:
            distributions[i] = 1.0 / vocab
    return distributions / distributions.sum(1, keepdims=True)


def random_world(
    rng: np.random.Generator, vocab: int, shape: Shape, support: np.ndarray | None = None, full: bool = False
) -> World:
    """A case. Draft distributions are unrelated to the target's, or equal, or on disjoint supports, row by row.

    full: every draft distribution has full support (siblings without replacement never run out of tokens).
    """
    depth = shape.depth
    p = random_distributions(rng, prefixes(vocab, depth), vocab)
    q = random_distributions(rng, len(p), vocab)
    relation = rng.integers(5, size=len(p))
    q[relation == 0] = p[relation == 0]
    for i in np.flatnonzero(relation == 1):
        outside = p[i] == 0
        if outside.any():
            q[i] = outside / outside.sum()
    if full:
        q = 0.5 * q + 0.5 * rng.dirichlet(np.ones(vocab), size=len(q))
    if support is not None:
        inside = np.zeros(vocab)
        inside[support] = 1.0
        q = q * inside + 1e-3 * inside
        q /= q.sum(1, keepdims=True)
    point = rng.integers(vocab, size=(len(p), 4))
    return World(p, q, shape, point, support)


def rounded(world: World, dtype: torch.dtype) -> World:
    """The same case with distributions as a float32 code path sees them, so that rounding of the inputs is not taken for bias."""
    to = lambda x: torch.from_numpy(x).to(dtype).double().numpy()  # noqa: E731
    return World(to(world.p), to(world.q), world.shape, world.point, world.support)
