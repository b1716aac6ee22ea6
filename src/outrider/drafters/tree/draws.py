"""Draws: a law and noise in, tokens out. Whoever calls these declares the very tensor that was drawn from.

No draw returns a token of probability zero: the inverse CDF is summed in float64 with a strict comparison, and a pick
that the rounding of a parallel sum put on a zero becomes the most likely token.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def inverse_cdf(law: Float[Tensor, "n V"], uniform: list[list[float]]) -> list[list[int]]:
    """Independent draws from row i, one for each of its uniforms of (0, 1): as many for every row.

    A row that is no law (not finite, or without mass) gives no tokens.
    """
    cdf = law.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    single = len(uniform) == 1 and len(uniform[0]) == 1  # spares the commonest draw a small tensor
    level = total * (uniform[0][0] if single else torch.tensor(uniform, dtype=torch.float64, device=law.device))
    # the first column whose cumulative mass exceeds u * total; a total of 0, infinity or NaN ends up behind all columns
    columns = torch.searchsorted(cdf, level, right=True).tolist()
    tokens = [[] if law.shape[-1] in row else row for row in columns]
    return tokens if law.device.type == "cpu" else with_mass(law, tokens)


def with_mass(law: Float[Tensor, "n V"], tokens: list[list[int]]) -> list[list[int]]:
    """`tokens`, those without mass replaced by the most likely one.

    Needed where sums are formed in parallel: they may decrease by a rounding, and a column without mass be the first to
    exceed a level. Sums formed term by term never decrease.
    """
    best = law.argmax(-1, keepdim=True)
    width = max((len(row) for row in tokens), default=0)
    pick = torch.tensor([row or [0] * width for row in tokens], dtype=torch.int64, device=law.device)
    fixed = torch.where(law.gather(1, pick) > 0, pick, best).tolist()
    return [new if row else [] for row, new in zip(tokens, fixed, strict=True)]


def without_replacement(law: Float[Tensor, "n V"], uniform: list[list[float]]) -> list[list[int]]:
    """Successive draws from row i, each from what the earlier ones left, renormalised; fewer if nothing is left."""
    left = law.to(torch.float64, copy=True)
    out: list[list[int]] = [[] for _ in uniform]
    for j in range(len(uniform[0])):
        for i, drawn in enumerate(inverse_cdf(left, [[row[j]] for row in uniform])):
            out[i] += drawn
            left[i, drawn] = 0.0
    return out


def hub_pairs(law: Float[Tensor, "n V"], uniform: list[list[float]]) -> list[list[int]]:
    """SpecHub's pairs: a draw from row i, and its most likely token a, or a draw from the row without a if the first was a.

    One token where a has all the mass (Sun et al., "SpecHub", EMNLP 2024).
    """
    first = inverse_cdf(law, [[row[0]] for row in uniform])
    hubs = law.argmax(-1).tolist()
    others = law.to(torch.float64, copy=True)
    others[range(len(hubs)), hubs] = 0.0
    second = inverse_cdf(others, [[row[1]] for row in uniform])
    return [x and x + ([a] if x[0] != a else y) for x, y, a in zip(first, second, hubs, strict=True)]


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
