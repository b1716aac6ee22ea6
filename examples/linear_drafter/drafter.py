"""Serving the network: a slot keeps the hidden state of its last kept row, and every level of a draft comes from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from outrider.drafters.context import Context, new_rows
from outrider.drafters.spec import DraftSpec
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth, level_logits
from outrider.errors import ConfigError
from outrider.protocols import Drafter, Target
from outrider.types import Draft, Evidence

from .network import LinearNetwork


class LinearDrafter:
    """Drafts with a `LinearNetwork`. growth: how trees grow; its depth is at most the network's levels."""

    def __init__(self, network: LinearNetwork, growth: Growth, *, name: str = "linear") -> None:
        levels = network.config.levels
        if growth.depth > levels:
            raise ConfigError(f"a draft of {growth.depth} levels, and the drafter has {levels}: shorten the draft")
        self.name, self.network, self.growth = name, network, growth
        self.layers: tuple[int, ...] = (network.config.tap,)
        self.max_depth, self.max_nodes, self.trees = growth.depth, growth.nodes, growth.trees
        self._context = Context(0)
        self._state: dict[int, Tensor] = {}  # slot -> hidden state of its last kept row

    def bind(self, slots: int, length: int) -> None:
        """A slot keeps one hidden state: nothing else to make room for."""
        self._context = Context(slots)

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        self._context.release(slots)
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
            logits = self.network(torch.stack(rows).to(self.network.step.weight.dtype))
            self.growth.grow(evidence, depths, forest, logits[0], level_logits(logits, depths, forest))
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)


def load(folder: Path, target: Target, spec: DraftSpec, target_path: str | None) -> Drafter:
    """The drafter of a folder for `target`, see `registry.LearnedDrafter`."""
    network = LinearNetwork.load(folder, target).to(target.device)
    return LinearDrafter(network, spec.at_most(network.config.levels).growth(target.vocab_size))
