"""Drafts that are made from one hidden state: that of the last kept row of a sequence, which gives the logits of every level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.context import Context, new_rows
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth, LevelLogits
from outrider.errors import ConfigError
from outrider.types import Draft, Evidence

Predict = Callable[[Float[Tensor, "n H"]], Float[Tensor, "levels n V"]]


class LastStateDrafter:
    """Level d of a tree comes from the d-th logits of `predict`, for every path.

    predict: hidden states, in dtype `dtype`, to logits over the target's vocabulary. tap: the target's layer that is read. levels:
    levels that `predict` knows. growth: how trees grow; its depth is at most `levels`, or ConfigError is raised.
    """

    def __init__(
        self, predict: Predict, *, tap: int, levels: int, growth: Growth, dtype: torch.dtype, name: str
    ) -> None:
        if growth.depth > levels:
            raise ConfigError(f"a draft of {growth.depth} levels, and {name} has {levels}: shorten the draft")
        self.name, self.growth = name, growth
        self.layers: tuple[int, ...] = (tap,)
        self.max_depth, self.max_nodes, self.trees = growth.depth, growth.nodes, growth.trees
        self._predict, self._dtype = predict, dtype
        self._context = Context(0)
        self._state: dict[int, Tensor] = {}  # slot -> hidden state of its last kept row

    def bind(self, slots: int, length: int) -> None:
        """A slot keeps one hidden state: nothing else to make room for."""
        self._context = Context(slots)

    def release(self, slots: Sequence[int]) -> None:
        """Clear these slots."""
        self._context.release(slots)
        self.growth.forget(slots)
        for slot in slots:
            self._state.pop(slot, None)

    @torch.inference_mode()
    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Up to `budget[i]` levels for sequence i. A sequence whose last row was not seen gets no draft."""
        for new in new_rows(evidence, self._context):  # also when nothing is to be drafted: hidden states are seen once
            self._state[new.view.slot] = evidence.scores.hidden[0][new.rows[-1]]
            self._context.next[new.view.slot] += len(new.rows)
        depths, rows = [0] * len(budget), []
        for i, (view, depth) in enumerate(zip(evidence.sequences, budget, strict=True)):
            if depth > 0 and self._context.reaches(view):
                depths[i] = min(depth, self.max_depth)
                rows.append(self._state[view.slot])
        forest = Forest(len(budget))
        if rows:
            logits = self._predict(torch.stack(rows).to(self._dtype))
            self.growth.grow(evidence, depths, forest, logits[0], LevelLogits(logits, depths, forest))
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)
