"""Drafts that grow while their next token is expected to pay: chains that stop early, and trees of draws without replacement.

The chance that a node is accepted is estimated from draft distributions alone, its own place's and those above it. Before the
tokens of a level are drawn, these chances say how many children each node gets; after, which of the new nodes get a further level.
Every token that was drawn is in the draft, so the number of a node's children is a function of what was there before them, and a
rule that is exact for fixed trees stays exact (docs/drafters.md, "When a draft stops"). The threshold is that of
`outrider.theory.stopping`: a level pays if the tokens it is expected to bring exceed the rate of tokens times its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.tree import chain
from outrider.drafters.tree.chances import USUAL, Belief, by_rank, plan
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import (
    BestFirst,
    Chosen,
    Level,
    LevelLogits,
    Levels,
    NextLogits,
    Sample,
    to_vocabulary,
)
from outrider.drafters.tree.shapes import MAX_NODES, levels
from outrider.errors import ConfigError
from outrider.nn import picks
from outrider.transfer import Pending, fetch
from outrider.types import POINT_MASS, Evidence, Siblings

LEAST = 0.2
"""Tokens that a further level must be expected to bring, if nothing else is asked for. Measured: docs/drafters.md."""


class ByGain:
    """Chains (`width` 1) or trees of at most `nodes` nodes and `depth` levels that grow where nodes are likeliest to be accepted.

    least: a further level that takes a pass is drafted if the tokens it is expected to bring are more; of drafters whose levels
    come from one pass (`LevelLogits`) each further node. 0: a tree uses all its nodes, a chain all its levels.
    sample: as for `Levels`. Siblings are drawn without replacement.

    What is believed about acceptance starts anew when a slot is released, so a draft depends on its own sequence alone.
    """

    def __init__(
        self, nodes: int, depth: int, vocab_size: int, *, width: int = 1, least: float = 0.0, sample: Sample = "sampled"
    ) -> None:
        if not 1 <= nodes <= MAX_NODES or depth < 1 or width < 1 or not 0.0 <= least < 1.0:
            raise ConfigError(
                f"a draft that grows by gain needs 1 .. {MAX_NODES} nodes, a depth and a width >= 1 and a threshold in [0, 1), got "
                f"{nodes}, {depth}, {width} and {least}"
            )
        self.siblings: Siblings = "iid" if width == 1 else "without_replacement"
        self.drawing = Levels(levels((1,) * depth), vocab_size, sample=sample, siblings=self.siblings)
        self.nodes, self.depth, self.width, self.least, self.trees = nodes, depth, width, least, width > 1
        self.max_expanded_nodes, self.vocab_size = nodes, vocab_size
        self._usual = by_rank(USUAL, width)
        self.beliefs: dict[int, Belief] = {}  # by slot

    def grow(
        self,
        evidence: Evidence,
        depths: Sequence[int],
        forest: Forest,
        logits: Float[Tensor, "n W"],
        follow: NextLogits,
    ) -> None:
        """See `Growth.grow`."""
        beliefs = self._learn(evidence)
        together = False
        if not self.trees and logits.shape[-1] == self.vocab_size:
            tokens, drawn = [min(d, self.depth, self.nodes) for d in depths], self.drawing.sample == "sampled"
            together = chain.grow(evidence, tokens, forest, logits, follow, drawn, chain.Stopping(self.least, beliefs))
        frontier = [] if together else [(i, -1) for i, d in enumerate(depths) if d]
        chance: dict[int, list[float]] = {i: [] for i, _ in frontier}  # by node
        free, kinds = isinstance(follow, LevelLogits), [self.drawing.kind(v.params) for v in evidence.sequences]
        for depth in range(1, self.depth + 1):
            if not frontier:
                break
            if depth > 1:
                logits = follow(frontier)
            level = Level(evidence, forest, depth, self.width, [(i, k, 0) for i, k in frontier], kinds)
            offers = self._offers(level, to_vocabulary(logits, self.vocab_size), beliefs)
            frontier = [
                node
                for i, own in chance.items()
                for node in self._extend(i, level, offers.get(i, []), own, depths[i], beliefs[i], free)
            ]
        for i, depth in enumerate(depths):
            if depth:
                beliefs[i].tokens = tuple(forest.tokens[i])

    def forget(self, slots: Sequence[int]) -> None:
        """See `Growth.forget`."""
        for slot in slots:
            self.beliefs.pop(slot, None)

    def _learn(self, evidence: Evidence) -> list[Belief]:
        """What is believed of every sequence, after the verdict on its last draft, if it was this drafter's."""
        beliefs = [self.beliefs.setdefault(view.slot, Belief()) for view in evidence.sequences]
        for view, belief, b in zip(evidence.sequences, beliefs, evidence.verdict_index, strict=True):
            if b >= 0 and belief.tokens and tuple(evidence.draft.tree(b)[0]) == belief.tokens:
                path = [evidence.draft.local(b, k) for k in evidence.verdict.path[b]]
                belief.learn(path, self.drawing.sample == "greedy" or view.params.greedy)
            belief.tokens, belief.promised = (), {}
        return beliefs

    def _offers(self, level: Level, logits: Float[Tensor, "n V"], beliefs: Sequence[Belief]) -> dict[int, list[_Offer]]:
        """For each sequence of the level and each of its frontier nodes: the children it may get. Their number is open."""
        groups = self.drawing.choose(level, logits)
        certain = [Pending((_certainty(group, logits),), lambda rows: rows) for group in groups]
        found = fetch(*(group.drawn for group in groups), *certain)
        out: dict[int, list[_Offer]] = {}
        for group, drawn, sure in zip(groups, found[: len(groups)], found[len(groups) :], strict=True):
            has_q = group.kind == "drawn"
            first = level.forest.add_distributions(group.probs, drawn.sound) if has_q else POINT_MASS
            for j, e in enumerate(group.rows):
                i, node, _ = level.frontier[e]
                one = beliefs[i].drawn(sure[j]) if has_q else beliefs[i].best(sure[j])
                row = first + j if has_q else POINT_MASS
                out.setdefault(i, []).append(_Offer(node, by_rank(one, self.width), drawn.tokens[j], row))
        return out

    def _extend(
        self, i: int, level: Level, offers: list[_Offer], chance: list[float], depth: int, belief: Belief, free: bool
    ) -> list[tuple[int, int]]:
        """Give the frontier nodes of sequence i their children; returns those that get a further level."""
        forest, left = level.forest, depth - level.depth + 1
        room = self.nodes - len(forest.tokens[i])
        frontier = [(1.0 if o.node < 0 else chance[o.node], o.gains) for o in offers]
        decided = plan(frontier, room, left, self._usual, self.least if free and level.depth > 1 else 0.0)
        further: list[tuple[int, int]] = []
        for e, (offer, count) in enumerate(zip(offers, decided.counts, strict=True)):
            drawn = offer.tokens[:count]  # their number does not depend on them
            if drawn:
                belief.promised[offer.node] = sum(offer.gains[: len(drawn)])
            for rank, token in enumerate(drawn):
                node = forest.add(i, offer.node, token, offer.row)
                chance.append(frontier[e][0] * offer.gains[rank])
                if (e, rank) in decided.further:
                    further.append((i, node))
        pays = free or sum(chance[k] for _, k in further) * USUAL > self.least
        return further if pays else []


@dataclass(frozen=True, slots=True)
class _Offer:
    """The children that a frontier node may get: their chances by rank, their tokens, and the distribution they were drawn from."""

    node: int
    gains: list[float]
    tokens: list[int]
    row: int


def _certainty(group: Chosen, logits: Float[Tensor, "n V"]) -> Float[Tensor, "r"]:
    """Of a distribution that tokens are drawn from, the sum of its squares; else the probability of the most likely token."""
    drawn = group.kind == "drawn"
    rows = group.probs if drawn else logits[group.rows]
    if (found := picks.certainty(rows, drawn=drawn)) is not None:
        return torch.tensor(found, dtype=torch.float64)
    if drawn:
        return rows.double().square().sum(-1)
    mine = rows.float()
    return torch.exp(mine.amax(-1) - mine.logsumexp(-1))


class Dynamic:
    """Trees rebuilt in every step: of draws (`ByGain`) where the request samples, of the most likely tokens (`BestFirst`) where it
    does not. Point masses earn little from a target that samples: the chance of a node is then its probability, not min(p, q)."""

    siblings: Siblings = "without_replacement"
    trees = True

    def __init__(self, nodes: int, depth: int, vocab_size: int, *, width: int = 4, sample: Sample = "sampled") -> None:
        self.likely = BestFirst(nodes, depth, vocab_size, width=width)
        self.drawn = ByGain(nodes, depth, vocab_size, width=max(width, 2), sample=sample)
        self.nodes, self.depth, self.vocab_size, self.width = nodes, depth, vocab_size, width
        self.max_expanded_nodes = max(self.likely.max_expanded_nodes, self.drawn.max_expanded_nodes)

    def grow(
        self,
        evidence: Evidence,
        depths: Sequence[int],
        forest: Forest,
        logits: Float[Tensor, "n W"],
        follow: NextLogits,
    ) -> None:
        """See `Growth.grow`. Sequences of the two kinds take turns."""
        greedy = [v.params.greedy for v in evidence.sequences]
        live = [i for i, d in enumerate(depths) if d]
        for kind, growth in ((True, self.likely), (False, self.drawn)):
            rows = [n for n, i in enumerate(live) if greedy[i] is kind]
            if rows:
                mine = [d if g is kind else 0 for d, g in zip(depths, greedy, strict=True)]
                growth.grow(evidence, mine, forest, logits[rows], follow)

    def forget(self, slots: Sequence[int]) -> None:
        """See `Growth.forget`."""
        self.drawn.forget(slots)
