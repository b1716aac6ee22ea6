"""A sharper comparison from the same continuations: control variates of mean zero, used without looking ahead.

Let y_g be what prompt group g says about two arms, and z_g what chance did to them in their own runs: for each arm the target
calls per token that replay expects along the common continuations less those its run took, in units of the mean of the earlier
groups (`noise_covariate`). By (1) of `continuations`, E[z_g] = 0 whatever came before, for arms that are lossless. With weights w_g
that depend on earlier groups only,

    y'_g = y_g - w_g . z_g        has        E[y'_g | past] = E[y_g | past]

exactly, for every g: the reduced mean estimates the same number as the plain one, and a confidence sequence of y' is one of the
mean of y. The weights are least squares on the past, begun at 1: what chance does to the speed of an arm whose time goes by calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from outrider.evaluate.records import Record
from outrider.evaluate.statistics.sequential import LEAST, Bounds, bounds, half_width_factor

Array = NDArray[np.float64]
Metric = Literal["speed", "acceptance"]
METRICS: tuple[Metric, ...] = ("speed", "acceptance")
PRIOR = 8.0
"""Prompt groups that the first guess of the weights counts for."""
FALSE_ALARM = 1e-4
"""Probability with which an exact arm is ever said to disagree with its replay."""
ROUNDING = 0.01
"""Target calls per token by which replay may be off: in low precision a text read at once and one read step by step differ."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """What replay has done for one comparison: its interval without, and the factor by which fewer groups are needed.

    factor: variance of one group's difference without over that with. gap: target calls per token of the arm's own runs less
    those replayed; of the base's if only those disagree. agrees: both gaps are zero as far as can be told.
    """

    without: Bounds
    factor: float
    gap: Bounds
    agrees: bool


def noise_covariate(calls: Array, replayed: Array) -> Array:
    """[n] target calls per token expected less taken, over the mean expected in earlier groups (0.5 before the first)."""
    before = (
        np.concatenate([[0.5], replayed.cumsum()[:-1] / np.arange(1, len(replayed))]) if len(replayed) else replayed
    )
    return (replayed - calls) / before


def controlled(y: Array, z: Array) -> Array:
    """[n] y less w_g . z_g, w_g from groups before g only. z: [n, k] of mean zero, expected to move y one to one.

    w_g = n / (n + PRIOR) * (least squares of y on z) + PRIOR / (n + PRIOR) over the n groups before g.
    """
    return y - (_weights(y, z) * z).sum(1) if len(y) else y


def _weights(y: Array, z: Array) -> Array:
    """[n, k] the weights of every group, from sums over those before it."""
    n = np.arange(len(y))[:, None]
    before = lambda x: np.concatenate([np.zeros_like(x[:1]), x.cumsum(0)[:-1]])  # noqa: E731
    squares = before(z[:, :, None] * z[:, None, :])
    products = before(z * y[:, None]) - before(z) * before(y[:, None]) / np.maximum(n, 1)
    fitted = (np.linalg.pinv(squares, rcond=1e-9, hermitian=True) @ products[:, :, None])[:, :, 0]
    return np.where(n < LEAST, 1.0, (n * fitted + PRIOR) / (n + PRIOR))


def gap_of(calls: Array, replayed: Array, g: float) -> tuple[Bounds, bool]:
    """Mean target calls per token taken less those replayed, with its anytime-valid interval; whether it is zero up to rounding."""
    gap = bounds(calls - replayed, FALSE_ALARM, g)
    return gap, not (gap.low > ROUNDING or gap.high < -ROUNDING)


def factor(without: Array, reduced: Array) -> float:
    """Variance without over variance with: the factor by which fewer groups give the same interval. NaN if it is not known."""
    if len(without) < LEAST or reduced.var() == 0:
        return math.nan
    return float(without.var() / reduced.var())


def ratio_bounds(over: Array, under: Array, level: float, g: float) -> Bounds:
    """log of mean(under) / mean(over) with its anytime-valid interval: for calls per token, the gain in tokens per call.

    over, under: [n] positive, paired. For the true ratio r the differences under - r * over have mean zero; the interval is the set
    of r that their confidence sequence (`sequential.bounds`) does not exclude, the solution of a quadratic (Fieller).
    """
    n = len(over)
    if n < LEAST:
        return Bounds(n, math.log(under.mean() / over.mean()) if n else math.nan, -math.inf, math.inf)
    k = half_width_factor(n, level, g) ** 2 / n
    a, b, s = float(over.mean()), float(under.mean()), np.cov(over, under)
    if not math.isfinite(k) or (square := a * a - k * s[0, 0]) <= 0:
        return Bounds(n, math.log(b / a), -math.inf, math.inf)
    middle = a * b - k * s[0, 1]
    root = math.sqrt(max(0.0, middle * middle - square * (b * b - k * s[1, 1])))
    low, high = (middle - root) / square, (middle + root) / square
    return Bounds(
        n, math.log(b / a), math.log(low) if low > 0 else -math.inf, math.log(high) if high > 0 else -math.inf
    )


def spread_of_ratio(over: Array, under: Array) -> Array:
    """[n] what each group does to log(mean(under) / mean(over)), to first order: their variance says how many are needed."""
    return under / under.mean() - over / over.mean()


def compare(
    metric: Metric, level: float, g: float, pairs: Sequence[tuple[Record, Record]]
) -> tuple[Bounds, Reduction | None]:
    """Log ratio of the metric, arm over base, with its anytime-valid interval; sharper where both arms were replayed.

    pairs: the records of the arm and of the base, group by group; those without tokens are left out.
    """
    arm, base = [a for a, b in pairs if a.tokens and b.tokens], [b for a, b in pairs if a.tokens and b.tokens]
    taken = [np.array([r.counts.steps / r.tokens for r in side]) for side in (arm, base)]
    expected = [np.array([math.nan if r.replayed is None else r.replayed for r in side]) for side in (arm, base)]
    replayed = len(arm) > 0 and bool(np.isfinite(expected).all())
    if metric == "acceptance":
        plain, spread = ratio_bounds(taken[0], taken[1], level, g), spread_of_ratio(taken[0], taken[1])
        reduced, rest = ratio_bounds(expected[0], expected[1], level, g), spread_of_ratio(expected[0], expected[1])
    else:
        speeds = [np.log([r.tokens / r.seconds for r in side]) for side in (arm, base)]
        spread = speeds[0] - speeds[1]
        rest = controlled(
            spread, np.stack([noise_covariate(taken[0], expected[0]), -noise_covariate(taken[1], expected[1])], axis=1)
        )
        plain, reduced = bounds(spread, level, g), bounds(rest, level, g)
    if not replayed:
        return plain, None
    gap, agrees = min((gap_of(*x, g) for x in zip(taken, expected, strict=True)), key=lambda found: found[1])
    return reduced, Reduction(plain, factor(spread, rest), gap, agrees)
