"""A plan beside its measurement: tokens per second of every configuration, and whether the first choice was right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from outrider.errors import ConfigError
from outrider.evaluate.planning.plan import Key, PlanEntry, StepTiming
from outrider.evaluate.records import Record
from outrider.evaluate.statistics.ratios import Array, Ratio, influence, margin, paired_ratio


@dataclass(frozen=True, slots=True)
class Checked:
    """Predicted beside measured: tokens per second, its two factors, and the error of the prediction as a share.

    measured in [low, high] (95%, over prompt groups). step, measured_step: seconds of a step of the whole batch.
    """

    name: str
    batch: int
    predicted: float
    measured: float
    low: float
    high: float
    tokens_per_call: float
    measured_tokens_per_call: float
    step: float
    measured_step: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def check(choices: Sequence[PlanEntry], timings: Mapping[Key, StepTiming]) -> list[Checked]:
    """Every choice beside its measurement, in the order of the plan. Raises ConfigError for fewer than two groups of prompts."""
    out = []
    for c in choices:
        t = timings[("none" if c.plain else c.draft, c.length, c.batch)]
        tokens, seconds, steps = _sums(t.checked)
        if len(tokens) < 2:
            raise ConfigError(f"a check at batch {c.batch} needs at least {2 * c.batch} prompts: raise --count")
        value, wide = float(tokens.sum() / seconds.sum()), margin([influence(tokens, seconds)])
        low, high = value * math.exp(-wide), value * math.exp(wide)
        per_call, step = float(tokens.sum() / steps.sum()), c.batch * float(seconds.sum() / steps.sum())
        mine = (c.tokens_per_call, per_call, sum(c.seconds.values()), step)
        out.append(Checked(c.name, c.batch, c.tokens_per_second, value, low, high, *mine))
    return out


def outcome(c: Checked, within: float) -> str:
    """within: the error is at most that; off: it is more, and the whole interval says so; open: more, perhaps by chance."""
    if abs(c.error) <= within:
        return "within"
    return "open" if c.low * (1 - within) <= c.predicted <= c.high * (1 + within) else "off"


@dataclass(frozen=True, slots=True)
class FirstChoice:
    """Was the plan's first choice of a batch size the measured best? ratio: its measured speed over the best one's, paired."""

    batch: int
    choice: str
    best: str
    ratio: Ratio

    @property
    def verdict(self) -> str:
        return "the measured best" if self.choice == self.best else "tied with it" if self.ratio.high >= 1 else "slower"


def first_choices(choices: Sequence[PlanEntry], timings: Mapping[Key, StepTiming]) -> list[FirstChoice]:
    """Per batch size. The best of many measured ones is flattered by chance: "slower" is rather said too often than too rarely."""
    out = []
    for batch in sorted({c.batch for c in choices}):
        mine = [c for c in choices if c.batch == batch]
        sums = {c.name: _sums(timings[("none" if c.plain else c.draft, c.length, batch)].checked) for c in mine}
        best = max(sums, key=lambda name: sums[name][0].sum() / sums[name][1].sum())
        first = mine[0].name
        out.append(FirstChoice(batch, first, best, paired_ratio(*sums[first][:2], *sums[best][:2])))
    return out


def _sums(records: Sequence[Record]) -> tuple[Array, Array, Array]:
    """[groups] tokens, seconds and sequence-steps, in the order of the groups."""
    rows = sorted(records, key=lambda r: r.group)
    numbers = [[r.tokens, r.seconds, r.counts.steps] for r in rows]
    tokens, seconds, steps = np.array(numbers, dtype=float).reshape(-1, 3).T
    return tokens, seconds, steps
