"""Seconds of a pass by rows and by context: what "W + B k S" bytes a step become on a machine whose passes were timed.

A pass of b sequences with n rows each, each of which sees S cached tokens, takes

    T(b, n, S) = pass + row b n + b S (token + pair (n - 1))

`pass` reads the weights (W bytes), `token` the keys and values of a token once for all rows of its sequence (k bytes), `row` and
`pair` are the arithmetic of a row and of a further row that meets a cached token. Four constants of a model and a machine, found by
least squares of relative errors from a few timed passes. A step that drafts L tokens over a view of K cached ones (Chen et al.,
"MagicDec", ICLR 2025) takes L T(b, 1, K) + T(b, L + 1, S) and what the host adds: to every step, and to every drafted level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from outrider.theory.checks import fraction, number, positive_int
from outrider.theory.speedup import tokens_per_call

FURTHER_ROW = 0.08
"""What a further row of a sequence adds to the time of a cached token, as a share of reading it once: measured for 2 to 8 rows at
4,096 to 16,384 tokens (docs/long_contexts.md). For predictions where nothing was timed."""


@dataclass(frozen=True, slots=True)
class TimedPass:
    """A timed pass: sequences (>= 1), rows of each (>= 1), cached tokens that each sees (>= 0), seconds (> 0)."""

    sequences: int
    rows: int
    cached: float
    seconds: float


@dataclass(frozen=True, slots=True)
class ContextTimes:
    """Constants of the model above, all in seconds and >= 0. `step`: of the host in a step; `level`: in a drafted level of one."""

    whole: float
    row: float
    token: float
    pair: float
    step: float = 0.0
    level: float = 0.0

    @classmethod
    def fit(cls, passes: Iterable[TimedPass]) -> ContextTimes:
        """The constants that fit these passes best. Raises ValueError for fewer than four, which cannot tell four constants.

        >>> times = ContextTimes(0.002, 1e-5, 1e-6, 1e-7)
        >>> passes = [TimedPass(b, n, s, times.seconds(b, n, s)) for b in (1, 4) for n in (1, 6) for s in (512, 8192)]
        >>> abs(ContextTimes.fit(passes).seconds(2, 3, 4096) / times.seconds(2, 3, 4096) - 1) < 1e-6
        True
        """
        from scipy.optimize import nnls  # 40 MB that whoever only predicts does not need

        points = list(passes)
        if len(points) < 4:
            raise ValueError(f"four constants need four timed passes, got {len(points)}")
        table = np.array(
            [[1.0, p.sequences * p.rows, p.sequences * p.cached, p.sequences * p.cached * (p.rows - 1)] for p in points]
        )
        seconds = np.array([number("seconds", p.seconds, 0.0) for p in points])
        if not (seconds > 0).all():
            raise ValueError("a pass takes time: give seconds above 0")
        relative = table / seconds[:, None]
        scale = relative.max(0)  # columns differ by many orders of magnitude
        scale[scale == 0] = 1.0
        found, _ = nnls(relative / scale, np.ones(len(points)))
        return cls(*(float(x) for x in found / scale))

    def with_host(self, step: float, level: float) -> ContextTimes:
        """The same with the host's seconds of a step and of a drafted level; what is below 0 counts as 0."""
        return replace(self, step=max(0.0, step), level=max(0.0, level))

    def seconds(self, sequences: int, rows: int, cached: float) -> float:
        """Of a pass, without the host."""
        attention = sequences * cached * (self.token + self.pair * (rows - 1))
        return self.whole + self.row * sequences * rows + attention

    def plain(self, sequences: int, context: float) -> float:
        """Of a step of plain decoding."""
        return self.step + self.seconds(sequences, 1, context)

    def drafted(
        self, sequences: int, context: float, view: float, length: int, by: ContextTimes | None = None
    ) -> float:
        """Of a step with drafts of `length` tokens over `view` cached ones (infinite: all); by: times of the model that drafts."""
        seen = min(view, context)
        drafting = length * ((self if by is None else by).seconds(sequences, 1, seen) + self.level)
        return self.step + drafting + self.seconds(sequences, length + 1, context)

    def gain(
        self,
        sequences: int,
        context: float,
        view: float,
        length: int,
        acceptance: float,
        by: ContextTimes | None = None,
    ) -> float:
        """Tokens per second over those of plain decoding, with independent acceptances."""
        positive_int("length", length)
        tokens = tokens_per_call(fraction("acceptance", acceptance), length)
        return tokens * self.plain(sequences, context) / self.drafted(sequences, context, view, length, by)

    def best(
        self,
        sequences: int,
        context: float,
        view: float,
        acceptance: float,
        lengths: Sequence[int] = tuple(range(1, 17)),
        by: ContextTimes | None = None,
    ) -> tuple[int, float]:
        """The length of the largest gain, and the gain; (0, 1) where no length is faster than plain decoding.

        by: times of the model that drafts; None: the target itself, over a view, and not where that would be everything.
        """
        drafts = by is not None or context > view
        found = {n: self.gain(sequences, context, view, n, acceptance, by) for n in lengths if n and drafts}
        length = max(found, key=lambda n: found[n], default=0)
        return (length, found[length]) if length and found[length] > 1 else (0, 1.0)

    def overtakes(self, sequences: int, view: float, acceptance: float, by: ContextTimes, end: int) -> int | None:
        """The least context from which the target over a view gains, and more than a draft model that sees all tokens and drafts
        nothing from `end` tokens on, at the same acceptance; None if it is not below 2^24.

        The gain over a view rises with the context, and so does its ratio to that of a model whose cache grows.
        """

        def better(context: int) -> bool:
            other = self.best(sequences, context, math.inf, acceptance, by=by)[1] if context < end else 1.0
            return self.best(sequences, context, view, acceptance)[1] > other

        return least_number(better, math.floor(view))

    def crossing(self, sequences: int, view: float, acceptance: float) -> int | None:
        """The least context from which drafting over a view is faster than plain decoding; None if it is not below 2^24."""
        return least_number(lambda context: self.best(sequences, context, view, acceptance)[0] > 0, math.floor(view))


def least_number(holds: Callable[[int], bool], low: int) -> int | None:
    """The least number above `low` from which on something holds; None if it is not below 2^24.

    >>> least_number(lambda tokens: tokens >= 700, 512), least_number(lambda tokens: False, 512)
    (700, None)
    """
    high = 1 << 24
    if not holds(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
