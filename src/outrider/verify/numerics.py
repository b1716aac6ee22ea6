"""Shared by the rules: exact draws, overlaps of distributions and the ledger's sums.

Every number is computed row by row: no result depends on the other rows of the tensor, so results are bit-identical
for every batch. Draws and residuals are float64, whatever dtype the distributions have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from outrider.errors import RequestError
from outrider.transfer import read, upload
from outrider.types import Proposal, Verdict
from outrider.verify import native

BLOCK = 1024
"""Columns of a row that are summed together. A running sum over all of V would be slow on a long row."""

SHORT = 4 * BLOCK
"""Rows up to this length are drawn from by one running sum: there a second level costs more than it saves."""

MIN_MASS = 1e-300
"""Smallest total to draw from: below it u * total is not safely smaller than total."""

BELOW_ONE = 1.0 - 2.0**-53
"""The largest uniform used for a draw."""


def row_sums(x: Float[Tensor, "n V"]) -> Float64[Tensor, "n"]:
    """Sum of each row: blocks in the dtype of `x`, then float64 over blocks, in an order that n does not change."""
    size = x.shape[1]
    whole = size // BLOCK * BLOCK
    if not whole:
        return x.sum(-1).double()
    if whole == size:
        return x.unflatten(1, (-1, BLOCK)).sum(-1).double().sum(-1)
    return row_sums(x[:, :whole]) + x[:, whole:].sum(-1)


def overlap(
    p: Float[Tensor, "n V"], q: Float[Tensor, "n S"], support: Int[Tensor, "S"] | None = None
) -> Float64[Tensor, "n"]:
    """Sum of min(p, q) per row: the probability that one draw from q is accepted (Yin et al. 2024, Theorem 1)."""
    return row_sums(torch.minimum(p if support is None else p.index_select(1, support), q))


def overlaps(
    here: Float[Tensor, "n V"], q: Float[Tensor, "n S"], support: Int[Tensor, "S"] | None = None
) -> tuple[Float64[Tensor, "n"], Float64[Tensor, "n"], Float64[Tensor, "n"]]:
    """Sums per row of min(wp, q), of (wp - q)_+ and of min(wp, q)^2 / q, from weights wp."""
    share = here if support is None else here.index_select(1, support)
    rest = row_sums((share - q).clamp_(min=0))
    if support is not None:
        rest += row_sums(here) - row_sums(share)  # tokens outside the support: the draft never proposes them
    common = torch.minimum(share, q)
    mean = row_sums(common)
    square = row_sums(common.square_().div_(q.clamp(min=torch.finfo(q.dtype).tiny)))
    return mean, rest, square


def overlap_row(p: Float[Tensor, "1 V"], q: Float[Tensor, "1 S"], support: Int[Tensor, "S"] | None = None) -> float:
    """`overlap` of one row."""
    found = native.overlap(p, q, 1.0) if support is None else None
    return float(overlap(p, q, support)) if found is None else found.common


def subtract(weight: Float64[Tensor, "n V"], q: Float[Tensor, "n S"], support: Int[Tensor, "S"] | None = None) -> None:
    """The residual of a refused draw, in place: weight becomes max(weight - q, 0)."""
    if support is None:
        weight.sub_(q)
    else:
        weight.index_add_(1, support, q.double(), alpha=-1)
    weight.clamp_(min=0)


def take_pairs(x: Float[Tensor, "R V"], rows: Sequence[int], token: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
    """x[rows[i], token[i]] for every i."""
    if _are_neighbours(rows):
        return x[rows[0] : rows[0] + len(rows)].gather(1, token.unsqueeze(1)).squeeze(1)
    return x[upload(rows, torch.int64, x.device), token]


def _are_neighbours(rows: Sequence[int]) -> bool:
    return all(row == rows[0] + i for i, row in enumerate(rows))


def as_weights(rows: Float[Tensor, "n V"]) -> Float64[Tensor, "n W"]:
    """A float64 copy of distributions, for draws and residuals; long rows are padded with zeros to whole blocks."""
    n, size = rows.shape
    if size <= SHORT:
        return rows.to(torch.float64, copy=True)
    out = torch.empty(n, -(-size // BLOCK) * BLOCK, dtype=torch.float64, device=rows.device)
    out[:, :size] = rows
    out[:, size:] = 0
    return out


def draw(weight: Float64[Tensor, "n W"], u: Sequence[float]) -> tuple[Int[Tensor, "n"], Float64[Tensor, "n"]]:
    """Inverse-CDF draws from rows made by `as_weights`, one uniform of [0, 1] per row; and the rows' totals.

    A column of weight zero is never drawn. A row whose total is not a number above MIN_MASS has no distribution: its token is
    meaningless, and the caller must check the total.
    """
    level = upload([min(x, BELOW_ONE) for x in u], torch.float64, weight.device)
    return draw_at(weight, level.unsqueeze(1))


def draw_at(
    weight: Float64[Tensor, "n W"], level: Float64[Tensor, "n 1"]
) -> tuple[Int[Tensor, "n"], Float64[Tensor, "n"]]:
    """`draw` with uniforms below one that are already on the device of the weights."""
    if weight.shape[1] <= SHORT:
        cumulative = weight.cumsum(1)
        total = cumulative[:, -1:]
        return torch.searchsorted(cumulative, level * total, right=True).squeeze(1), total.squeeze(1)
    blocks = weight.unflatten(1, (-1, BLOCK))
    mass = blocks.sum(-1)
    cumulative = mass.cumsum(1)
    total = cumulative[:, -1:]
    level = level * total
    block = torch.searchsorted(cumulative, level, right=True).clamp_(max=mass.shape[1] - 1)
    level = level - cumulative.gather(1, block) + mass.gather(1, block)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, 1, BLOCK)).squeeze(1).cumsum(1)
    # a block's sum and its running sum round differently: stay strictly inside the running sum
    level = torch.minimum(level.clamp_(min=0), inside[:, -1:] * BELOW_ONE)
    return (block * BLOCK + torch.searchsorted(inside, level, right=True)).squeeze(1), total.squeeze(1)


def draw_one(weight: Float[Tensor, "1 V"], u: float) -> tuple[int, float]:
    """(token, total) of one row, without `as_weights`."""
    found = native.draw(weight, None, 1.0, u)
    if found is not None:
        return found
    return draw_plain(as_weights(weight), u)


def draw_plain(weight: Float64[Tensor, "1 W"], u: float) -> tuple[int, float]:
    """(token, total) of one row made by `as_weights`."""
    (token,), (total,) = read(*draw(weight, [u]))
    return token, total


def draw_residual(here: Float[Tensor, "1 V"], q: Proposal, row: int, w: float, u: float) -> tuple[int, float]:
    """(token, total) of (w p - q)_+ with distribution `row` of q."""
    q_row = q.probs[row : row + 1]
    found = native.draw(here, q_row, w, u) if q.support is None else None
    if found is not None:
        return found
    weight = as_weights(here)
    subtract(weight[:, : here.shape[1]].mul_(w), q_row, q.support)
    return draw_plain(weight, u)


def draw_without(here: Float[Tensor, "1 V"], banned: int, u: float) -> tuple[int, float]:
    """(token, total) of p without one token."""
    weight = as_weights(here)
    weight[0, banned] = 0
    return draw_plain(weight, u)


def final_token(drawn: tuple[int, float], p: Float[Tensor, "M V"], row: int, u: float, b: int) -> int:
    """The last token of sequence b: the one drawn from the residual at a row of p, or, if the residual is empty up to rounding,
    one drawn from the row itself.

    drawn: (token, total) of the residual. Raises RequestError if the row has no mass either.
    """
    token, total = drawn
    if not is_drawable(total):
        token, total = draw_one(p[row : row + 1], u)
        if not is_drawable(total):
            raise no_distribution(b)
    return token


def no_distribution(b: int) -> RequestError:
    """The error for a target distribution without mass."""
    return RequestError(
        f"the target distribution of sequence {b} of this step has no positive finite sum; "
        "look for NaN or infinities in the model's logits and for a request that bans every token"
    )


def is_drawable(x: float) -> bool:
    """Whether weights with this total can be drawn from (false for NaN)."""
    return MIN_MASS < x < math.inf


def is_positive(x: float) -> bool:
    """Whether x is positive and finite, as the probability of an observed event must be (false for NaN)."""
    return 0.0 < x < math.inf


def clamp01(x: float) -> float:
    """x rounded into [0, 1]; one for NaN."""
    return min(max(x, 0.0), 1.0) if x == x else 1.0


def root(f: Callable[[float], float], low: float, high: float) -> float:
    """The zero of a monotone function on [low, high], to 1e-14 (Brent's method); an end if rounding hides the change of sign."""
    from scipy.optimize import brentq  # 50 MB that most runs never need

    ends = f(low), f(high)
    if not ends[0] * ends[1] < 0.0:
        return low if abs(ends[0]) <= abs(ends[1]) else high
    return float(brentq(f, low, high, xtol=1e-14, rtol=1e-14))  # type: ignore[arg-type]


def rejection_risk(shared: float, px: float, qx: float) -> float:
    """Probability that a draw from q is refused: one minus the overlap, or, if that is not finite, the risk given the token."""
    return clamp01(1.0 - shared) if math.isfinite(shared) else clamp01(1.0 - px / qx)


def token_probs(q: Proposal, row: Sequence[int], token: Int[Tensor, "k"]) -> Float[Tensor, "k"]:
    """q(x) of each token under its distribution; zero for a point mass and for a token outside the support."""
    known = None if min(row) >= 0 else upload([r >= 0 for r in row], torch.bool, token.device)
    row = [max(r, 0) for r in row]
    if q.support is None:
        probs = take_pairs(q.probs, row, token)
    else:
        hit = q.support.unsqueeze(0) == token.unsqueeze(1)
        probs = take_pairs(q.probs, row, hit.to(torch.uint8).argmax(1)).where(hit.any(1), 0.0)
    return probs if known is None else probs.where(known, 0.0)


def verdict(paths: Sequence[Sequence[int]], tokens: Sequence[int], risks: Sequence[Sequence[float]]) -> Verdict:
    """A lossless rule's verdict from, per sequence, its path, its next token and the risk of each judged position."""
    return Verdict(
        path=tuple(tuple(path) for path in paths),
        next_token=tuple(tokens),
        judged=tuple(len(risk) for risk in risks),
        risk=tuple(math.fsum(risk) for risk in risks),
        spread=tuple(math.fsum(r * (1.0 - r) for r in risk) for risk in risks),
        bias=(0.0,) * len(risks),
    )
