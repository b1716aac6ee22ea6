"""Ratios of arms that were measured side by side, and the tables made of them.

The speed of a shared machine drifts by more than the differences of interest, so nothing here compares two medians: a
ratio is formed in every round, between arms that ran within a minute of each other, and summarised over rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Speeds = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median over rounds of a per-round ratio, its 95% bootstrap interval, and the settings chosen most often."""

    value: float
    low: float
    high: float
    rounds: int
    ours: str
    theirs: str

    def answer(self, goal: float | None) -> str:
        """Whether the interval lies above the goal (yes), below it (no), or over it (open)."""
        if goal is None:
            return ""
        return "yes" if self.low >= goal else "no" if self.high < goal else "open"


def speeds(samples: Sequence[Mapping[str, float] | None], clock: str = "seconds") -> NDArray[np.float64]:
    """Tokens per second by round; NaN where a round is missing. clock: `cpu` for processor time."""
    return np.array([s["tokens"] / s[clock] if s else np.nan for s in samples])


def chosen(arms: Speeds) -> tuple[NDArray[np.float64], str]:
    """Speed by round of the best arm, where the best of round r is chosen by the median of all *other* rounds.

    Choosing and measuring on the same rounds would flatter whoever has more settings. Also returns the usual choice.
    """
    names, table = list(arms), np.stack(list(arms.values()))
    rounds = table.shape[1]
    picks = []
    for r in range(rounds):
        others = np.delete(table, r, axis=1) if rounds > 1 else table
        seen = ~np.isnan(others).all(axis=1)
        medians = np.full(len(names), -np.inf)
        medians[seen] = np.nanmedian(others[seen], axis=1)
        picks.append(int(medians.argmax()))
    usual = names[max(set(picks), key=picks.count)]
    return table[picks, np.arange(rounds)], usual


def ratio(ours: Speeds, theirs: Speeds, *, seed: int = 0, draws: int = 4000) -> Ratio | None:
    """The best of `ours` over the best of `theirs`, paired by round; None if they share no round."""
    if not ours or not theirs:
        return None
    (mine, my_name), (other, other_name) = chosen(ours), chosen(theirs)
    values = (mine / other)[~np.isnan(mine / other)]
    if not len(values):
        return None
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(values)), float(low), float(high), len(values), my_name, other_name)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def arm_row(name: str, samples: Sequence[Mapping[str, float] | None], clock: str = "seconds") -> list[str]:
    """Name, median tokens per second, 10th and 90th percentile, tokens per target call and sequence, rounds."""
    values = speeds(samples, clock)
    values = values[~np.isnan(values)]
    if not len(values):
        return [name, "failed", "", "", "0"]
    counted = [s for s in samples if s and "calls" in s]
    calls = sum(s["calls"] for s in counted)
    length = f"{sum(s['tokens'] for s in counted) / calls:.2f}" if calls else ""
    low, middle, high = (f"{x:.0f}" if x >= 10 else f"{x:.2f}" for x in np.quantile(values, [0.1, 0.5, 0.9]))
    return [name, middle, f"{low} to {high}", length, str(len(values))]


def claim_row(text: str, scenario: str, goal: float | None, found: Ratio | None) -> list[str]:
    """One claim: the ratio, its interval, the goal, the answer, the settings."""
    wanted = "" if goal is None else f"{goal:g}"
    if found is None:
        return [text, scenario, "not measured", "", wanted, "", ""]
    interval = f"{found.low:.2f} to {found.high:.2f}"
    settings = f"{found.ours} / {found.theirs}"
    return [text, scenario, f"{found.value:.2f}", interval, wanted, found.answer(goal), settings]


def describe_machine(machine: Mapping[str, Any]) -> str:
    """One line about where it ran."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())
