"""Losses for language models and for drafts, each with its formula.

Letters as everywhere in this project: ``p`` is the target's law, ``q`` the draft's. The probability that speculative
sampling keeps a drafted token is, given the context,

    acceptance = sum_x min(p(x), q(x)) = 1 - TV(p, q)            (Leviathan et al. 2023, Theorem 3.5)

so the total variation is the quantity a draft is really judged by. Its gradient vanishes for tokens on which p and q
hardly overlap, which is why training starts with the Kullback-Leibler divergence and only ends with TV. Pinsker's
inequality TV <= sqrt(KL / 2) says that the first stage already bounds the second's objective.

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
    """``sum_x min(p(x), q(x))`` per position, ``[...]``, both laws at the same temperature."""
    p = F.softmax(target_logits.float() / temperature, dim=-1)
    q = F.softmax(draft_logits.float() / temperature, dim=-1)
    return torch.minimum(p, q).sum(-1)


def total_variation(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """Mean of ``TV(p, q) = 1/2 sum_x |p(x) - q(x)| = 1 - acceptance``."""
    return 1.0 - acceptance(target_logits, draft_logits).mean()


def distillation(
    target_logits: torch.Tensor, draft_logits: torch.Tensor, tv_weight: float, kl_weight: float
) -> torch.Tensor:
    """``kl_weight KL(p || q) + tv_weight TV(p, q)``; the softmaxes are shared between the two terms."""
    log_p = F.log_softmax(target_logits.float(), dim=-1)
    log_q = F.log_softmax(draft_logits.float(), dim=-1)
    p = log_p.exp()
    loss = kl_weight * (p * (log_p - log_q)).sum(-1).mean() if kl_weight else log_q.new_zeros(())
    if tv_weight:
        loss = loss + tv_weight * 0.5 * (p - log_q.exp()).abs().sum(-1).mean()
    return loss
