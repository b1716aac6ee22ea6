"""Token recycling: drafts from the target's own candidates of earlier steps (Luo et al. 2024, arXiv 2408.08696). No model.

Every row that the target scores, accepted or not, says which tokens it holds likely behind that row's token. The latest such list
of every token is kept, and a draft walks from list to list: a tree of likely successors of likely successors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.shapes import Static
from outrider.errors import ConfigError
from outrider.types import POINT_MASS, Draft, Evidence

KEPT = 8
"""Candidates kept behind every token."""


class Recycle:
    """A tree of fixed shape over the latest candidates of each token, as point masses. A slot remembers its own text alone.

    shape: children of a node are its candidates, the most likely one first; at most KEPT below a node, or ConfigError is raised.
    """

    name = "recycle"
    layers: tuple[int, ...] = ()

    def __init__(self, shape: Static) -> None:
        if shape.width > KEPT:
            raise ConfigError(f"a recycled tree has at most {KEPT} children below a node, got {shape.width}")
        self.shape = shape
        self.max_depth, self.max_nodes, self.trees = shape.depth, shape.nodes, shape.width > 1
        self._after: dict[int, dict[int, list[int]]] = {}  # slot -> token -> the likeliest tokens behind it
        self._read: dict[int, int] = {}  # slot -> tokens of its text that were read

    def bind(self, slots: int, length: int) -> None:
        """Nothing to allocate: the lists grow with the text."""

    @torch.inference_mode()
    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """One tree per sequence of at most `budget[i]` levels. The candidates of the step are kept with any budget."""
        self._learn(evidence)
        forest = Forest(len(budget))
        for i, (view, depth) in enumerate(zip(evidence.sequences, budget, strict=True)):
            if depth > 0:
                self._grow(forest, i, self._after.get(view.slot, {}), view.tokens[-1], min(depth, self.max_depth))
        return forest.draft(evidence.scores.logits.device, "iid")

    def _learn(self, evidence: Evidence) -> None:
        """Keep what the forward's rows say; of the text, which token followed which where no row has said anything yet."""
        likeliest: list[list[int]] = []
        if len(evidence.scores.logits):
            kept = min(KEPT, evidence.scores.logits.shape[-1])
            likeliest = evidence.scores.logits.topk(kept, dim=-1).indices.tolist()
        scored, tokens = evidence.rows.scored_rows, evidence.rows.token[evidence.rows.scored].tolist()
        for view, segment in zip(evidence.sequences, evidence.segment_index, strict=True):
            after, text = self._after.setdefault(view.slot, {}), view.tokens
            for at in range(self._read.get(view.slot, 0), len(text) - 1):
                after.setdefault(text[at], [text[at + 1]])
            self._read[view.slot] = len(text) - 1
            for row in scored[segment] if segment >= 0 else ():
                after[tokens[row]] = likeliest[row]

    def _grow(self, forest: Forest, i: int, after: dict[int, list[int]], anchor: int, depth: int) -> None:
        """Add the tree of sequence i below its anchor: node k of the shape is child number `rank` of its parent."""
        numbers: dict[int, int] = {-1: -1}  # node of the shape -> node of the forest
        rank: dict[int, int] = {}
        for k, up in enumerate(self.shape.parent):
            n, rank[up] = rank.get(up, 0), rank.get(up, 0) + 1
            above = numbers.get(up)
            if above is None or len(forest.path(i, above)) >= depth:
                continue
            token = anchor if above < 0 else forest.tokens[i][above]
            if n < len(after.get(token, ())):
                numbers[k] = forest.add(i, above, after[token][n], POINT_MASS)

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        for slot in slots:
            self._after.pop(slot, None)
            self._read.pop(slot, None)
