"""Losses for language models and for drafts, each with its formula.

Letters as everywhere in this project: ``p`` is the target's distribution, ``q`` the draft's. The probability that speculative
sampling keeps a drafted token is, given the context,

    acceptance = sum_x min(p(x), q(x)) = 1 - TV(p, q)            (Leviathan et al. 2023, Theorem 3.5)

so the total variation is what determines the acceptance of a draft. Its gradient vanishes for tokens on which p and q
hardly overlap, so training starts with the Kullback-Leibler divergence and ends with TV. By Pinsker's inequality
TV <= sqrt(KL / 2), the first stage already bounds the second's objective.

All functions take logits ``[..., V]`` of any float type, compute in float32, and return the mean over positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean of ``-log q(token)`` in nats; ``logits [..., V]``, ``tokens [...]``."""
    return F.cross_entropy(logits.float().flatten(0, -2), tokens.flatten())


def kl_divergence(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """Mean of ``KL(p || q) = sum_x p(x) (log p(x) - log q(x))`` in nats."""
    log_p = F.log_softmax(target_logits.float(), dim=-1)
    log_q = F.log_softmax(draft_logits.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def acceptance(target_logits: torch.Tensor, draft_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """``sum_x min(p(x), q(x))`` per position, ``[...]``, both distributions at the same temperature."""
    p = F.softmax(target_logits.float() / temperature, dim=-1)
    q = F.softmax(draft_logits.float() / temperature, dim=-1)
    return torch.minimum(p, q).sum(-1)


def total_variation(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """Mean of ``TV(p, q) = 1/2 sum_x |p(x) - q(x)| = 1 - acceptance``."""
    return 1.0 - acceptance(target_logits, draft_logits).mean()


def distillation(
    target_logits: torch.Tensor, draft_logits: torch.Tensor, tv_weight: float, kl_weight: float
) -> torch.Tensor:
    """Mean of ``kl_weight KL(p || q) + tv_weight TV(p, q)``. Only the draft gets a gradient, which is not differentiable."""
    return _Distillation.apply(target_logits, draft_logits, tv_weight, kl_weight)


ROWS = 128
"""Positions that are compared at a time: their distributions stay in the processor's cache, which makes the loss a third
faster. On other devices they are MANY, since each piece costs the start of a dozen operators."""
MANY = 1 << 15


class _Distillation(torch.autograd.Function):
    """``distillation`` and its gradient in one pass: dKL/dlogits = q - p, dTV/dlogits = q (s - q.s) with s = sign(q - p) / 2."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, target_logits: torch.Tensor, draft_logits: torch.Tensor, tv_weight: float, kl_weight: float
    ) -> torch.Tensor:
        target, draft = target_logits.detach().flatten(0, -2), draft_logits.detach().flatten(0, -2)
        slope = torch.empty_like(draft) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=draft.device)
        rows = ROWS if draft.device.type == "cpu" else MANY
        for first in range(0, len(draft), rows):
            part = slice(first, first + rows)
            log_p, log_q = (F.log_softmax(x[part].float(), dim=-1) for x in (target, draft))
            p, q = log_p.exp(), log_q.exp()
            gap = q - p
            if kl_weight:
                total += kl_weight * log_p.sub_(log_q).mul_(p).sum()
            if tv_weight:
                total += tv_weight * 0.5 * gap.abs().sum()
            if slope is not None:
                slope[part] = slope_of(q, gap, tv_weight, kl_weight) / len(draft)
        if slope is not None:
            ctx.save_for_backward(slope.view(draft_logits.shape))
        return total / len(draft)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return None, slope * grad, None, None


def slope_of(q: torch.Tensor, gap: torch.Tensor, tv_weight: float, kl_weight: float) -> torch.Tensor:
    """Gradient of the loss of rows ``[n, V]``; gap: q - p, which is overwritten."""
    if not tv_weight:
        return gap.mul_(kl_weight)
    side = gap.sign().mul_(0.5 * tv_weight)
    side.sub_((q * side).sum(-1, keepdim=True)).mul_(q)
    return side.add_(gap, alpha=kl_weight)


def hybrid(target_logits: torch.Tensor, draft_logits: torch.Tensor, eta: float = 3.0) -> torch.Tensor:
    """Mean of ``w KL(p || q) + (1 - w) TV(p, q)`` with ``w = exp(-eta * acceptance)``, a constant for the gradient.

    Where p and q hardly overlap, the gradient of TV vanishes and KL dominates; where they agree, TV dominates, which
    determines acceptance (LK losses, arXiv 2602.23881; eta = 3 there).
    """
    log_p = F.log_softmax(target_logits.float(), dim=-1)
    log_q = F.log_softmax(draft_logits.float(), dim=-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    tv = 0.5 * (p - log_q.exp()).abs().sum(-1)
    weight = torch.exp(-eta * (1.0 - tv.detach()))
    return (weight * kl + (1.0 - weight) * tv).mean()


def log_acceptance(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """Mean of ``-log sum_x min(p(x), q(x))``: its gradient is that of TV, divided by the acceptance."""
    return -acceptance(target_logits, draft_logits).clamp(min=1e-9).log().mean()


LOSSES = ("staged", "hybrid", "kl", "tv", "log_acceptance", "ce")
"""Ways to compare a draft's distribution with the target's, for ``distillation_loss``."""
ONLY_KL = 2 / 3
"""Share of a ``staged`` training that minimises KL(p || q) alone; then total variation dominates, one minus acceptance."""


def weights_of(name: str, progress: float) -> tuple[float, float] | None:
    """Weights of TV and KL in the loss ``name`` of LOSSES at ``progress``; None for a loss that is not a sum of the two."""
    if name == "staged":
        return (0.0, 1.0) if progress < ONLY_KL else (1.0, 0.1)
    return {"kl": (0.0, 1.0), "tv": (1.0, 0.0)}.get(name)


def distillation_loss(
    name: str, target_logits: torch.Tensor, draft_logits: torch.Tensor, tokens: torch.Tensor, progress: float
) -> torch.Tensor:
    """The loss ``name`` of LOSSES for logits ``[r, n, V]``. tokens ``[r, n - 1]``: the tokens after all columns but the last, for
    ``ce``, which does not use the target. progress in [0, 1): how much of the training is done."""
    if name == "ce":
        return cross_entropy(draft_logits[:, :-1], tokens)
    if name == "hybrid":
        return hybrid(target_logits, draft_logits)
    if name == "log_acceptance":
        return log_acceptance(target_logits, draft_logits)
    weights = weights_of(name, progress)
    assert weights is not None, f"a loss without its formula: {name}"
    return distillation(target_logits, draft_logits, *weights)
