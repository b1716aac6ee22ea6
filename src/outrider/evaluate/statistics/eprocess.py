"""Evidence that grows token by token: test martingales on likelihood ratios, valid whenever one looks and stops.

Let p be the distribution a token should have given everything before it. For any distribution a chosen before the token is seen,
the factor f = a(x) / p(x) has expectation one under p, so the product of such factors is a nonnegative martingale, and it ever
exceeds 1 / level with probability at most `level` (Ville 1939; Shafer 2021, "Testing by betting"). The average of many such
products is one again, so a whole family of alternatives may be tried at no cost in validity.

Every alternative here is a *direction* a mixed in at strength w: f = 1 - w + w min(a / p, clip). With a tolerance d the null is
wider: every distribution within total variation d of p. Under such a one E f <= E_p f + d (max f - min f), so dividing by the
right side keeps a supermartingale for all of them (Huber's censored ratio, with the exact constant of the position).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

STRENGTHS: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 0.9)
"""Strengths at which every direction is tried. None is 1: a single impossible token must not end a component."""
POWER_Z = 0.8416
"""Normal quantile of the power (80%) that "detectable" means."""
MOST_CLIP = 1e6
CLIP_COST = 0.05


def clip_for(tolerance: float) -> float:
    """Largest ratio counted: a tolerance d costs at most d * clip * w per token, which is kept at CLIP_COST * w."""
    return min(MOST_CLIP, CLIP_COST / tolerance) if tolerance > 0 else MOST_CLIP


@dataclass(frozen=True, slots=True)
class Bet:
    """One direction at the n positions of a text: what is needed of the distributions once the tokens are known.

    ratio: [n] clipped a / p of the emitted token. mean: [n] its expectation under p. spread: [n] its largest less smallest value.
    tv: [n] total variation between p and a.
    """

    ratio: NDArray[np.float64]
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    tv: NDArray[np.float64]


def clipped(p: Float[Tensor, "n V"], a: Float[Tensor, "n V"], clip: float) -> Float[Tensor, "n V"]:
    """min(a / p, clip); where p is zero: the clip if the alternative can emit the token, else one (no opinion)."""
    ratio = (a / p).clamp_(max=clip)
    return torch.where(p > 0, ratio, torch.where(a > 0, clip, 1.0))


def bet(p: Float[Tensor, "n V"], ratio: Float[Tensor, "n V"], a: Float[Tensor, "n V"], token: Int[Tensor, "n"]) -> Bet:
    """The numbers of a direction at the emitted tokens."""
    at = ratio.gather(1, token[:, None])[:, 0]
    mean = (p * ratio).sum(1).clamp(max=1.0)
    tv = 0.5 * (p - a).abs().sum(1)
    return Bet(*(x.cpu().numpy() for x in (at, mean, ratio.amax(1) - ratio.amin(1), tv)))


def log_factors(b: Bet, tolerance: float, strengths: Sequence[float] = STRENGTHS) -> NDArray[np.float64]:
    """[n, strengths] log of the factor of each token at each strength; its expectation is at most one under the null."""
    w = np.asarray(strengths)[None]
    top = 1 - w + w * b.ratio[:, None]
    return np.log(top / (1 - w + w * b.mean[:, None] + tolerance * w * b.spread[:, None]))


def growth(
    p: Float[Tensor, "n V"], ratio: Float[Tensor, "n V"], a: Float[Tensor, "n V"], tolerance: float
) -> NDArray[np.float64]:
    """[strengths, 3] sums over the positions, if tokens came from (1 - w) p + w a: mean and variance of the log factor, and TV."""
    mean, spread = (p * ratio).sum(1, keepdim=True).clamp(max=1.0), (ratio.amax(1) - ratio.amin(1))[:, None]
    tv = float(0.5 * (p - a).abs().sum())
    out = []
    for w in STRENGTHS:
        log = torch.log((1 - w + w * ratio) / (1 - w + w * mean + tolerance * w * spread))
        mixed = (1 - w) * p + w * a
        first = (mixed * log).sum(1)
        out.append((float(first.sum()), float(((mixed * log.square()).sum(1) - first.square()).sum()), w * tv))
    return np.array(out)


@dataclass(frozen=True, slots=True)
class Component:
    """One direction: the family it is reported under, and what it is in words."""

    family: str
    label: str


class EProcess:
    """The running average of products over components x strengths; families weigh the same, members of a family too."""

    def __init__(self, components: Sequence[Component], level: float) -> None:
        """level: probability that a generator of the target distribution is ever accused."""
        self.components, self.level = list(components), level
        families = [c.family for c in self.components]
        share = {f: 1.0 / (len(set(families)) * families.count(f) * len(STRENGTHS)) for f in families}
        self.weight = np.log(np.array([share[f] for f in families]))[:, None].repeat(len(STRENGTHS), 1)
        self.log = np.zeros((len(self.components), len(STRENGTHS)))
        self.tokens, self.highest, self.alarm = 0, 0.0, None
        self.path: list[float] = []

    @property
    def needed(self) -> float:
        """Log evidence at which the null is rejected: log(1 / level)."""
        return math.log(1 / self.level)

    @property
    def value(self) -> float:
        """Log of the evidence now."""
        return float(_logsumexp(self.log + self.weight))

    def update(self, factors: Float[np.ndarray, "n C S"]) -> None:
        """Multiply in the factors of n tokens, in order, looking after every one of them."""
        for step in factors:
            self.log += step
            self.tokens += 1
            now = self.value
            self.highest = max(self.highest, now)
            if self.alarm is None and now >= self.needed:
                self.alarm = self.tokens
            self.path.append(now)

    def families(self) -> dict[str, float]:
        """Log evidence of each family alone, largest first."""
        names = dict.fromkeys(c.family for c in self.components)
        found = {f: _logsumexp(self.log[self._of(f)] + self.weight[self._of(f)]) + math.log(len(names)) for f in names}
        return dict(sorted(found.items(), key=lambda kv: -kv[1]))

    def best(self, family: str) -> tuple[Component, float, float]:
        """The strongest member of a family: component, strength and log evidence."""
        rows = self._of(family)
        i, s = np.unravel_index(int(self.log[rows].argmax()), self.log[rows].shape)
        return self.components[rows[int(i)]], STRENGTHS[int(s)], float(self.log[rows][i, s])

    def _of(self, family: str) -> list[int]:
        return [i for i, c in enumerate(self.components) if c.family == family]


class Cells:
    """A bet that learns which kinds of token come too often: for faults that no direction describes.

    A partition of the vocabulary into cells of known probability is a categorical trial per token; the factor of a cell is the
    share of tokens seen in it so far over the share expected (both smoothed). Learnt from the past alone, so still a martingale.
    """

    def __init__(self, cells: int, tolerance: float, prior: float = 20.0) -> None:
        self.seen, self.due = np.full(cells, prior / cells), np.full(cells, prior / cells)
        self.tolerance = tolerance

    def factor(self, mass: NDArray[np.float64], cell: int) -> NDArray[np.float64]:
        """Log factor at each strength of one token: `mass` [cells] is what p gives each cell, `cell` where the token fell."""
        ratio = self.seen / self.due
        w = np.asarray(STRENGTHS)
        mean, spread = float(mass @ ratio), float(ratio.max() - ratio.min())
        out = np.log((1 - w + w * ratio[cell]) / (1 - w + w * mean + self.tolerance * w * spread))
        self.seen[cell] += 1
        self.due += mass
        return out


def _logsumexp(x: NDArray[np.float64]) -> float:
    top = float(x.max())
    return top + math.log(float(np.exp(x - top).sum()))


def detectable(sums: NDArray[np.float64], tokens: int, needed: float) -> float | None:
    """Smallest total variation per token that would have raised the alarm with 80% probability at this sample size.

    sums: [strengths, 3] of `growth` scaled to `tokens`. needed: log(1 / level) plus the log of the component's inverse weight.
    None when even the strongest mixture would not have. Between two strengths the bias is interpolated on a log scale.
    """
    reach = sums[:, 0] - POWER_Z * np.sqrt(np.maximum(sums[:, 1], 0.0))
    good = np.nonzero(reach >= needed)[0]
    if not len(good):
        return None
    i = int(good[0])
    tv = sums[:, 2] / tokens
    if i == 0 or reach[i - 1] <= 0:
        return float(tv[i])
    share = (math.log(needed) - math.log(reach[i - 1])) / (math.log(reach[i]) - math.log(reach[i - 1]))
    return float(math.exp(math.log(tv[i - 1]) + share * (math.log(tv[i]) - math.log(tv[i - 1]))))
