"""Shared by all learned methods: the target's distributions as labels, a loss at every level, acceptance on held-out rows.

Every drafter is reduced to one function, `predict(model, tokens, taps) -> [levels, r, n, V]` logits and the positions of the
distributions they predict; losses and measures are the same for all. They are compared with the target's own distribution, its
last hidden state through its head: distillation, with no sampling noise in the labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.protocols import Target
from outrider.train import losses
from outrider.train.features import Features
from outrider.train.head_loss import head_distillation
from outrider.train.loop import Batch, LossOf

DECAY = 0.8
"""Weight of each further level in the loss (Medusa, section 2.2.1; EAGLE-3's code)."""

Logits = Float[Tensor, "r n V"]
Predict = Callable[[Any, Int[Tensor, "r L"], Float[Tensor, "r L T H"]], list[Logits]]
"""Entry d: logits of draft level d + 1 at columns i = 0 .. n_d - 1, where column i knows hidden states up to position i.

Level d + 1 at column i stands for token i + d + 2, whose distribution the target gives at position i + d + 1.
"""


@dataclass(frozen=True, slots=True)
class HeadRows:
    """What the logits of all levels are made of: entry d of `Predict` is states[d] times the matrix."""

    states: list[Float[Tensor, "r n D"]]
    matrix: Float[Tensor, "V D"]


Scored = Callable[[Any, Int[Tensor, "r L"], Float[Tensor, "r L T H"]], HeadRows | None]
"""(model, tokens, taps) -> the rows before the output matrix; None where logits come about otherwise."""


@dataclass(frozen=True)
class Teacher:
    """The target's distributions for losses and measures. layers: of the taps; the last one is the target's last block.

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


def loss_of(judge: Teacher, predict: Predict, how: str = "staged", scored: Scored | None = None) -> LossOf:
    """A loss for `loop.train`: the distribution loss `how` (`losses.LOSSES`) at every level, with lower weight at deeper levels.

    scored: what the model's logits are made of. With it, a loss that is a sum of KL and TV never holds them (`head_loss`).
    """

    def loss(model: nn.Module, batch: Batch, progress: float) -> Tensor:
        assert isinstance(batch, tuple)
        tokens, hidden = batch[0], batch[1]
        weights = losses.weights_of(how, progress)
        rows = scored(model, tokens, hidden[:, :, list(judge.taps)]) if scored is not None and weights else None
        if rows is not None and weights is not None:
            shares = _shares(len(rows.states))
            return head_distillation(
                lambda part: judge.distributions(hidden[part]), rows.states, rows.matrix, shares, *weights
            )
        pairs = judge.pairs(model, (tokens, hidden), predict)
        terms = [
            share * losses.distillation_loss(how, p, q, tokens[:, d + 2 : d + 1 + q.shape[1]], progress)
            for d, (share, (p, q)) in enumerate(zip(_shares(len(pairs)), pairs, strict=True))
        ]
        return torch.stack(terms).sum()

    return loss


def _shares(levels: int) -> list[float]:
    """The weights of the levels, which add up to 1."""
    whole = sum(DECAY**d for d in range(levels))
    return [DECAY**d / whole for d in range(levels)]


MEASURED = 32
"""Most held-out rows for measuring."""


def measure_of(
    judge: Teacher, predict: Predict, held_out: Features, rows: int = MEASURED
) -> Callable[[Any], dict[str, float]]:
    """An `evaluate` for `loop.train`: on held-out rows the acceptance of every level, and the expected tokens per step.

    accept_d: mean of sum min(p, q) at level d, given that the levels above were accepted. same_d: how often the two agree on
    the most likely token. tokens: 1 + mean over positions of the products of the acceptances along the row (temperature 1).
    greedy: the same of the agreements (temperature 0).
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
        per_step = {"tokens": accept, "greedy": same}
        return out | {name: 1.0 + each.cumprod(0).sum(0).mean().item() for name, each in per_step.items()}

    return evaluate
