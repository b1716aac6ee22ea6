"""Serving Medusa heads: level d of a tree comes from head d, for every path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.last_state import LastStateDrafter
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.drafters.spec import DraftSpec
from outrider.drafters.tree.growth import Growth
from outrider.drafters.vocabulary import spread
from outrider.nn.linear import draft_linear
from outrider.protocols import Drafter, Target


class MedusaDrafter(LastStateDrafter):
    """Drafts with `MedusaNetwork`: level d of a tree comes from head d.

    heads: the network. growth: how trees grow; its depth is at most the number of heads.
    """

    def __init__(self, heads: MedusaNetwork, growth: Growth, *, name: str = "medusa") -> None:
        c, dtype = heads.config, heads.norm.weight.dtype
        super().__init__(_stacked(heads), tap=c.tap, levels=c.heads, growth=growth, dtype=dtype, name=name)


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
