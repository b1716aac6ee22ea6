"""Training block drafters: packed anchors, and one loss on slots.

Every row of text gives many blocks at once. A block's anchor is anywhere in the text the target wrote; its slots are
compared with the tokens that follow. Anchors come from a separate random stream, so that runs that differ only in the
objective see the same blocks (as in Whalen et al. 2026; DFlash, arXiv 2602.06036, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.target_tables import embeddings
from outrider.errors import ConfigError
from outrider.models.load import load_tokenizer
from outrider.protocols import Target
from outrider.train.distill import Logits, Teacher
from outrider.train.features import Features
from outrider.train.loop import Batch, LossOf
from outrider.train.losses import ONLY_KL
from outrider.train.methods.base import Method, MethodOptions, chosen_taps
from outrider.train.methods.tables import head_of, heads_of, init_decoder, inner_of, scale_taps
from outrider.train.slot_losses import Objective, distillation_loss, objective_named, slot_loss

ANCHOR_STREAM = 0xA2C
"""Separates the anchors' random numbers from those that order the rows."""


SHARES = {"staged": ((1.0, 0.0), (0.1, 1.0)), "kl": ((1.0, 0.0),) * 2, "log_acceptance": ((0.0, 1.0),) * 2}
"""Losses against distributions: `entropy` and `overlap` of `slot_losses.distillation_loss` before and after ONLY_KL of the
steps."""


class DFlash(Method):
    """A block drafter (DFlash, arXiv 2602.06036)."""

    name = "dflash"
    reads = frozenset({"blocks", "width", "taps", "anchors", "objective", "labels", "loss", "start"})
    names_target = True

    def check(self, options: MethodOptions, given: frozenset[str]) -> None:
        """Labels and losses go together."""
        if options.labels == "distributions" and options.loss not in SHARES:
            raise ConfigError(f"a block drafter learns distributions by {', '.join(SHARES)}, not by {options.loss}")
        if options.labels == "tokens" and "loss" in given:
            raise ConfigError("labels 'tokens' have one loss, weighted by the objective: leave the loss out")

    def taps(self, options: MethodOptions, target: Target) -> tuple[int, ...]:
        """The requested blocks, or EAGLE-3's."""
        return chosen_taps(options, target)

    def new_model(self, options: MethodOptions, target: Target, seen: Float[Tensor, "n T H"]) -> DFlashNetwork:
        """Blocks of one slot more than there are levels."""
        config = block_config(options, target, self.taps(options, target))
        return new_blocks(config, target, seen, *head_of(options.target, target), options.loop.seed)

    def load(self, folder: Path, target: Target) -> DFlashNetwork:
        """A block drafter's folder."""
        return DFlashNetwork.load(folder, target)

    def passes(self, options: MethodOptions) -> int:
        """All levels at once."""
        return 1

    def predict(
        self, model: Any, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
    ) -> list[Logits]:
        """A block at every position: entry d, column i is slot d + 1 of the block whose anchor is token i + 1."""
        size = model.config.block
        anchors = torch.arange(1, tokens.shape[1] - size + 1, device=tokens.device).expand(len(tokens), -1)
        logits = model.blocks(model.inject(taps), tokens.gather(1, anchors), anchors)
        return [logits[:, :, d] for d in range(size - 1)]

    def fit_inputs(
        self, options: MethodOptions, judge: Teacher, model: nn.Module, training: Features
    ) -> tuple[Callable[[int], Batch], LossOf]:
        """Packed blocks of rows, and a loss on their slots."""
        assert isinstance(model, DFlashNetwork)
        size = model.config.block
        first = 1 if options.prompt == options.length else options.prompt - 1
        batches, how = Blocks(training, size, options.anchors, first), objective_named(options.objective, size)
        if options.labels == "distributions":
            return batches, block_distillation_loss(judge.taps, judge.last, judge.target, how, options.loss)
        return batches, block_loss(judge.taps, how)

    def predictions(self, options: MethodOptions) -> int:
        """The slots of the blocks of a row."""
        return options.anchors * options.levels


@dataclass(frozen=True, slots=True)
class Blocks:
    """Batches with the anchors of their blocks, addressed by step number.

    features: rows of text. block: slots of a block. count: blocks of a row and step, at most as many as there are places.
    first: earliest anchor: the last prompt token, so that every label is a token the target wrote.
    """

    features: Features
    block: int
    count: int = 16
    first: int = 1

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Batch of step `step`: tokens [r, L], hidden states [r, L, T, H] and anchors [r, N], ascending."""
        tokens, hidden = self.features(step)
        return tokens, hidden, torch.from_numpy(self.anchors(step, *tokens.shape)).to(tokens.device)

    def anchors(self, step: int, rows: int, length: int) -> np.ndarray:
        """Positions [rows, N], drawn uniformly without replacement from those whose block lies within the row."""
        places = np.arange(max(1, self.first), length - self.block + 1)
        if not len(places):
            raise ConfigError(f"rows of {length} tokens have no room for blocks of {self.block}: lengthen the rows")
        random = np.random.default_rng((self.features.seed, step, ANCHOR_STREAM))
        drawn = random.permuted(np.tile(places, (rows, 1)), axis=1)
        return np.sort(drawn[:, : self.count], axis=1)


def labels_of(tokens: Int[Tensor, "r L"], anchors: Int[Tensor, "r N"], block: int) -> Int[Tensor, "r N S"]:
    """The tokens that slots 1 .. block - 1 predict: those after the anchors."""
    places = anchors[..., None] + torch.arange(1, block, device=tokens.device)
    return tokens.gather(1, places.flatten(1)).view(places.shape)


def packed(model: nn.Module, batch: Batch, columns: Sequence[int]) -> tuple[DFlashNetwork, Float[Tensor, "M S V"]]:
    """Logits of every block of a batch of `Blocks`, stacked; columns: the hidden states that the drafter reads."""
    assert isinstance(batch, tuple)
    assert isinstance(model, DFlashNetwork)
    tokens, hidden, anchors = batch
    keys = model.inject(hidden[:, :, list(columns)])
    return model, model.blocks(keys, tokens.gather(1, anchors), anchors).flatten(0, 1)


def block_loss(columns: Sequence[int], how: Objective) -> LossOf:
    """A loss for `loop.train` on batches of `Blocks`, against the tokens of the text, which the target sampled."""

    def loss(model: nn.Module, batch: Batch, progress: float) -> Tensor:
        blocks, logits = packed(model, batch, columns)
        labels = labels_of(batch[0], batch[2], blocks.config.block).flatten(0, 1)
        return slot_loss(logits, labels, torch.ones_like(labels, dtype=torch.bool), how)

    return loss


def block_distillation_loss(
    columns: Sequence[int], last: int, target: Target, how: Objective, loss_name: str = "staged"
) -> LossOf:
    """The same against the target's distributions: its last hidden states (column `last` of the stored ones) through its head.

    loss_name: one of SHARES.
    """

    def loss(model: nn.Module, batch: Batch, progress: float) -> Tensor:
        blocks, logits = packed(model, batch, columns)
        hidden, anchors, slots = batch[1], batch[2], blocks.config.block - 1
        row = torch.arange(len(hidden), device=hidden.device)[:, None, None]
        # the distribution of slot k, k positions after the anchor, is at the position before it
        before = hidden[row, anchors[..., None] + torch.arange(slots, device=hidden.device), last]
        with torch.no_grad():
            wanted = target.unembed(before.flatten(0, 2).to(target.dtype)).view(*logits.shape)
        entropy, overlap = SHARES[loss_name][progress >= ONLY_KL]
        every = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        return distillation_loss(logits, wanted, every, how, entropy=entropy, overlap=overlap)

    return loss


@torch.no_grad()
def new_blocks(
    config: DFlashConfig,
    target: Target,
    taps: Float[Tensor, "n T H"],
    head: Float[Tensor, "V H"],
    norm: Float[Tensor, "H"],
    seed: int = 0,
) -> DFlashNetwork:
    """A block drafter before its first step: its tables and its last norm are the target's, `fc` scales taps to about one.

    taps: some hidden states of the layers it will read. head, norm: the target's output matrix and the weights of its final norm.
    """
    torch.manual_seed(seed)
    model = DFlashNetwork(config)
    init_decoder(model)
    scale_taps(model.fc, taps)
    model.embed_tokens.weight.copy_(embeddings(target))
    model.lm_head.weight.copy_(head)
    model.norm.weight.copy_(norm)
    return model


def block_config(options: MethodOptions, target: Target, taps: tuple[int, ...]) -> DFlashConfig:
    """Shapes of a block drafter: the target's width, heads of 32 if that divides it, and padding for a mask token."""
    wide = target.hidden_size
    each = heads_of(wide, (32, 16, 8, 4)) or 2
    if options.width not in (0, wide):
        raise ConfigError(f"a block drafter is as wide as its target, here {wide}: leave the width out")
    pad = getattr(load_tokenizer(str(options.target)), "pad_token_id", None)
    mask = target.vocab_size - 1 if pad is None or pad >= target.vocab_size else int(pad)
    return DFlashConfig(
        hidden=wide,
        taps=taps,
        vocab_size=target.vocab_size,
        heads=wide // each,
        kv_heads=wide // each,
        head_dim=each,
        inner=inner_of(wide),
        block=options.levels + 1,
        mask=mask,
        layers=options.blocks,
    )
