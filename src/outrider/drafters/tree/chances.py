"""What is expected of the nodes of a draft before they are drawn: chances of acceptance, and the best use of a number of nodes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

USUAL = 0.65
"""Acceptance assumed of nodes whose distributions are not there yet."""
AGAIN = 0.9
"""See `by_rank`."""
DRAWN_STEP, GREEDY_STEP = 0.05, 0.4
"""How far one verdict moves a belief: it remembers about 20 of them."""


@dataclass(slots=True)
class Belief:
    """How the draft distributions of one sequence relate to acceptance, corrected by every verdict on what they promised.

    base: chance that a token drawn from a wide distribution is accepted. log_odds: how much likelier, in log odds, the draft's most
    likely token is the target's too than its probability says. tokens: of the draft that was made last. promised: for each of its
    nodes with children (-1: the anchor) the chance that one of these is accepted.

    On the shipped target the acceptance of a token drawn from q rises with the sum of the squares of q (correlation 0.4 to 0.55 for
    each of four drafters) from a level that differs between drafters; that of a greedy token with its log odds at a slope of one.
    """

    base: float = 0.6
    log_odds: float = 2.0
    tokens: tuple[int, ...] = ()
    promised: dict[int, float] = field(default_factory=dict)

    def drawn(self, collision: float) -> float:
        """Acceptance of a token that is to be drawn from a distribution whose squares sum to `collision`."""
        return self.base + (1.0 - self.base) * min(collision, 1.0)

    def best(self, share: float) -> float:
        """Acceptance of the most likely token, of probability `share`, where the target takes its own most likely one."""
        if not 0.0 < share < 1.0:
            return 1.0 if share >= 1.0 else 0.0
        return 1.0 / (1.0 + (1.0 - share) / share * math.exp(-self.log_odds))

    def learn(self, path: Sequence[int], greedy: bool) -> None:
        """Correct by a verdict, the accepted nodes of the last draft: a step of stochastic approximation for each judged set."""
        for up, taken in zip((-1, *path), (*path, None), strict=True):
            if up in self.promised:
                miss = (taken is not None) - self.promised[up]
                if greedy:
                    self.log_odds = min(max(self.log_odds + GREEDY_STEP * miss, -4.0), 6.0)
                else:
                    self.base = min(max(self.base + DRAWN_STEP * miss, 0.02), 0.98)


def by_rank(first: float, width: int) -> list[float]:
    """Chances that each of `width` siblings is the accepted one, if that of the first is `first`.

    A later one is accepted, given that those before it were not, with the chance 0.9 first / rank: on the shipped target 0.39 to
    0.55 of `first` for the second of two draws without replacement, 0.26 to 0.4 for the third, 0.2 to 0.3 for the fourth.
    """
    out, left = [first], 1.0 - first
    for rank in range(2, width + 1):
        out.append(left * AGAIN * first / rank)
        left -= out[-1]
    return out


@dataclass(order=True, slots=True)
class _Place:
    """A place for a node in a planned tree, the likeliest to be accepted first. entry, rank: of the frontier's child that it is, or
    is below; own: its own rank. gains: chances of its siblings and itself, given `above`, the chance of its parent."""

    order: float
    entry: int = field(compare=False)
    rank: int = field(compare=False)
    own: int = field(compare=False)
    depth: int = field(compare=False)
    gains: Sequence[float] = field(compare=False)
    above: float = field(compare=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """counts[e]: children that frontier entry e gets. further: (entry, rank) of those below which a further level is expected."""

    counts: list[int]
    further: set[tuple[int, int]]


def plan(
    frontier: Sequence[tuple[float, Sequence[float]]],
    nodes: int,
    depth: int,
    usual: Sequence[float],
    least: float = 0.0,
) -> Plan:
    """The best use of `nodes` nodes on at most `depth` levels below a frontier, nodes chosen by their chance to be accepted.

    frontier: per entry the chance that it is accepted, and the chances by rank of children below it. usual: chances by rank where
    they are not known yet. Nodes with a chance of `least` or below are left out. As in `shapes.best_tree` the best tree is the set
    of the most valuable paths.
    """
    heap = [
        _Place(-above * gains[0], e, 0, 0, 1, gains, above) for e, (above, gains) in enumerate(frontier) if gains[0] > 0
    ]
    heapq.heapify(heap)
    counts, further = [0] * len(frontier), set[tuple[int, int]]()
    while heap and nodes > 0 and -heap[0].order > least:
        place = heapq.heappop(heap)
        nodes -= 1
        if place.depth == 1:
            counts[place.entry] += 1
        else:
            further.add((place.entry, place.rank))
        if (own := place.own + 1) < len(place.gains):
            order, rank = -place.above * place.gains[own], own if place.depth == 1 else place.rank
            heapq.heappush(heap, _Place(order, place.entry, rank, own, place.depth, place.gains, place.above))
        if place.depth < depth:
            below = _Place(place.order * usual[0], place.entry, place.rank, 0, place.depth + 1, usual, -place.order)
            heapq.heappush(heap, below)
    return Plan(counts, further)
