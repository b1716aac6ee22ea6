"""Means that may be looked at any time: confidence sequences and the sample size they need.

For paired differences y_1, y_2, .. with mean m and unknown variance, the Bayes factor of "the effect in standard deviations is
N(0, g)" against m is a martingale in the scale-invariant filtration (Lai 1976; Wang and Ramdas, "Anytime-valid t-tests and
confidence sequences for Gaussian means with unknown variance", 2023):

    BF_n(m) = (1 + n g)^(-1/2) [(1 + x) / (1 + x / (1 + n g))]^(n/2),   x = t^2 / (n - 1), t the t-statistic of y - m.

The m with BF_n(m) < 1 / level form a sequence of intervals that contains the mean at *all* n with probability 1 - level: exact
for normal differences, which log ratios of times per prompt are close to, and asymptotic otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEAST = 5
"""Differences before the first look."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Mean of n differences with its anytime-valid interval; infinite before there is one."""

    n: int
    mean: float
    low: float
    high: float


def half_width_factor(n: int, level: float, g: float) -> float:
    """Half width of the interval in units of s / sqrt(n), s the sample standard deviation (n - 1); math.inf if unbounded."""
    if n < LEAST:
        return math.inf
    log_k = (2 / n) * (math.log(1 / level) + 0.5 * math.log1p(n * g))
    k = math.exp(min(log_k, 700))
    if k >= 1 + n * g:
        return math.inf
    return math.sqrt((n - 1) * (k - 1) / (1 - k / (1 + n * g)))


def bounds(y: npt.ArrayLike, level: float, g: float) -> Bounds:
    """The interval of the mean of `y` now. level: probability that it ever misses. g: prior variance of the standardised effect."""
    values = np.asarray(y, dtype=float)
    n = len(values)
    if n < LEAST:
        return Bounds(n, float(values.mean()) if n else math.nan, -math.inf, math.inf)
    mean, spread = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n)
    width = half_width_factor(n, level, g) * spread
    return Bounds(n, mean, mean - width, mean + width)


def prior(effect: float, sd: float) -> float:
    """The g that is sharpest for an effect of this size: its square in standard deviations, kept within [0.01, 10]."""
    return min(10.0, max(0.01, (effect / sd) ** 2)) if sd > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Design:
    """Prompts needed. fixed: for one look at the end. sequential: for looks after every prompt. sd: of one difference."""

    effect: float
    sd: float
    level: float
    power: float
    arms: int
    fixed: int
    sequential: int
    g: float


def design(
    effect: float, sd: float, *, level: float = 0.05, power: float = 0.8, arms: int = 2, most: int = 100_000
) -> Design:
    """Paired prompts needed to see a log ratio of `effect` with this power; level is shared by arms - 1 comparisons (Bonferroni).

    Raises ValueError for an effect, spread or power that is not positive.
    """
    from scipy.stats import norm

    if effect <= 0 or sd <= 0 or not 0 < power < 1 or not 0 < level < 1 or arms < 2:
        raise ValueError(
            "a design needs a positive effect and spread, level and power between 0 and 1, and two arms or more"
        )
    share = level / (arms - 1)
    z = float(norm.isf(share / 2) + norm.ppf(power))
    g = prior(effect, sd)
    need = float(norm.ppf(power))
    n = LEAST
    while n < most and (half_width_factor(n, share, g) + need) * sd / math.sqrt(n) > effect:
        n = max(n + 1, int(n * 1.01))
    return Design(effect, sd, level, power, arms, max(LEAST, math.ceil((z * sd / effect) ** 2)), n, g)
