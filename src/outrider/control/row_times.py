"""Seconds of a pass by its number of rows, learnt from all steps: the estimate for a load that was not measured yet.

Every step gives a measurement, even one with prefill and changing sequences: how long a pass with that many rows took. Rows are
grouped like loads, each group keeps a fading mean, and between groups the time is interpolated linearly (a pass takes constant
time while it is bound by memory, and time proportional to its rows when it is bound by arithmetic; Williams et al., CACM 2009).
For a mixture of experts it is linear in what the rows read: the first rows add most, because later ones choose experts that are
read already (`theory.experts`). Besides, a pass reads the keys and values of what is cached: the seconds of a cached token are the
common slope of all groups, each about its own mean, so that a group that was last seen at short context tells what its rows cost at
a long one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

FADE, MACHINE_SPEED_SMOOTHING = 1.0 / 64.0, 1.0 / 8.0
"""Weight of the newest step in its group's mean, and in the common factor of all groups: the present speed of the machine."""
ENOUGH = 4
"""Steps a group needs: the first steps of a process include one-time preparations."""
EXTRAPOLATION_FACTOR = 1.5
"""How far beyond the measured groups, as a factor of rows, times are predicted."""
OUTLIER_FACTOR = 3.0
"""A step counts as at most this many times its predicted time."""
CERTAIN = 3.0
"""Standard errors above 0 from which a slope is believed."""
LEAST = 0.25
"""A group's time is never corrected below this share of what was measured."""


def load_class(number: int) -> int:
    """The load class of a number of sequences, by its upper end: 1, 2, 3, 4, then 6, 8, 12, 16, 24, ..."""
    if number <= 4:
        return number
    top = 4
    while True:
        for upper in (top * 3 // 2, top * 2):
            if number <= upper:
                return upper
        top *= 2


def row_class(rows: int) -> int:
    """The class of a number of rows: four classes per doubling, fine enough to show one draft more or less beside a prompt."""
    return round(4.0 * math.log2(rows))


def context_class(tokens: float) -> int:
    """The class of a number of cached tokens of a sequence: 0 below 1,024, where they hardly count, then one for each doubling."""
    return max(0, math.floor(math.log2(max(tokens, 1.0))) - 9)


@dataclass(slots=True)
class _Group:
    """seconds: at the machine's present speed. seen, raw: means of what was cached, and of the seconds as they were."""

    rows: float
    seconds: float
    steps: int = 1
    seen: float = 0.0
    raw: float = 0.0


@dataclass(slots=True)
class Slope:
    """Seconds of a cached token: a fading regression of the deviations of steps from their groups' means."""

    across: float = 0.0
    both: float = 0.0
    along: float = 0.0
    steps: float = 0.0

    def learn(self, cached: float, seconds: float) -> None:
        """Record how far a step was from its group's means."""
        fade = 1.0 - FADE / 4.0
        self.across = fade * self.across + cached * cached
        self.both = fade * self.both + cached * seconds
        self.along = fade * self.along + seconds * seconds
        self.steps = fade * self.steps + 1.0

    @property
    def value(self) -> float:
        """The slope, 0 while noise could explain it."""
        if self.across <= 0.0 or self.both <= 0.0 or self.steps < 2 * ENOUGH:
            return 0.0
        slope = self.both / self.across
        left = max(0.0, self.along - slope * self.both) / (self.steps - 1.0)
        return slope if slope * slope * self.across >= CERTAIN**2 * left else 0.0


@dataclass(slots=True)
class RowTimes:
    """Fading means of the seconds of passes, by class of rows.

    work: what so many rows read, relative to one row, never decreasing; None if times are linear in rows.
    """

    work: Callable[[float], float] | None = None
    _groups: dict[int, _Group] = field(default_factory=dict)
    _slope: Slope = field(default_factory=Slope)

    def learn(self, rows: int, seconds: float, cached: float = 0.0) -> None:
        """Record that a pass of `rows` >= 1 rows took `seconds` over `cached` tokens."""
        predicted = self.seconds(rows, cached)
        if predicted is not None and predicted > 0:
            seconds = min(max(seconds, predicted / OUTLIER_FACTOR), predicted * OUTLIER_FACTOR)
            speed_change = (seconds / predicted) ** MACHINE_SPEED_SMOOTHING
            for group in self._groups.values():
                group.seconds *= speed_change
        group = self._groups.setdefault(row_class(rows), _Group(rows, seconds, 0))
        group.steps += 1
        if group.steps > ENOUGH:
            self._slope.learn(cached - group.seen, seconds - group.raw)
        weight = max(FADE, 1.0 / group.steps)
        group.rows += weight * (rows - group.rows)
        group.seconds += weight * (seconds - group.seconds)
        group.seen += weight * (cached - group.seen)
        group.raw += weight * (seconds - group.raw)

    def seconds(self, rows: float, cached: float | None = None) -> float | None:
        """Predicted seconds of a pass of `rows` rows over `cached` tokens (None: as many as each group had); None if nothing near
        was measured. Never decreasing in rows.

        Below the smallest measured group the time is proportional to the rows, the lowest it can be: the baseline of a comparison
        must not look slow for lack of measurements.
        """
        slope = 0.0 if cached is None else self._slope.value
        seen = sorted(
            (g.rows, g.seconds if not slope else max(LEAST * g.seconds, g.seconds + slope * ((cached or 0.0) - g.seen)))
            for g in self._groups.values()
            if g.steps >= ENOUGH
        )
        if not seen or not seen[0][0] / EXTRAPOLATION_FACTOR <= rows <= seen[-1][0] * EXTRAPOLATION_FACTOR:
            return None
        highest = 0.0
        points = [(at, highest := max(highest, seconds)) for at, seconds in seen]
        if rows <= points[0][0]:
            return points[0][1] * rows / points[0][0]
        for (x0, y0), (x1, y1) in pairwise(points):
            if rows <= x1:
                return y0 + (y1 - y0) * self._share(x0, rows, x1)
        (x0, y0), (x1, y1) = points[-2] if len(points) > 1 else (0.0, 0.0), points[-1]
        return y1 + (y1 - y0) * (self._share(x0, rows, x1) - 1.0)

    def _share(self, first: float, rows: float, last: float) -> float:
        """How far `rows` is from the work of `first` rows to that of `last`; above 1 behind it."""
        a, b, c = (first, rows, last) if self.work is None or first < 1.0 else map(self.work, (first, rows, last))
        return (b - a) / (c - a) if c > a else (rows - first) / (last - first)
