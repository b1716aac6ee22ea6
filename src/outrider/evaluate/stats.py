"""Intervals for ratios of sums: paired, clustered by prompt, from a seeded generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio with its 95% interval and what it allows to say: faster, slower or undecided."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "undecided"


def paired_ratio(
    tokens: NDArray[np.float64],
    seconds: NDArray[np.float64],
    base_tokens: NDArray[np.float64],
    base_seconds: NDArray[np.float64],
    *,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Ratio:
    """(sum tokens / sum seconds) over the same of the base, with a bootstrap interval over the prompts (clusters).

    All four arrays are [prompts]: sums over the repeats of one prompt, the same prompt at the same index in both arms, so
    that whatever a prompt or a slow minute does to both arms cancels.
    """
    count = len(tokens)

    def rate(pick: NDArray[np.int64]) -> NDArray[np.float64]:
        ours = tokens[pick].sum(-1) / seconds[pick].sum(-1)
        base = base_tokens[pick].sum(-1) / base_seconds[pick].sum(-1)
        return ours / base

    value = float(rate(np.arange(count)[None])[0])
    if count < 2:
        return Ratio(value, float("nan"), float("nan"))
    picks = np.random.default_rng(seed).integers(count, size=(draws, count))
    low, high = np.quantile(rate(picks), [(1 - level) / 2, (1 + level) / 2])
    return Ratio(value, float(low), float(high))
