"""Training sequential heads (Hydra: Ankner et al. 2024, arXiv 2402.05109) at every level, on the tokens of the text above it."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.medusa.format import SequentialConfig
from outrider.drafters.medusa.sequential import SequentialNetwork
from outrider.drafters.target_tables import embeddings, output_of
from outrider.protocols import Target
from outrider.train.methods.base import MethodOptions, Unrolled, chosen_taps
from outrider.train.methods.tables import init_decoder, inner_of, narrow, scale_taps


class Hydra(Unrolled):
    """Medusa's heads, one after the other."""

    name, reads = "hydra", frozenset({"blocks", "width", "taps", "loss", "start"})

    def taps(self, options: MethodOptions, target: Target) -> tuple[int, ...]:
        """The requested blocks, or EAGLE-3's and the last one."""
        chosen = chosen_taps(options, target)
        return chosen if options.taps else tuple(sorted({*chosen, target.layers}))

    def new_model(self, options: MethodOptions, target: Target, seen: Float[Tensor, "n T H"]) -> SequentialNetwork:
        """Heads of `options.blocks` residual blocks, `options.width` wide."""
        width, taps = options.width or target.hidden_size, self.taps(options, target)
        config = SequentialConfig(target.hidden_size, target.vocab_size, taps, width, inner_of(width), options.blocks)
        return new_sequence(config, target, seen, options.loop.seed)

    def load(self, folder: Path, target: Target) -> SequentialNetwork:
        """A folder of sequential heads."""
        return SequentialNetwork.load(folder, target)


@torch.no_grad()
def new_sequence(
    config: SequentialConfig, target: Target, taps: Float[Tensor, "n T H"], seed: int = 0
) -> SequentialNetwork:
    """Heads whose output matrix is the target's, projected to their width, and whose `fc` scales taps to about one.

    taps: some hidden states of the layers they will read, whose sizes differ by layer.
    """
    torch.manual_seed(seed)
    model = SequentialNetwork(config)
    init_decoder(model)
    scale_taps(model.fc, taps.cpu())
    model.embed_tokens.weight.copy_(embeddings(target).cpu())
    model.lm_head.weight.copy_(narrow(output_of(target).cpu(), config.width))
    return model
