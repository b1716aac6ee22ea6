"""Lossy acceptance by nearness of codes, for image tokens: a token is accepted for the sake of others that look like it.

Both are acceptance functions in the frame of `lossy`: whatever they accept, a refusal draws from the optimal residual, the distance
of the position from the target is metered, and a budget bounds it. The papers state thresholds of single tests, which
bound neither.
Distances of codes are those of their points (`raster.Raster.codes`: root mean square of pixels, 1 for full contrast). Points are
those of tokens [T, d]: a token beyond them, or whose point is NaN, is no code. It is near to no other, and judged exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from outrider.verify.lossy import AcceptancePlan, Position, optimal

NONE = -1
"""No neighbour."""


def line(vocab_size: int) -> Float64[Tensor, "V 1"]:
    """Codes that lie on a line in the order of their numbers, as grey levels do; the ends are 1 apart."""
    return torch.arange(vocab_size, dtype=torch.float64).unsqueeze(1) / max(1, vocab_size - 1)


def nearest(points: Float64[Tensor, "C d"], count: int) -> Int[Tensor, "C k"]:
    """The `count` nearest other codes of each, nearest first, the lower number first of equals; NONE where there are too few."""
    size = len(points)
    out = torch.full((size, count), NONE, dtype=torch.int64)
    some = min(count, size - 1)
    if some < 1:
        return out
    for first in range(0, size, 512):  # a part of the square of distances at a time
        gap = torch.cdist(points[first : first + 512], points, compute_mode="donot_use_mm_for_euclid_dist")
        gap[torch.arange(len(gap)), torch.arange(first, first + len(gap))] = torch.inf
        out[first : first + len(gap), :some] = _least(gap, some)
    return out


def _least(x: Float64[Tensor, "n C"], count: int) -> Int[Tensor, "n k"]:
    """Columns of the `count` least of each row, as a stable sort gives them: whole rows are sorted where equals make it matter."""
    found = x.topk(count, largest=False)
    columns = found.indices.sort(dim=-1).values
    columns = columns.gather(-1, x.gather(-1, columns).sort(dim=-1, stable=True).indices)
    tied = (x <= found.values[:, -1:]).sum(-1) > count
    columns[tied] = x[tied].sort(dim=-1, stable=True).indices[:, :count]
    return columns


class Placed(NamedTuple):
    """The tokens that are codes, increasing, and their points."""

    token: Int[Tensor, "C"]
    point: Float64[Tensor, "C d"]


def placed(points: Float64[Tensor, "T d"], vocab_size: int) -> Placed:
    """Which tokens of a vocabulary are codes, and where they are."""
    token = (~points[:vocab_size].isnan().any(-1)).nonzero()[:, 0]
    return Placed(token, points[token])


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """min(1, (p(x) + sum of p over the J nearest codes) / q(x)), J as large as the sum stays within delta (LANTERN, Jang
    et al. 2025).

    k: most codes that are looked at. points: see above; None: a line.
    """

    delta: float
    k: int
    points: Float64[Tensor, "T d"] | None = None
    _near: dict[int, tuple[Int[Tensor, "C"], Int[Tensor, "C k"]]] = field(default_factory=dict)

    def __call__(self, position: Position) -> AcceptancePlan:
        p, q = position.p[0], position.q[0]
        token, near = (x.to(p.device) for x in self._table(len(p)))
        mass = torch.where(near == NONE, 0.0, p[token][near]).cumsum(-1)
        moved = torch.zeros_like(p)
        moved[token] = torch.where(mass <= self.delta, mass, 0.0).amax(-1)
        accept = torch.where(q > 0, (p + moved) / q, 1.0).clamp_(max=1.0)
        return optimal(accept.unsqueeze(0), position)

    def _table(self, vocab_size: int) -> tuple[Int[Tensor, "C"], Int[Tensor, "C k"]]:
        """The codes, and the numbers among them of the neighbours of each; they are looked for once."""
        if vocab_size not in self._near:
            # of `line` whole numbers: equal distances stay equal
            whole = torch.arange(vocab_size, dtype=torch.float64).unsqueeze(1)
            codes = placed(whole if self.points is None else self.points, vocab_size)
            self._near[vocab_size] = codes.token, nearest(codes.point, self.k)
        return self._near[vocab_size]


@dataclass(frozen=True, slots=True, eq=False)
class Cluster:
    """min(1, P(C) / Q(C)), C: of the k codes around x in the order of p those whose probability is within `gap` of p(x) and whose
    distance is within `near`, and x (grouped speculative decoding, So et al., ICCV 2025). Not on the front.

    points: as for `Neighbours`.
    """

    k: int
    gap: float
    near: float
    points: Float64[Tensor, "T d"] | None = None
    _codes: dict[int, Placed] = field(default_factory=dict)

    def __call__(self, position: Position) -> AcceptancePlan:
        p, q = position.p[0], position.q[0]
        token, points = (x.to(p.device) for x in self._table(len(p)))
        ranked = p[token].sort(descending=True, stable=True).indices
        order, points = token[ranked], points[ranked]
        rank = torch.arange(len(order), device=p.device)
        half = self.k // 2
        window = rank[:, None] + torch.cat([torch.arange(-half, 0), torch.arange(1, half + 1)]).to(p.device)
        inside = (window >= 0) & (window < len(order))
        window = window.clamp(0, len(order) - 1)
        others = order[window]
        close = (points[window] - points[:, None]).norm(dim=-1) < self.near
        kept = inside & close & ((p[others] - p[order][:, None]).abs() < self.gap)
        accept = torch.where(q > 0, p / q, 1.0)
        both = [x[order] + torch.where(kept, x[others], 0.0).sum(-1) for x in (p, q)]
        accept[order] = torch.where(both[1] > 0, both[0] / both[1], 1.0)
        return optimal(accept.clamp_(max=1.0).unsqueeze(0), position)

    def _table(self, vocab_size: int) -> Placed:
        """The codes; they are looked for once."""
        if vocab_size not in self._codes:
            self._codes[vocab_size] = placed(line(vocab_size) if self.points is None else self.points, vocab_size)
        return self._codes[vocab_size]
