"""Lossy acceptance by nearness of codes, for image tokens: a token is accepted for the sake of others that look like it.

Both are acceptance functions in the frame of `lossy`: whatever they accept, a refusal draws from the optimal residual, the distance
of the position from the target is metered, and a budget bounds it. The papers state thresholds of single tests, which
bound neither.
Distances of codes are those of their points (`raster.Raster.codes`: root mean square of pixels, 1 for full contrast).
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    for first in range(0, size, 512):  # a part of the square of distances at a time
        gap = torch.cdist(points[first : first + 512], points, compute_mode="donot_use_mm_for_euclid_dist")
        gap[torch.arange(len(gap)), torch.arange(first, first + len(gap))] = torch.inf
        some = min(count, size - 1)
        out[first : first + len(gap), :some] = gap.sort(dim=-1, stable=True).indices[:, :some]
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """min(1, (p(x) + sum of p over the J nearest codes) / q(x)), J as large as the sum stays within delta (LANTERN, Jang
    et al. 2025).

    k: most codes that are looked at. points: [C, d] of the codes, tokens beyond them have no neighbours; None: a line.
    """

    delta: float
    k: int
    points: Float64[Tensor, "C d"] | None = None
    _near: dict[int, Int[Tensor, "C k"]] = field(default_factory=dict)

    def __call__(self, position: Position) -> AcceptancePlan:
        p, q = position.p[0], position.q[0]
        near = self._table(len(p)).to(p.device)
        mass = torch.where(near == NONE, 0.0, p[near]).cumsum(-1)
        moved = torch.zeros_like(p)
        moved[: len(near)] = torch.where(mass <= self.delta, mass, 0.0).amax(-1)
        accept = torch.where(q > 0, (p + moved) / q, 1.0).clamp_(max=1.0)
        return optimal(accept.unsqueeze(0), position)

    def _table(self, vocab_size: int) -> Int[Tensor, "C k"]:
        """The neighbours of every code; they are looked for once."""
        if vocab_size not in self._near:
            # of `line` whole numbers: equal distances stay equal
            whole = torch.arange(vocab_size, dtype=torch.float64).unsqueeze(1)
            points = whole if self.points is None else self.points[:vocab_size]
            self._near[vocab_size] = nearest(points, self.k)
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
    points: Float64[Tensor, "C d"] | None = None

    def __call__(self, position: Position) -> AcceptancePlan:
        p, q = position.p[0], position.q[0]
        points = (line(len(p)) if self.points is None else self.points[: len(p)]).to(p.device)
        order = p.sort(descending=True, stable=True).indices
        order = order[order < len(points)]
        rank = torch.arange(len(order), device=p.device)
        half = self.k // 2
        window = rank[:, None] + torch.cat([torch.arange(-half, 0), torch.arange(1, half + 1)]).to(p.device)
        inside = (window >= 0) & (window < len(order))
        others = order[window.clamp(0, len(order) - 1)]
        close = (points[others] - points[order][:, None]).norm(dim=-1) < self.near
        kept = inside & close & ((p[others] - p[order][:, None]).abs() < self.gap)
        accept = torch.where(q > 0, p / q, 1.0)
        both = [x[order] + torch.where(kept, x[others], 0.0).sum(-1) for x in (p, q)]
        accept[order] = torch.where(both[1] > 0, both[0] / both[1], 1.0)
        return optimal(accept.clamp_(max=1.0).unsqueeze(0), position)
