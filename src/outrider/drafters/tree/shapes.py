"""The shapes of draft trees: the number of children of each node, decided before any of them is drawn.

A shape is a small automaton. Every leaf of the growing tree has a state; the state gives the number of children drawn below it
and, once their tokens are known, the state of each child. Widths never depend on tokens that are drawn later, so a proposal
distribution may be declared for every node; see contract 2 in docs/step.md.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import mul
from typing import Protocol, runtime_checkable

from outrider.errors import ConfigError

MAX_NODES = 4096
"""Trees with more nodes are refused: a mistyped shape should give an error instead of filling the memory."""


@runtime_checkable
class Shape(Protocol):
    """depth: levels. nodes: most nodes of a tree. width: most children of a node. start: the anchor's state."""

    @property
    def depth(self) -> int: ...
    @property
    def nodes(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def start(self) -> int: ...

    def children(self, state: int) -> int:
        """How many children are drawn below a node in this state."""
        ...

    def states(self, state: int, tokens: Sequence[int]) -> list[int]:
        """The state of each child, in draw order."""
        ...


@dataclass(frozen=True)
class Static:
    """One fixed tree. parent[k]: the node above node k, or -1; siblings are in draw order, so the rank is the index among them.

    The state of a node is its number + 1, that of the anchor 0. below: the children of every state. Raises ConfigError if a parent
    does not precede its children.
    """

    parent: tuple[int, ...]
    below: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    depth: int = field(init=False, compare=False)
    width: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.parent or any(not -1 <= up < k for k, up in enumerate(self.parent)):
            raise ConfigError(
                f"the parents of a tree come before their children and are -1 or a node, got {self.parent}"
            )
        if len(self.parent) > MAX_NODES:
            raise ConfigError(f"a tree of {len(self.parent)} nodes: at most {MAX_NODES} are allowed")

        below: list[list[int]] = [[] for _ in range(len(self.parent) + 1)]
        deep = [0] * len(below)
        for k, up in enumerate(self.parent):
            below[up + 1].append(k + 1)
            deep[k + 1] = deep[up + 1] + 1
        object.__setattr__(self, "below", tuple(map(tuple, below)))
        object.__setattr__(self, "depth", max(deep))
        object.__setattr__(self, "width", max(map(len, below)))

    @property
    def nodes(self) -> int:
        return len(self.parent)

    @property
    def start(self) -> int:
        return 0

    def children(self, state: int) -> int:
        return len(self.below[state])

    def states(self, state: int, tokens: Sequence[int]) -> list[int]:
        return list(self.below[state][: len(tokens)])


def levels(widths: Sequence[int]) -> Static:
    """Every node of level d has widths[d] children: (2, 2, 1) has 2 + 4 + 4 nodes, (1,) * n is a chain, (m, 1, 1) is the
    paper's batch of m drafts, of which only the first tokens are siblings (Yin et al. 2024, Algorithm 4)."""
    if not widths or min(widths) < 1:
        raise ConfigError(f"a tree needs at least one level and numbers >= 1, got {tuple(widths)}")
    if sum(accumulate(widths, mul)) > MAX_NODES:
        raise ConfigError(
            f"levels {tuple(widths)} make {sum(accumulate(widths, mul))} nodes: at most {MAX_NODES} are allowed"
        )
    parent: list[int] = []
    ends = [-1]
    for width in widths:
        first = len(parent)
        parent += [end for end in ends for _ in range(width)]
        ends = list(range(first, len(parent)))
    return Static(tuple(parent))


@dataclass(frozen=True, slots=True)
class MergedDrafts:
    """`drafts` sequences drawn i.i.d. from the draft model, merged where they agree (Miao et al. 2023).

    A node that j sequences pass through has j children, i.i.d.; of children with the same token the first continues with the
    multiplicity of all, the others stay as leaves: their coins must be tossed for the residual to be right. So every draft that
    still agrees with the accepted text is tested at every depth. The state is the number of sequences, 0 for a leaf.
    """

    drafts: int
    depth: int

    def __post_init__(self) -> None:
        if self.drafts < 1 or self.depth < 1 or self.drafts * self.depth > MAX_NODES:
            raise ConfigError(
                f"{self.drafts} drafts of {self.depth} tokens: both >= 1, at most {MAX_NODES} nodes together"
            )

    @property
    def nodes(self) -> int:
        return self.drafts * self.depth

    @property
    def width(self) -> int:
        return self.drafts

    @property
    def start(self) -> int:
        return self.drafts

    def children(self, state: int) -> int:
        return state

    def states(self, state: int, tokens: Sequence[int]) -> list[int]:
        many, out = Counter(tokens), []
        for token in tokens:
            out.append(many.pop(token, 0))
        return out


@dataclass(order=True)
class _Place:
    """A candidate position for a node, ordered by the probability that it is reached and accepted, largest first."""

    chance: float
    parent: int = field(compare=False)
    rank: int = field(compare=False)
    depth: int = field(compare=False)


def best_tree(acceptance: Sequence[float], nodes: int, depth: int) -> Static:
    """The tree of `nodes` nodes with the most accepted tokens, if a child of rank r is accepted with probability acceptance[r].

    acceptance[r]: probability that the child of rank r is the accepted one, given that its parent is; not increasing, sum at
    most one. depth: most levels. The value of a node is the product of the acceptances on its path, independent of the rest
    of the tree, so the best tree is the `nodes` most valuable paths, as found by Sequoia's dynamic program (Chen et al. 2024).
    """
    ranks = [float(a) for a in acceptance]
    if not ranks or any(not 0.0 <= a <= 1.0 for a in ranks) or sum(ranks) > 1.0 + 1e-9:
        raise ConfigError(
            f"acceptance by rank must be probabilities with a sum of at most one, got {tuple(acceptance)}"
        )
    if any(b > a + 1e-12 for a, b in pairwise(ranks)):
        raise ConfigError(f"acceptance by rank must not increase, got {tuple(acceptance)}")
    if not 1 <= nodes <= MAX_NODES or depth < 1:
        raise ConfigError(f"a tree needs 1 .. {MAX_NODES} nodes and a depth >= 1, got {nodes} and {depth}")
    if ranks[0] == 0.0:
        return Static((-1,))
    heap = [_Place(-ranks[0], -1, 0, 1)]
    parent: list[int] = []
    while heap and len(parent) < nodes:
        place = heapq.heappop(heap)
        if place.chance == 0.0:
            break  # further nodes are never accepted
        node = len(parent)
        parent.append(place.parent)
        above = place.chance / ranks[place.rank]
        if place.rank + 1 < len(ranks):
            heapq.heappush(heap, _Place(above * ranks[place.rank + 1], place.parent, place.rank + 1, place.depth))
        if place.depth < depth:
            heapq.heappush(heap, _Place(place.chance * ranks[0], node, 0, place.depth + 1))
    return Static(tuple(parent))


def accepted(tree: Static, acceptance: Sequence[float]) -> float:
    """Expected accepted tokens of a tree: the sum over nodes of the product of acceptances by rank on their paths."""
    chance = [1.0]
    rank: Counter[int] = Counter()
    for up in tree.parent:
        r = rank[up]
        rank[up] += 1
        chance.append(chance[up + 1] * (acceptance[r] if r < len(acceptance) else 0.0))
    return sum(chance[1:])


def best_tree_for(
    acceptance: Sequence[float], verify: Sequence[float], level: float, most: int, depth: int
) -> tuple[Static, float]:
    """The tree with the most tokens per unit of time, and that rate.

    verify[n]: time of a target forward over n + 1 rows, n = 0 .. most. level: time of one draft forward (one per level).
    Depths and sizes are tried one by one; a rate of 1 / verify[0] is plain decoding.
    """
    if len(verify) <= most or most < 1:
        raise ConfigError(f"verify needs times for 0 .. {most} nodes, got {len(verify)} of them")
    best: tuple[float, Static] | None = None
    for deep in range(1, depth + 1):
        for nodes in range(1, most + 1):
            tree = best_tree(acceptance, nodes, deep)
            rate = (1.0 + accepted(tree, acceptance)) / (verify[tree.nodes] + level * tree.depth)
            if best is None or rate > best[0] * (1 + 1e-12):
                best = rate, tree
    assert best is not None
    return best[1], best[0]
