"""Draws of tokens from distributions and noise. Callers declare the very tensor that was drawn from.

No draw returns a token of probability zero: the inverse CDF is summed in float64 with a strict comparison, and a pick
that the rounding of a parallel sum put on a zero becomes the most likely token.

A draw stays on its device until `transfer.fetch` copies it to the host, so that a level of a draft needs one read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from outrider import transfer
from outrider.nn import picks
from outrider.transfer import Pending
from outrider.types import TOLERANCE


class Drawn(NamedTuple):
    """tokens: of every row, in draw order. sound: whether every row was checked to sum to one."""

    tokens: list[list[int]]
    sound: bool


def inverse_cdf(q: Float[Tensor, "n V"], uniform: list[list[float]]) -> Pending[Drawn]:
    """Independent draws from row i, one for each of its uniforms of (0, 1); every row has the same number.

    A row that is not a distribution (not finite, or without mass) gives no tokens.
    """
    size = q.shape[-1]
    columns, total = picks.draws(q, uniform, replace=True) or independent(q, uniform)
    return Pending(
        (columns, total), lambda rows, sums: Drawn([[] if size in row else row for row in rows], _sum_to_one(sums))
    )


def independent(q: Float[Tensor, "n V"], uniform: list[list[float]]) -> tuple[Int[Tensor, "n w"], Float64[Tensor, "n"]]:
    """The token that each uniform draws (V if there is none), and the sums of the rows."""
    cdf = q.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    single = len(uniform) == 1 and len(uniform[0]) == 1  # saves the most common draw a small tensor
    flat = [u for row in uniform for u in row]
    level = total * (flat[0] if single else transfer.upload(flat, torch.float64, q.device).view(len(uniform), -1))
    # the first column whose cumulative mass exceeds u * total; a total of 0, infinity or NaN gives V
    columns = torch.searchsorted(cdf, level, right=True)
    return columns if transfer.on_host(q) else with_mass(q, columns), total.squeeze(1)


def with_mass(q: Float[Tensor, "n V"], columns: Int[Tensor, "n w"]) -> Int[Tensor, "n w"]:
    """`columns` with those without mass replaced by the most likely one; V stays V.

    Needed for parallel sums: they may decrease by rounding, and then a column without mass may be the first to exceed a level.
    Sequential sums never decrease.
    """
    size = q.shape[-1]
    some = q.gather(1, columns.clamp(max=size - 1)) > 0
    return columns.where(some | (columns == size), q.argmax(-1, keepdim=True))


def without_replacement(q: Float[Tensor, "n V"], uniform: list[list[float]]) -> Pending[Drawn]:
    """Successive draws from row i, each from the renormalised rest; fewer if no mass remains."""
    size = q.shape[-1]
    columns, total = picks.draws(q, uniform, replace=False) or successive(q, uniform)
    return Pending(
        (columns, total),
        lambda rows, sums: Drawn([[t for t in row if t < size] for row in rows], _sum_to_one(sums)),
    )


def successive(q: Float[Tensor, "n V"], uniform: list[list[float]]) -> tuple[Int[Tensor, "n w"], Float64[Tensor, "n"]]:
    """The columns of draws without replacement, V where no mass remains, and the sums of the rows."""
    size, left = q.shape[-1], q.to(torch.float64, copy=True)
    columns: list[Tensor] = []
    sums: list[Tensor] = []
    for j in range(len(uniform[0])):
        drawn, total = independent(left, [[row[j]] for row in uniform])
        columns.append(drawn)
        sums.append(total)
        at = drawn.clamp(max=size - 1)
        left.scatter_(1, at, left.gather(1, at).where(drawn == size, 0.0))
    return torch.cat(columns, 1), sums[0]


def hub_pairs(q: Float[Tensor, "n V"], uniform: list[list[float]]) -> Pending[Drawn]:
    """SpecHub's pairs: a draw from row i, and its most likely token a, or a draw from the row without a if the first was a.

    One token where a has all the mass (Sun et al., "SpecHub", EMNLP 2024).
    """
    size, hubs = q.shape[-1], q.argmax(-1, keepdim=True)
    first, total = independent(q, [[row[0]] for row in uniform])
    others = q.to(torch.float64, copy=True).scatter_(1, hubs, 0.0)
    second, _ = independent(others, [[row[1]] for row in uniform])

    def finish(rows: list[list[int]], sums: list[float]) -> Drawn:
        pairs = [(x, y if x == a else a) for x, y, a in rows]
        return Drawn([[t for t in pair if t < size] if pair[0] < size else [] for pair in pairs], _sum_to_one(sums))

    return Pending((torch.cat([first, second, hubs], 1), total), finish)


def race(q: Float[Tensor, "n V"], exponential: Float[Tensor, "n V"], width: int) -> Pending[Drawn]:
    """The first `width` arrivals of an exponential race with rates `q`: draws without replacement, in draw order.

    The first is argmax(q / e), so it agrees with a target that races with the same noise about as often as the two distributions
    allow (Daliri, Musco and Suresh 2024). Tokens without mass never arrive.
    """
    arrived = top(q / exponential, width, floor=0.0)
    return Pending(
        (*arrived.parts, q.sum(-1, dtype=torch.float64)),
        lambda tokens, values, sums: Drawn(arrived.finish(tokens, values).tokens, _sum_to_one(sums)),
    )


def top(scores: Float[Tensor, "n V"], width: int, floor: float = -torch.inf) -> Pending[Drawn]:
    """The `width` best columns of each row, best first, without those at `floor` or below."""
    if width == 1:
        values, tokens = scores.max(-1)
        pick = lambda tokens, values: [[t] if v > floor else [] for t, v in zip(tokens, values, strict=True)]  # noqa: E731
    else:
        tokens, values = largest(scores, width)
        pick = lambda tokens, values: [  # noqa: E731
            [t for t, v in zip(row, chances, strict=True) if v > floor]
            for row, chances in zip(tokens, values, strict=True)
        ]
    return Pending((tokens, values), lambda tokens, values: Drawn(pick(tokens, values), False))


def largest(scores: Float[Tensor, "n V"], width: int) -> tuple[Int[Tensor, "n w"], Float[Tensor, "n w"]]:
    """The `width` best columns of each row, best first, and their scores; a row of NaN has scores of NaN."""
    width = min(width, scores.shape[-1])
    found = picks.best(scores, width)
    if found is None:
        values, tokens = scores.topk(width, -1)
        found = tokens, values
    return found


def _sum_to_one(sums: list[float]) -> bool:
    """False for a NaN."""
    return all(abs(x - 1.0) <= TOLERANCE for x in sums)
