"""Seconds of a pass by its rows, learnt from whatever steps come by: what a controller knows of a load before it has measured it.

Every step tells something, also one in which prompts are read and sequences come and go: how long a pass with that many rows took.
Rows are grouped like loads, each group keeps a fading mean, and between groups the time is a line (a pass costs a constant while
it is bound by memory and grows in proportion to its rows once it is bound by arithmetic; Williams et al., CACM 2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

FADE, MACHINE_SPEED_SMOOTHING = 1.0 / 64.0, 1.0 / 8.0
"""Weight of the newest step in its group's mean, and in what all groups have in common: how fast the machine is at the moment."""
ENOUGH = 4
"""Steps a group must have seen: the first ones of a process pay for what is prepared once."""
EXTRAPOLATION_FACTOR = 1.5
"""How far beyond the groups seen so far, as a factor of rows, a time is foretold."""
OUTLIER_FACTOR = 3.0
"""A step counts as at most this many times what was foretold for it."""


def load_class(number: int) -> int:
    """Numbers that share measurements: 1, 2, 3, 4 by themselves, then 6, 8, 12, 16, 24, ... as upper ends."""
    if number <= 4:
        return number
    top = 4
    while True:
        for upper in (top * 3 // 2, top * 2):
            if number <= upper:
                return upper
        top *= 2


def row_class(rows: int) -> int:
    """Numbers of rows that share measurements: four groups to a doubling, since a draft more or less must show beside a prompt."""
    return round(4.0 * math.log2(rows))


@dataclass(slots=True)
class _Group:
    rows: float
    seconds: float
    steps: int = 1


@dataclass(slots=True)
class RowTimes:
    """Fading means of the seconds of passes, by class of rows."""

    _groups: dict[int, _Group] = field(default_factory=dict)

    def learn(self, rows: int, seconds: float) -> None:
        """One pass of `rows` >= 1 rows took so many seconds."""
        predicted = self.seconds(rows)
        if predicted is not None and predicted > 0:
            seconds = min(max(seconds, predicted / OUTLIER_FACTOR), predicted * OUTLIER_FACTOR)
            weather = (seconds / predicted) ** MACHINE_SPEED_SMOOTHING
            for group in self._groups.values():
                group.seconds *= weather
        group = self._groups.setdefault(row_class(rows), _Group(rows, seconds, 0))
        group.steps += 1
        weight = max(FADE, 1.0 / group.steps)
        group.rows += weight * (rows - group.rows)
        group.seconds += weight * (seconds - group.seconds)

    def seconds(self, rows: float) -> float | None:
        """What a pass of `rows` rows takes; None where nothing near has been seen. More rows are never said to take less.

        Below all that was seen the time falls in proportion, the most it can: what a wider pass is held against must not look
        slow for want of evidence.
        """
        seen = sorted((g.rows, g.seconds) for g in self._groups.values() if g.steps >= ENOUGH)
        if not seen or not seen[0][0] / EXTRAPOLATION_FACTOR <= rows <= seen[-1][0] * EXTRAPOLATION_FACTOR:
            return None
        highest = 0.0
        points = [(at, highest := max(highest, seconds)) for at, seconds in seen]
        if rows <= points[0][0]:
            return points[0][1] * rows / points[0][0]
        for (x0, y0), (x1, y1) in pairwise(points):
            if rows <= x1:
                return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)
        (x0, y0), (x1, y1) = points[-2] if len(points) > 1 else (0.0, 0.0), points[-1]
        return y1 + (y1 - y0) / (x1 - x0) * (rows - x1)
