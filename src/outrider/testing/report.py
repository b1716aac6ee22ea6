"""What a check says: the contracts that held, or the first that did not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

from outrider.errors import CapabilityError

FALSE_ALARM = 1e-9
"""Probability that a statistical check complains of a part that keeps its contract."""
LEAST = 5.0
"""Expected draws of a cell of a chi-square; smaller cells are taken together."""


class BrokenContract(CapabilityError):
    """A drafter or a rule breaks a contract: its class, the contract, what was seen, and what to do."""


@dataclass(frozen=True, slots=True)
class Report:
    """A part that keeps its contracts. checked: what was looked at, a sentence each. left_out: what could not be, and why."""

    name: str
    checked: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.checked)} contracts hold", *(f"  held: {c}" for c in self.checked)]
        return "\n".join([*lines, *(f"  not checked: {c}" for c in self.left_out)])


def unlikely(observed: np.ndarray, expected: np.ndarray) -> float | None:
    """Pearson's chi-square of counts, where it is above what chance exceeds with FALSE_ALARM; else None."""
    few = expected < LEAST
    seen = np.append(observed[~few], observed[few].sum())
    due = np.append(expected[~few], expected[few].sum())
    if due[-1] < LEAST:
        if due[-1] == 0 and seen[-1]:
            return math.inf
        seen, due = seen[:-1], due[:-1]
    value = float(((seen - due) ** 2 / due).sum())
    return value if len(due) > 1 and value > chi2.isf(FALSE_ALARM, len(due) - 1) else None


def margin(spread: float) -> float:
    """How far a martingale with steps in [-1, 1] and this predictable variance may be from zero (Freedman 1975)."""
    log = math.log(2 / FALSE_ALARM)
    return log / 3 + math.sqrt((log / 3) ** 2 + 2 * spread * log)
