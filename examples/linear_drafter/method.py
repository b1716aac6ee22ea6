"""Training the network: it starts as the identity, with the target's own next token at every level."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.drafters.target_tables import output_of
from outrider.protocols import Target
from outrider.train.distill import Logits
from outrider.train.methods.base import Method, MethodOptions

from .network import LinearConfig, LinearNetwork


class Linear(Method):
    """One matrix on the target's last hidden state."""

    name, reads = "linear", frozenset({"loss"})

    def new_model(self, options: MethodOptions, target: Target, seen: Float[Tensor, "n T H"]) -> LinearNetwork:
        """The identity."""
        config = LinearConfig(target.hidden_size, target.vocab_size, target.layers, options.levels)
        model = LinearNetwork(config, output_of(target))
        nn.init.eye_(model.step.weight)
        return model

    def predict(
        self, model: Any, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
    ) -> list[Logits]:
        """All levels at all positions; the last positions of a level have nothing to be compared with."""
        logits: torch.Tensor = model(taps[:, :, -1])
        return [level[:, : tokens.shape[1] - 1 - d] for d, level in enumerate(logits)]
