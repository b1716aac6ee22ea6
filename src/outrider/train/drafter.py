"""Learned drafters: what each predicts from the target's hidden states, its loss, and its acceptance on held-out rows.

Every drafter is reduced to one function, `predict(model, tokens, taps) -> [levels, r, n, V]` logits and the positions whose
law each of them stands for; losses and measures are the same for all. The law they are compared with is the target's own,
its last hidden state through its head: distillation, with no sampling noise in the labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.drafters.checkpoint import target_parts
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.eagle.eagle1 import Eagle1Network
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.network import EagleConfig, EagleNetwork
from outrider.drafters.medusa.network import MedusaConfig, MedusaNetwork
from outrider.protocols import Target
from outrider.train import CausalLM, losses
from outrider.train.block import predict_blocks
from outrider.train.features import Features
from outrider.train.loop import Batch

DECAY = 0.8
"""Weight of each further level in the loss (Medusa, section 2.2.1; EAGLE-3's code)."""

Logits = Float[Tensor, "r n V"]
Predict = Callable[[Any, Int[Tensor, "r L"], Float[Tensor, "r L T H"]], list[Logits]]
"""Entry d: logits of draft level d + 1 at columns i = 0 .. n_d - 1, where column i knows hidden states up to position i.

Level d + 1 at column i stands for token i + d + 2, whose law the target gives at position i + d + 1.
"""


def predict_heads(model: MedusaNetwork, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"]) -> list[Logits]:
    """All heads at all positions; the last ones have nothing to be compared with."""
    length = tokens.shape[1]
    logits = model(taps[:, :, -1])
    return [logits[:, : length - 1 - h, h] for h in range(model.config.heads)]


def predict_features(
    model: EagleNetwork, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
) -> list[Logits]:
    """Training-time test: every level on the outputs of the one before."""
    return model.unroll(tokens, taps[:, : tokens.shape[1] - levels], levels)


def predict_model(
    model: CausalLM, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
) -> list[Logits]:
    """A language model reads the accepted tokens themselves: its law at a position is the same at every level."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return [logits[:, d + 1 :] for d in range(levels)]


@dataclass(frozen=True)
class Teacher:
    """The target's laws, as the loss and the measures want them. layers: of the taps, the last one the target's last block.

    taps: columns of the stored hidden states that the drafter reads. last: the column of the target's last block.
    """

    target: Target
    taps: tuple[int, ...]
    last: int

    @classmethod
    def of(cls, target: Target, held: tuple[int, ...], read: tuple[int, ...]) -> Teacher:
        """held: the layers that are stored. read: those that the drafter reads."""
        return cls(target, tuple(held.index(layer) for layer in read), held.index(target.layers))

    def distributions(self, hidden: Float[Tensor, "r L T H"]) -> Float[Tensor, "r L V"]:
        """The target's logits at every position."""
        with torch.no_grad():
            last = hidden[:, :, self.last].to(self.target.dtype)
            return self.target.unembed(last.flatten(0, 1)).view(*last.shape[:2], -1)

    def pairs(self, model: Any, batch: tuple[Tensor, Tensor], predict: Predict) -> list[tuple[Logits, Logits]]:
        """For every level the target's logits and the draft's, position by position."""
        tokens, hidden = batch
        wanted = self.distributions(hidden)
        found = predict(model, tokens, hidden[:, :, list(self.taps)])
        return [(wanted[:, d + 1 : d + 1 + q.shape[1]], q) for d, q in enumerate(found)]


def loss_of(judge: Teacher, predict: Predict, how: str = "staged") -> Callable[[nn.Module, Batch, float], Tensor]:
    """A loss for `loop.train`: the law loss `how` (`losses.LOSSES`) at every level, deeper levels weighing less."""

    def loss(model: nn.Module, batch: Batch, progress: float) -> Tensor:
        assert isinstance(batch, tuple)
        tokens = batch[0]
        terms = [
            DECAY**d * losses.distillation_loss(how, p, q, tokens[:, d + 2 : d + 1 + q.shape[1]], progress)
            for d, (p, q) in enumerate(judge.pairs(model, (tokens, batch[1]), predict))
        ]
        return torch.stack(terms).sum() / sum(DECAY**d for d in range(len(terms)))

    return loss


NOISE = 0.2 * 512
"""Width of the uniform noise on features, times the length of a row (EAGLE's code: its rows have up to 2048 tokens)."""


def feature_loss(judge: Teacher) -> Callable[[nn.Module, Batch, float], Tensor]:
    """EAGLE-1's loss for `loop.train`: the next feature by smooth L1, and a tenth of the cross-entropy of the laws it gives.

    Li et al. 2024, section 4.2, with the noise of the authors' code on the features that are read, so that drafting on the
    drafter's own ones is nothing new to it.
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


MEASURED = 32
"""Held-out rows that are measured on, at most."""


def measure_of(
    judge: Teacher, predict: Predict, held_out: Features, rows: int = MEASURED
) -> Callable[[Any], dict[str, float]]:
    """An `evaluate` for `loop.train`: on held-out rows the acceptance of every level, and tokens per step they promise.

    accept_d: mean of sum min(p, q) at level d, given that the levels above were accepted. same_d: how often the two agree on
    the most likely token. tokens: 1 + mean over positions of the products of the acceptances along the row (temperature 1).
    """

    def evaluate(model: Any) -> dict[str, float]:
        kept: list[list[Tensor]] = []
        for first in range(0, min(rows, len(held_out.tokens)), 4):
            chosen = list(range(first, min(first + 4, rows, len(held_out.tokens))))
            levels = judge.pairs(model, held_out.take(chosen), predict)
            shortest = min(q.shape[1] for _, q in levels)
            levels = [(p[:, :shortest], q[:, :shortest]) for p, q in levels]
            accepted = torch.stack([losses.acceptance(p, q) for p, q in levels])
            same = torch.stack([(p.argmax(-1) == q.argmax(-1)).float() for p, q in levels])
            kept.append([accepted.flatten(1), same.flatten(1)])
        accept, same = (torch.cat([k[n] for k in kept], 1) for n in range(2))
        out = {f"accept_{d + 1}": x for d, x in enumerate(accept.mean(1).tolist())}
        out |= {f"same_{d + 1}": x for d, x in enumerate(same.mean(1).tolist())}
        return out | {"tokens": 1.0 + accept.cumprod(0).sum(0).mean().item()}

    return evaluate


# ---------------------------------------------------------------------------------------------------- fresh drafters
@torch.no_grad()
def new_heads(config: MedusaConfig, target: Target, final_norm: Tensor | None = None, seed: int = 0) -> MedusaNetwork:
    """Heads that start as the target's own output. final_norm: weights of its final norm, None if they are all one."""
    torch.manual_seed(seed)
    model = MedusaNetwork(config)
    norm = torch.ones(config.hidden) if final_norm is None else final_norm.float()
    model.norm.weight.copy_(norm)
    model.norm.weight.requires_grad_(False)
    for head in model.lm_heads:
        head.weight.copy_(output_of(target) / norm)  # type: ignore[operator, union-attr]
    return model


@torch.no_grad()
def output_of(target: Target) -> Float[Tensor, "V H"]:
    """The target's final norm and head as one matrix: logits of unit vectors, which an RMS norm leaves as they are."""
    size = target.hidden_size**0.5
    unit = torch.eye(target.hidden_size, dtype=target.dtype, device=target.device) * size
    return target.unembed(unit).float().T / size


@torch.no_grad()
def new_features(config: EagleConfig, target: Target, taps: Float[Tensor, "n T H"], seed: int = 0) -> Eagle3Network:
    """A feature model whose token tables are the target's, projected to its width, and whose `fc` takes taps to about one.

    taps: some hidden states of the layers it will read: their sizes differ by layer.
    """
    torch.manual_seed(seed)
    model = Eagle3Network(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            nn.init.normal_(
                weight, std=weight.shape[1] ** -0.5 * (0.1 if "o_proj" in name or "down_proj" in name else 1)
            )
    scale = taps.float().square().mean((0, 2)).sqrt()
    parts = model.fc.weight.view(config.hidden, len(config.taps), -1)
    parts.div_(scale[None, :, None])
    table, head = target.embed(torch.arange(target.vocab_size, device=target.device)).float(), output_of(target)
    model.embed_tokens.weight.copy_(narrow(table, config.hidden))
    model.lm_head.weight.copy_(narrow(head, config.hidden))
    return model


@torch.no_grad()
def new_draft(model: CausalLM, target: Target) -> CausalLM:
    """`model` with the target's token table, projected to its width: which tokens are alike need not be learned."""
    table = target.embed(torch.arange(target.vocab_size, device=target.device)).float()
    model.get_input_embeddings().weight.copy_(narrow(table, model.config.hidden_size))
    return model


@torch.no_grad()
def new_last_features(config: EagleConfig, target: Target, seed: int = 0) -> Eagle1Network:
    """An EAGLE-1 drafter with the target's tables that starts by foreseeing the feature it was given."""
    torch.manual_seed(seed)
    model = Eagle1Network(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and weight.requires_grad:
            nn.init.normal_(
                weight, std=weight.shape[1] ** -0.5 * (0.1 if "o_proj" in name or "down_proj" in name else 1)
            )
    model.load_state_dict(target_parts(target, Path()), strict=False)
    model.fc.weight[:, config.hidden :].copy_(torch.eye(config.hidden))
    model.fc.bias.zero_()
    return model


def narrow(table: Float[Tensor, "V H"], width: int) -> Float[Tensor, "V D"]:
    """The best approximation of rank `width` of a table's inner products, in as many columns."""
    if table.shape[1] <= width:
        return torch.nn.functional.pad(table, (0, width - table.shape[1]))
    _, _, directions = torch.linalg.svd(table, full_matrices=False)
    return table @ directions[:width].T


def predictor(model: nn.Module, levels: int) -> Predict:
    """The `Predict` of a model, for drafts of `levels` levels where the model does not fix them."""
    if isinstance(model, DFlashNetwork):
        return predict_blocks
    if isinstance(model, MedusaNetwork):
        return predict_heads
    return partial(predict_features if isinstance(model, EagleNetwork) else predict_model, levels=levels)
