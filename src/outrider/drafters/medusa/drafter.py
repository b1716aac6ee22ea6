"""Serving Medusa heads: level d of a tree comes from head d, for every path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.context import Context, new_rows
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.drafters.spec import DraftSpec
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth, level_logits
from outrider.drafters.vocabulary import spread
from outrider.errors import ConfigError
from outrider.nn.linear import draft_linear
from outrider.protocols import Drafter, Target
from outrider.types import Draft, Evidence


class MedusaDrafter:
    """Drafts with `MedusaNetwork`: level d of a tree comes from head d, for every path.

    heads: the network. growth: how trees grow; its depth is at most the number of heads.
    """

    def __init__(self, heads: MedusaNetwork, growth: Growth, *, name: str = "medusa") -> None:
        if growth.depth > heads.config.heads:
            raise ConfigError(
                f"a draft of {growth.depth} levels needs as many heads, there are {heads.config.heads}: shorten the draft"
            )
        self.name, self.heads, self.growth = name, heads, growth
        self.layers: tuple[int, ...] = (heads.config.tap,)
        self.max_depth, self.max_nodes, self.trees = growth.depth, growth.nodes, growth.trees
        self._predict = _stacked(heads)
        self._dtype = heads.norm.weight.dtype
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
        """Up to `budget[i]` levels for sequence i, from the hidden state of its last kept row."""
        for new in new_rows(evidence, self._context):
            self._state[new.view.slot] = evidence.scores.hidden[0][new.rows[-1]]
            self._context.next[new.view.slot] += len(new.rows)
        depths, rows = [0] * len(budget), []
        for i, (view, depth) in enumerate(zip(evidence.sequences, budget, strict=True)):
            if depth > 0 and self._context.reaches(view):
                depths[i] = min(depth, self.max_depth)
                rows.append(self._state[view.slot])
        forest = Forest(len(budget))
        if rows:
            self._propose(evidence, depths, forest, torch.stack(rows).to(self._dtype))
        return forest.draft(evidence.scores.logits.device, self.growth.siblings)

    def _propose(self, evidence: Evidence, depths: list[int], forest: Forest, hidden: Float[Tensor, "n H"]) -> None:
        logits = self._predict(hidden)  # [heads, n, V]
        self.growth.grow(evidence, depths, forest, logits[0], level_logits(logits, depths, forest))


def _stacked(heads: MedusaNetwork) -> Any:
    """The network with the weights of all heads side by side: hidden states [n, H] -> logits [heads, n, V]."""
    c = heads.config
    weights = [torch.stack([b.layers[j].weight.T for b in heads.blocks]) for j in range(c.layers)]  # type: ignore[union-attr]
    biases = [torch.stack([b.layers[j].bias[None] for b in heads.blocks]) for j in range(c.layers)]  # type: ignore[union-attr]
    out = [draft_linear(head.weight) for head in heads.lm_heads]  # type: ignore[arg-type]

    def predict(hidden: Float[Tensor, "n H"]) -> Float[Tensor, "heads n V"]:
        x = heads.norm(hidden).expand(c.heads, -1, -1)
        for weight, bias in zip(weights, biases, strict=True):
            x = x + F.silu(torch.baddbmm(bias, x, weight))
        if c.shared:
            logits = out[0](x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            logits = torch.stack([head(each) for head, each in zip(out, x, strict=True)])
        return spread(logits, heads.support, c.vocab_size)

    return predict


def load(folder: Path, target: Target, spec: DraftSpec, target_path: str | None) -> Drafter:
    """The drafter of a folder for `target`, see `registry.LearnedDrafter`."""
    heads = MedusaNetwork.load(folder, target).to(target.device)
    return MedusaDrafter(heads, spec.at_most(heads.config.heads).growth(target.vocab_size))
