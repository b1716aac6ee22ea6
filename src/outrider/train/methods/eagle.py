"""Training EAGLE's drafters on the target's features: EAGLE-3 through its own outputs, EAGLE-1 to predict the last feature."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from outrider.drafters.eagle.eagle1 import Eagle1Network
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.network import EagleConfig
from outrider.drafters.target_tables import embeddings, output_of, target_tables
from outrider.errors import ConfigError
from outrider.protocols import Target
from outrider.train.distill import Teacher
from outrider.train.features import Features
from outrider.train.loop import Batch, LossOf
from outrider.train.methods.base import MethodOptions, Unrolled, chosen_taps
from outrider.train.methods.tables import heads_of, init_decoder, inner_of, narrow, scale_taps

NOISE = 0.2 * 512
"""Width of the uniform noise on features, times the length of a row (EAGLE's code: its rows have up to 2048 tokens)."""


class Eagle3(Unrolled):
    """EAGLE-3: several hidden states, fused; trained through its own outputs (Li et al. 2025, section 3.2)."""

    name, reads = "eagle", frozenset({"width", "taps", "loss", "start"})
    names_target = True

    def taps(self, options: MethodOptions, target: Target) -> tuple[int, ...]:
        """The requested blocks, or EAGLE-3's."""
        return chosen_taps(options, target)

    def new_model(self, options: MethodOptions, target: Target, seen: Float[Tensor, "n T H"]) -> nn.Module:
        """One layer of `options.width`."""
        config = feature_config(options, target, self.taps(options, target))
        return new_features(config, target, seen, options.loop.seed)

    def load(self, folder: Path, target: Target) -> Any:
        """An EAGLE-3 folder."""
        return Eagle3Network.load(folder, target)


class Eagle1(Eagle3):
    """EAGLE-1: predicts the target's last hidden state, and applies the target's head to it."""

    name, reads = "eagle1", frozenset({"width", "start"})
    names_target = True

    def taps(self, options: MethodOptions, target: Target) -> tuple[int, ...]:
        """The target's last block."""
        return (target.layers,)

    def new_model(self, options: MethodOptions, target: Target, seen: Float[Tensor, "n T H"]) -> nn.Module:
        """One layer of the target's width."""
        if options.width not in (0, target.hidden_size):
            raise ConfigError(f"eagle1 is as wide as its target, here {target.hidden_size}: leave the width out")
        config = feature_config(options, target, self.taps(options, target))
        return new_last_features(config, target, options.loop.seed)

    def load(self, folder: Path, target: Target) -> Any:
        """An EAGLE-1 folder."""
        return Eagle1Network.load(folder, target)

    def fit_inputs(
        self, options: MethodOptions, judge: Teacher, model: nn.Module, training: Features
    ) -> tuple[Callable[[int], Batch], LossOf]:
        """Rows of text and EAGLE-1's loss."""
        return training, feature_loss(judge)


def feature_loss(judge: Teacher) -> LossOf:
    """EAGLE-1's loss for `loop.train`: smooth L1 of the next feature, plus a tenth of the cross-entropy of its distribution.

    Li et al. 2024, section 4.2, with the noise of the authors' code on the input features, so that the drafter is trained for
    reading its own inexact features.
    """

    def loss(model: nn.Module, batch: Batch, progress: float) -> Tensor:
        assert isinstance(batch, tuple) and isinstance(model, Eagle1Network)
        tokens, hidden = batch[0], batch[1]
        wanted, f = judge.distributions(hidden), model.read(hidden[:, :, list(judge.taps)])
        noisy = f + (torch.rand_like(f) - 0.5) * NOISE / f.shape[1]
        (state,) = model.states(tokens, noisy[:, :-1], 1)
        near = torch.nn.functional.smooth_l1_loss(state, f[:, 1:])
        log_q = torch.log_softmax(model.logits(state).float(), -1)
        cross = -(torch.softmax(wanted[:, 1:].float(), -1) * log_q).sum(-1).mean()
        return near + 0.1 * cross

    return loss


def feature_config(options: MethodOptions, target: Target, taps: tuple[int, ...]) -> EagleConfig:
    """Shapes of an EAGLE drafter: heads of 32 if they divide its width."""
    width = options.width or target.hidden_size
    each = heads_of(width, (32, 16, 8))
    if not each or (options.width and width % 32):
        raise ConfigError(f"the width of a feature drafter must be a multiple of 32 (its heads), got {width}")
    heads = width // each
    return EagleConfig(width, target.hidden_size, taps, target.vocab_size, heads, heads, each, inner_of(width))


@torch.no_grad()
def new_features(config: EagleConfig, target: Target, taps: Float[Tensor, "n T H"], seed: int = 0) -> Eagle3Network:
    """A feature model whose token tables are the target's, projected to its width, and whose `fc` scales taps to about one.

    taps: some hidden states of the layers it will read, whose sizes differ by layer.
    """
    torch.manual_seed(seed)
    model = Eagle3Network(config)
    init_decoder(model)
    scale_taps(model.fc, taps)
    table, head = embeddings(target), output_of(target)
    model.embed_tokens.weight.copy_(narrow(table, config.hidden))
    model.lm_head.weight.copy_(narrow(head, config.hidden))
    return model


@torch.no_grad()
def new_last_features(config: EagleConfig, target: Target, seed: int = 0) -> Eagle1Network:
    """An EAGLE-1 drafter with the target's tables whose first prediction is its input feature."""
    torch.manual_seed(seed)
    model = Eagle1Network(config)
    init_decoder(model)
    model.load_state_dict(target_tables(target, "the drafter"), strict=False)
    model.fc.weight[:, config.hidden :].copy_(torch.eye(config.hidden))
    model.fc.bias.zero_()
    return model
