"""Drafts that are made from hidden states of one row, the last kept one of a sequence: nothing of others is cached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.context import Context, new_rows
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth, LevelLogits, NextLogits
from outrider.errors import ConfigError
from outrider.types import Draft, Evidence

Predict = Callable[[Float[Tensor, "n H"]], Float[Tensor, "levels n V"]]


class LastRowDrafter(ABC):
    """Keeps the hidden states of every sequence's last kept row, and grows drafts from them by what `begin` gives.

    taps: the target's layers that are read, in this order. growth: how trees grow.
    """

    def __init__(self, *, taps: Sequence[int], growth: Growth, name: str) -> None:
        self.name, self.growth = name, growth
        self.layers: tuple[int, ...] = tuple(sorted(set(taps)))
        self._order = [self.layers.index(t) for t in taps]
        self.max_depth, self.max_nodes, self.trees = growth.depth, growth.nodes, growth.trees
        self._context = Context(0)
        self._state: dict[int, list[Tensor]] = {}  # slot -> hidden states of its last kept row

    @abstractmethod
    def begin(
        self,
        evidence: Evidence,
        live: Sequence[int],
        states: Float[Tensor, "K n H"],
        depths: Sequence[int],
        forest: Forest,
    ) -> tuple[Float[Tensor, "n V"], NextLogits]:
        """Logits behind the anchors of the sequences `live`, whose last kept rows have these states, and what gives further ones.
        depths: of all sequences, 0 for those that are not drafted for."""

    def bind(self, slots: int, length: int) -> None:
        """A slot keeps one row: nothing else to make room for."""
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
        hidden = evidence.scores.hidden
        for new in new_rows(evidence, self._context):  # also when nothing is to be drafted: hidden states are seen once
            # copies: a view of one row keeps those of the whole step
            self._state[new.view.slot] = [hidden[n][new.rows[-1]].clone() for n in self._order]
            self._context.next[new.view.slot] += len(new.rows)
        depths, live = [0] * len(budget), list[int]()
        for i, (view, depth) in enumerate(zip(evidence.sequences, budget, strict=True)):
            if depth > 0 and self._context.reaches(view):
                depths[i] = min(depth, self.max_depth)
                live.append(i)
        forest = Forest(len(budget))
        if live:
            kept = [self._state[evidence.sequences[i].slot] for i in live]
            states = torch.stack([each for tap in zip(*kept, strict=True) for each in tap])
            logits, follow = self.begin(
                evidence, live, states.unflatten(0, (len(self._order), len(live))), depths, forest
            )
            self.growth.grow(evidence, depths, forest, logits, follow)
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)


class LastStateDrafter(LastRowDrafter):
    """Level d of a tree comes from the d-th logits of `predict`, for every path.

    predict: hidden states, in dtype `dtype`, to logits over the target's vocabulary. tap: the target's layer that is read. levels:
    levels that `predict` knows. growth: how trees grow; its depth is at most `levels`, or ConfigError is raised.
    """

    def __init__(
        self, predict: Predict, *, tap: int, levels: int, growth: Growth, dtype: torch.dtype, name: str
    ) -> None:
        if growth.depth > levels:
            raise ConfigError(f"a draft of {growth.depth} levels, and {name} has {levels}: shorten the draft")
        super().__init__(taps=(tap,), growth=growth, name=name)
        self._predict, self._dtype = predict, dtype

    def begin(
        self,
        evidence: Evidence,
        live: Sequence[int],
        states: Float[Tensor, "K n H"],
        depths: Sequence[int],
        forest: Forest,
    ) -> tuple[Float[Tensor, "n V"], NextLogits]:
        """All levels at once."""
        logits = self._predict(states[0].to(self._dtype))
        return logits[0], LevelLogits(logits, depths, forest)
