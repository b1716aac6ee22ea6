"""Serving Medusa heads: level d of a tree comes from head d, for every path."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from outrider.config_keys import flag
from outrider.drafters.checkpoint import read_config
from outrider.drafters.last_state import LastStateDrafter, Predict
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.drafters.medusa.sequential import SequentialNetwork
from outrider.drafters.medusa.sequential_drafter import SequentialDrafter
from outrider.drafters.medusa.sequential_forward import forward_of
from outrider.drafters.spec import DraftSpec
from outrider.drafters.tree.growth import Growth
from outrider.drafters.vocabulary import spread
from outrider.nn.draft_heads import NativeHeads
from outrider.nn.held import Rounding, library_for
from outrider.nn.linear import draft_linear
from outrider.protocols import Drafter, Target


class MedusaDrafter(LastStateDrafter):
    """Drafts with `MedusaNetwork`: level d of a tree comes from head d.

    heads: the network. growth: how trees grow; its depth is at most the number of heads. rounding: of matrices, where they are
    multiplied natively.
    """

    def __init__(
        self, heads: MedusaNetwork, growth: Growth, *, name: str = "medusa", rounding: Rounding | None = None
    ) -> None:
        c, dtype = heads.config, heads.norm.weight.dtype
        predict = predictor(heads, min(growth.depth, c.heads), rounding)
        super().__init__(predict, tap=c.tap, levels=c.heads, growth=growth, dtype=dtype, name=name)


def predictor(heads: MedusaNetwork, levels: int, rounding: Rounding | None = None) -> Predict:
    """The first `levels` heads as one function, the fastest one here."""
    library = library_for(heads.norm.weight)
    return stacked(heads, levels) if library is None else native(library, heads, levels, rounding=rounding)


def native(
    library: ctypes.CDLL,
    heads: MedusaNetwork,
    levels: int,
    *,
    narrow: bool = True,
    rounding: Rounding | None = None,
) -> Predict:
    """The heads in the compiled decoder: one forward for all levels."""
    c, used = heads.config, range(1 if heads.config.shared else levels)
    blocks: list[Any] = [list(heads.blocks[h].layers) for h in range(levels)]  # type: ignore[arg-type]
    outputs: list[Any] = [heads.lm_heads[h].weight for h in used]
    return NativeHeads(
        library,
        heads.norm.weight,
        c.eps,
        blocks,
        outputs,
        c.vocab_size,
        heads.support,
        narrow=narrow,
        rounding=rounding,
    )


def stacked(heads: MedusaNetwork, levels: int) -> Predict:
    """The twin: the weights of all heads side by side."""
    c = heads.config
    blocks: list[Any] = [heads.blocks[h].layers for h in range(levels)]
    weights = [torch.stack([b[j].weight.T for b in blocks]) for j in range(c.layers)]
    biases = [torch.stack([b[j].bias[None] for b in blocks]) for j in range(c.layers)]
    out = [draft_linear(head.weight) for head in heads.lm_heads]  # type: ignore[arg-type]

    def predict(hidden: Float[Tensor, "n H"]) -> Float[Tensor, "levels n V"]:
        x = heads.norm(hidden).expand(levels, -1, -1)
        for weight, bias in zip(weights, biases, strict=True):
            x = x + F.silu(torch.baddbmm(bias, x, weight))
        if c.shared:
            logits = out[0](x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            logits = torch.stack([head(each) for head, each in zip(out, x, strict=False)])
        return spread(logits, heads.support, c.vocab_size)

    return predict


def load(folder: Path, target: Target, spec: DraftSpec, target_path: str | None) -> Drafter:
    """The drafter of a folder for `target`, see `registry.LearnedDrafter`: the folder says whether its heads follow one another."""
    if flag(read_config(folder)[0], "sequential", folder):
        sequential = SequentialNetwork.load(folder, target).to(target.device)
        forward = partial(forward_of, rounding=spec.rounding_for(sequential.fc.weight))
        return SequentialDrafter(sequential, spec.growth(target.vocab_size), forward=forward)
    heads = MedusaNetwork.load(folder, target).to(target.device)
    growth, rounding = spec.at_most(heads.config.heads).growth(target.vocab_size), spec.rounding_for(heads.norm.weight)
    return MedusaDrafter(heads, growth, rounding=rounding)
