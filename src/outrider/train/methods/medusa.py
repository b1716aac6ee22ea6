"""Training Medusa heads (Cai et al. 2024): every head starts as the target's own output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.drafters.medusa.format import MedusaConfig
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.drafters.target_tables import output_of
from outrider.protocols import Target
from outrider.train.distill import HeadRows, Logits
from outrider.train.methods.base import Method, MethodOptions
from outrider.train.methods.tables import final_norm


class Medusa(Method):
    """Heads on the target's last hidden state."""

    name, reads = "medusa", frozenset({"blocks", "loss", "start"})

    def new_model(self, options: MethodOptions, target: Target, seen: Float[Tensor, "n T H"]) -> MedusaNetwork:
        """Heads of `options.blocks` residual blocks, one for each level."""
        config = MedusaConfig(target.hidden_size, target.vocab_size, options.levels, target.layers, options.blocks)
        return new_heads(config, target, final_norm(options.target), options.loop.seed)

    def load(self, folder: Path, target: Target) -> MedusaNetwork:
        """A folder of heads."""
        return MedusaNetwork.load(folder, target)

    def passes(self, options: MethodOptions) -> int:
        """All levels at once."""
        return 1

    def predict(
        self, model: Any, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
    ) -> list[Logits]:
        """All heads at all positions; the last positions have no labels."""
        length = tokens.shape[1]
        logits = model(taps[:, :, -1])
        return [logits[:, : length - 1 - h, h] for h in range(model.config.heads)]

    def scored(
        self, model: Any, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
    ) -> HeadRows | None:
        """The heads' rows, where they share a matrix for the whole vocabulary."""
        if not model.config.shared or model.support is not None:
            return None
        length, rows = tokens.shape[1], model.rows(taps[:, :, -1])
        return HeadRows([rows[:, : length - 1 - h, h] for h in range(model.config.heads)], model.lm_heads[0].weight)


@torch.no_grad()
def new_heads(config: MedusaConfig, target: Target, final_norm: Tensor | None = None, seed: int = 0) -> MedusaNetwork:
    """Heads that start as the target's own output. final_norm: weights of its final norm; None: all ones."""
    torch.manual_seed(seed)
    model = MedusaNetwork(config)
    output = output_of(target).cpu()  # the model is made on the processor, wherever the target is
    norm = torch.ones(config.hidden) if final_norm is None else final_norm.float().cpu()
    model.norm.weight.copy_(norm)
    model.norm.weight.requires_grad_(False)
    for head in model.lm_heads:
        head.weight.copy_(output / norm)  # type: ignore[operator, union-attr]
    return model
