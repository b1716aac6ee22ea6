"""Training block drafters: packed anchors, one loss on slots, acceptance while training, and decoding of finished text.

Every row of text gives many blocks at once. A block's anchor sits anywhere in the text the target wrote; its slots are
compared with the tokens that follow. Anchors come from a random stream of their own, so that runs that differ in nothing
but the objective see the same blocks (Whalen et al. 2026 compare objectives so; DFlash, arXiv 2602.06036, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from outrider.drafters.dflash.network import DFlashConfig, DFlashNetwork
from outrider.errors import ConfigError
from outrider.protocols import Target
from outrider.train.features import Features
from outrider.train.loop import Batch, LossOf
from outrider.train.losses import ONLY_KL
from outrider.train.slots import Objective, distillation_loss, slot_loss

ANCHOR_STREAM = 0xA2C
"""Sets the anchors' random numbers apart from those that order the rows."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Batches with the anchors of their blocks, addressed by step number.

    features: rows of text. block: slots of a block. count: blocks of a row and step, at most as many as there are places.
    first: earliest anchor: the last token that was given, so that every label is a token the target wrote.
    """

    features: Features
    block: int
    count: int = 16
    first: int = 1

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Batch of step `step`: tokens [r, L], hidden states [r, L, T, H] and anchors [r, N], ascending."""
        tokens, hidden = self.features(step)
        return tokens, hidden, torch.from_numpy(self.anchors(step, *tokens.shape))

    def anchors(self, step: int, rows: int, length: int) -> np.ndarray:
        """Positions [rows, N], drawn uniformly without replacement from those whose block lies within the row."""
        places = np.arange(max(1, self.first), length - self.block + 1)
        if not len(places):
            raise ConfigError(f"rows of {length} tokens have no room for blocks of {self.block}: lengthen the rows")
        random = np.random.default_rng((self.features.seed, step, ANCHOR_STREAM))
        drawn = random.permuted(np.tile(places, (rows, 1)), axis=1)
        return np.sort(drawn[:, : self.count], axis=1)


def labels_of(tokens: Int[Tensor, "r L"], anchors: Int[Tensor, "r N"], block: int) -> Int[Tensor, "r N S"]:
    """The tokens that slots 1 .. block - 1 stand for: those behind the anchors."""
    places = anchors[..., None] + torch.arange(1, block, device=tokens.device)
    return tokens.gather(1, places.flatten(1)).view(places.shape)


def packed(model: nn.Module, batch: Batch, columns: Sequence[int]) -> tuple[DFlashNetwork, Float[Tensor, "M S V"]]:
    """Logits of every block of a batch of `Blocks`, one under the other; columns: the hidden states that the drafter reads."""
    assert isinstance(batch, tuple)
    assert isinstance(model, DFlashNetwork)
    tokens, hidden, anchors = batch
    keys = model.inject(hidden[:, :, list(columns)])
    return model, model.blocks(keys, tokens.gather(1, anchors), anchors).flatten(0, 1)


def block_loss(columns: Sequence[int], how: Objective) -> LossOf:
    """A loss for `loop.train` on batches of `Blocks`, against the tokens of the text, which the target drew from its own laws."""

    def loss(model: nn.Module, batch: Batch, progress: float) -> Tensor:
        blocks, logits = packed(model, batch, columns)
        labels = labels_of(batch[0], batch[2], blocks.config.block).flatten(0, 1)
        return slot_loss(logits, labels, torch.ones_like(labels, dtype=torch.bool), how)

    return loss


SHARES = {"staged": ((1.0, 0.0), (0.1, 1.0)), "kl": ((1.0, 0.0),) * 2, "log_acceptance": ((0.0, 1.0),) * 2}
"""Losses against laws: `entropy` and `overlap` of `slots.distillation_loss` before and after ONLY_KL of the steps."""


def block_distillation_loss(
    columns: Sequence[int], last: int, target: Target, how: Objective, loss_name: str = "staged"
) -> LossOf:
    """The same against the target's laws, its last hidden states (column `last` of those that are stored) through its head.

    loss_name: one of SHARES.
    """

    def loss(model: nn.Module, batch: Batch, progress: float) -> Tensor:
        blocks, logits = packed(model, batch, columns)
        hidden, anchors, slots = batch[1], batch[2], blocks.config.block - 1
        row = torch.arange(len(hidden))[:, None, None]
        # the law of slot k, k places behind the anchor, stands at the position before it
        before = hidden[row, anchors[..., None] + torch.arange(slots), last]
        with torch.no_grad():
            wanted = target.unembed(before.flatten(0, 2).to(target.dtype)).view(*logits.shape)
        entropy, overlap = SHARES[loss_name][progress >= ONLY_KL]
        every = torch.ones(logits.shape[:2], dtype=torch.bool)
        return distillation_loss(logits, wanted, every, how, entropy=entropy, overlap=overlap)

    return loss


def predict_blocks(
    model: DFlashNetwork, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"]
) -> list[Float[Tensor, "r n V"]]:
    """A block at every position: entry d, column i is slot d + 1 of the block whose anchor is token i + 1."""
    size = model.config.block
    anchors = torch.arange(1, tokens.shape[1] - size + 1, device=tokens.device).expand(len(tokens), -1)
    logits = model.blocks(model.inject(taps), tokens.gather(1, anchors), anchors)
    return [logits[:, :, d] for d in range(size - 1)]


# ------------------------------------------------------------------------------------------------------ finished text
Accepts = Callable[
    [Float[Tensor, "n S V"], Int[Tensor, "n S"], Int[Tensor, "n S"], Int[Tensor, "n"]], Bool[Tensor, "n S"]
]
"""(logits, tokens of the text, their positions, rows) -> which slots are accepted, given that those before them are."""


def most_likely(logits: Tensor, labels: Tensor, position: Tensor, row: Tensor) -> Tensor:
    """Greedy proposals: accepted where they are what the target wrote, at any temperature it wrote at."""
    return logits.argmax(-1) == labels


def sampled(log_p: Float[Tensor, "r L"], uniform: Float[Tensor, "r L"]) -> Accepts:
    """Sampled proposals, given the text that came of it: token x was accepted with probability min(1, q(x) / p(x)).

    Speculative sampling emits x as an accepted proposal with probability min(p(x), q(x)), and emits it with p(x) in all. log_p: of
    every token under the target at temperature 1. uniform: one number in (0, 1) for each; the same ones pair different drafters.
    """

    def accepts(logits: Tensor, labels: Tensor, position: Tensor, row: Tensor) -> Tensor:
        log_q = torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]
        at = row[:, None], position
        return uniform[at].log() + log_p[at] < log_q

    return accepts


@torch.no_grad()
def walk(
    model: DFlashNetwork,
    tokens: Int[Tensor, "r L"],
    taps: Float[Tensor, "r L T H"],
    first: int,
    accepts: Accepts,
    *,
    slots: int | None = None,
) -> list[list[int]]:
    """Decode rows that are written already: accepted tokens of every round of each row, rounds that leave the row left out.

    first: position of the first anchor, the first token that was written. slots: of a block, see `DFlashNetwork.blocks`. With
    `most_likely` on greedy text these are the very rounds of the engine; on sampled text, and with `sampled`, they have
    the law of the engine's: the text is what the target would have written, and a drafter never changes it.
    """
    size, length = slots or model.config.block, tokens.shape[1]
    keys = model.inject(taps)
    runs: list[list[int]] = [[] for _ in tokens]
    at = torch.full((len(tokens),), first, dtype=torch.int64)
    while len(live := (at + size <= length).nonzero()[:, 0]):
        mine = [(k[live], v[live]) for k, v in keys] if len(live) < len(tokens) else keys
        place = at[live]
        logits = model.blocks(mine, tokens[live, place][:, None], place[:, None], slots=size)[:, 0]
        position = place[:, None] + torch.arange(1, size)
        good = accepts(logits, tokens[live[:, None], position], position, live)
        run = good.int().cumprod(1).sum(1)
        at[live] = place + run + 1
        for row, accepted in zip(live.tolist(), run.tolist(), strict=True):
            runs[row].append(accepted)
    return runs


# ------------------------------------------------------------------------------------------------------ fresh drafters
@torch.no_grad()
def new_blocks(
    config: DFlashConfig,
    target: Target,
    taps: Float[Tensor, "n T H"],
    head: Float[Tensor, "V H"],
    norm: Float[Tensor, "H"],
    seed: int = 0,
) -> DFlashNetwork:
    """A block drafter before its first step: its tables and its last norm are the target's, `fc` takes taps to about one.

    taps: some hidden states of the layers it will read. head, norm: the target's output matrix and the weights of its final norm.
    """
    torch.manual_seed(seed)
    model = DFlashNetwork(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and weight.requires_grad:
            small = 0.1 if "o_proj" in name or "down_proj" in name else 1.0
            nn.init.normal_(weight, std=small * weight.shape[1] ** -0.5)
    scale = taps.float().square().mean((0, 2)).sqrt()
    model.fc.weight.view(config.hidden, len(config.taps), -1).div_(scale[None, :, None])
    model.embed_tokens.weight.copy_(target.embed(torch.arange(target.vocab_size, device=target.device)).float())
    model.lm_head.weight.copy_(head)
    model.norm.weight.copy_(norm)
    return model
