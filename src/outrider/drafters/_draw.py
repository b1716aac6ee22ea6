"""Draws: a law and noise in, tokens out. Whoever calls these declares the very tensor that was drawn from.

No draw returns a token of probability zero: the inverse CDF is summed in float64 with a strict comparison, and a pick
that the rounding of a parallel sum put on a zero falls back to the most likely token.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def inverse_cdf(law: Float[Tensor, "n V"], uniform: list[list[float]]) -> list[list[int]]:
    """Independent draws from row i, one for each of its uniforms of (0, 1): as many for every row.

    A row that is no law (not finite, or without mass) gives no tokens.
    """
    cdf = law.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    u = torch.tensor(uniform, dtype=torch.float64, device=law.device)
    # the first column whose cumulative mass exceeds u * total: one with mass, as long as the sums do not decrease
    pick = torch.searchsorted(cdf, total * u, right=True).clamp_(max=law.shape[-1] - 1)
    tokens, mass = pick.tolist(), law.gather(1, pick).tolist()
    for i, (whole,) in enumerate(total.tolist()):
        if not 0.0 < whole < math.inf:
            tokens[i] = []
        elif min(mass[i]) <= 0.0:
            best = int(law[i].argmax())
            tokens[i] = [t if m > 0.0 else best for t, m in zip(tokens[i], mass[i], strict=True)]
    return tokens


def without_replacement(law: Float[Tensor, "n V"], uniform: list[list[float]]) -> list[list[int]]:
    """Successive draws from row i, each from what the earlier ones left, renormalised; fewer if nothing is left."""
    left = law.to(torch.float64, copy=True)
    out: list[list[int]] = [[] for _ in uniform]
    for j in range(len(uniform[0])):
        for i, drawn in enumerate(inverse_cdf(left, [[row[j]] for row in uniform])):
            out[i] += drawn
            left[i, drawn] = 0.0
    return out


def race(law: Float[Tensor, "n V"], exponential: Float[Tensor, "n V"], width: int) -> list[list[int]]:
    """The first `width` arrivals of an exponential race with rates `law`: draws without replacement, in draw order.

    The first is argmax(q / e), so it meets a target that races with the same noise as often as the two laws allow
    (Daliri, Musco and Suresh 2024). Tokens without mass never arrive.
    """
    return top(law / exponential, width, floor=0.0)


def top(scores: Float[Tensor, "n V"], width: int, floor: float = -torch.inf) -> list[list[int]]:
    """The `width` best columns of each row, best first, those at `floor` or below left out."""
    if width == 1:
        best = scores.max(-1)
        return [[t] if v > floor else [] for t, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    best = scores.topk(min(width, scores.shape[-1]), -1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[t for t, v in zip(tokens, values, strict=True) if v > floor] for tokens, values in pairs]
