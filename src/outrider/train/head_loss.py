"""The loss of a draft's levels from the rows before its output matrix: logits are made and used up a row of text at a time.

Logits of all levels are most of a training's memory traffic: at a vocabulary of 4,096 and five levels 80 KB a token, each read and
written a dozen times. Here the logits of one row of text live in the processor's cache for as long as they are needed: product,
comparison with the target's distribution (made once a position, for all levels), and both products of the gradient. Where
autocast is on, the four products are in its type, everything between them is float32, and so are the labels.

Its twin is `losses.distillation` of the logits of every level, which is also what losses that it does not know are computed by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.nn.level_attention import rounding, unrounded
from outrider.train.losses import MANY, slope_of

Labels = Callable[[slice], Float[Tensor, "c L V"]]
"""The target's logits at every position of some rows of a batch."""
TOGETHER = 256
"""Positions of text whose logits are made at a time on a processor; short rows of text are put together."""

TILE = 32
"""Rows of logits that are compared at a time on a processor: what the comparison needs stays in its second cache."""


def head_distillation(
    labels: Labels,
    states: Sequence[Float[Tensor, "r n D"]],
    matrix: Float[Tensor, "V D"],
    shares: Sequence[float],
    tv_weight: float,
    kl_weight: float,
) -> Tensor:
    """sum_d shares[d] of the mean of ``kl_weight KL(p || q) + tv_weight TV(p, q)`` at level d, q of logits states[d] matrix^T.

    labels: of rows of L positions. Column i of level d is compared with the target's distribution at position i + d + 1. Only
    states and matrix get a gradient, which is not differentiable.
    """
    return _HeadDistillation.apply(labels, tuple(shares), tv_weight, kl_weight, matrix, *states)


class _HeadDistillation(torch.autograd.Function):
    """Value and gradients in one pass over the rows of text."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        labels: Labels,
        shares: tuple[float, ...],
        tv_weight: float,
        kl_weight: float,
        matrix: Tensor,
        *states: Tensor,
    ) -> Tensor:
        kind = rounding(matrix.device) or matrix.dtype
        learn_matrix, learn_states = ctx.needs_input_grad[4], any(ctx.needs_input_grad[5:])
        rows, total = states[0].shape[0], torch.zeros((), device=matrix.device)
        of_matrix = torch.zeros_like(matrix, dtype=torch.float32) if learn_matrix else None
        of_states = [torch.empty_like(s) for s in states] if learn_states else []
        with unrounded(matrix.device):
            w = matrix.detach().to(kind)
            each = max(1, (TOGETHER if matrix.device.type == "cpu" else MANY) // (states[0].shape[1] + len(states)))
            for first in range(0, rows, each):
                part = slice(first, first + each)
                wanted = labels(part).float()
                p = torch.softmax(wanted, -1)
                entropy = (p * wanted).sum(-1) - _normaliser(wanted, p)
                for d, state in enumerate(states):
                    at, scale = slice(d + 1, d + 1 + state.shape[1]), shares[d] / state[..., 0].numel()
                    x = state.detach()[part].flatten(0, 1).to(kind)
                    z = x @ w.T
                    total.add_(entropy[:, at].sum(), alpha=scale * kl_weight)
                    total.add_(_compare(z, p[:, at].flatten(0, 1), tv_weight, kl_weight), alpha=scale)
                    if of_matrix is not None:
                        of_matrix.add_(z.T @ x, alpha=scale)
                    if of_states:
                        of_states[d][part] = (z @ w).mul_(scale).view(state[part].shape)
        ctx.save_for_backward(*([of_matrix] if of_matrix is not None else []), *of_states)
        ctx.learnt = learn_matrix, learn_states, matrix.dtype, len(states)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        learn_matrix, learn_states, kind, count = ctx.learnt
        found = [(grad * t) for t in ctx.saved_tensors]
        of_matrix = found.pop(0).to(kind) if learn_matrix else None
        return None, None, None, None, of_matrix, *(found if learn_states else [None] * count)


def _compare(z: Float[Tensor, "m V"], p: Float[Tensor, "m V"], tv_weight: float, kl_weight: float) -> Tensor:
    """The sum over rows of kl_weight times the cross-entropy of p and q, and tv_weight TV; logits z become the gradient."""
    total = torch.zeros((), device=z.device)
    step = TILE if z.device.type == "cpu" else MANY
    for first in range(0, len(z), step):
        rows, true = z[first : first + step], p[first : first + step]
        logits = rows.float()
        q = torch.softmax(logits, -1)
        if kl_weight:
            cross = _normaliser(logits, q).sum() - torch.dot(true.view(-1), logits.view(-1))
            total.add_(cross, alpha=kl_weight)
        gap = torch.sub(q, true, out=logits) if logits is not rows else q - true
        if tv_weight:
            total.add_(gap.abs().sum(), alpha=0.5 * tv_weight)
        rows.copy_(slope_of(q, gap, tv_weight, kl_weight))
    return total


def _normaliser(logits: Float[Tensor, "*n V"], q: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
    """log sum exp of logits whose softmax is q, from the largest of both."""
    return logits.amax(-1) - q.amax(-1).log()
