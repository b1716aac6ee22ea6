"""Draft lengths of several sequences under a shared number of rows: which rows emit the most tokens, and how many of them pay.

Let S_i(d) be the probability that the first d draft tokens of sequence i are all accepted. A step in which it drafts l_i tokens
emits 1 + S_i(1) + ... + S_i(l_i) tokens of it, and the d-th row gains S_i(d), which never rises with d. For gains that never
rise, taking the largest remaining gain again and again is the best use of any number of rows (Fox, "Discrete optimization via
marginal analysis", Management Science 13, 1966), and the d-th row of a sequence is never taken before the one above it. Where a
step's time depends only on its rows and on its deepest draft, the best lengths of all are therefore such a choice too: the one of
the best ratio of tokens to time over all numbers of rows and all limits of the depth (renewal reward; `theory.stopping` has the
same argument for one sequence, where the answer is a threshold).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory.checks import real

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Share:
    """Draft lengths, and what they bring. lengths: of each sequence. gain: expected accepted tokens of a step. rows: expected."""

    lengths: tuple[int, ...]
    gain: float
    rows: float


class SharedRows:
    """The greedy choice of rows for sequences of known survival.

    survival: [B, D] probabilities S_i(d), d = 1 .. D, given that the drafter proposes; they never rise along a row.
    use: [B] rows that a level of a draft takes on average, > 0; None: 1 each. Below 1 the drafter often has nothing to propose,
    and such a row costs and gains less, in proportion; above 1 the drafts are trees, whose rows share the gain of a level. Rows
    are taken by gain per row, which is the best choice where all are equal, and best but for the last row otherwise.

    >>> SharedRows([[0.9, 0.8, 0.7], [0.3, 0.1, 0.0]]).share(3.0)
    Share(lengths=(3, 0), gain=2.4000000000000004, rows=3.0)
    """

    def __init__(self, survival: npt.ArrayLike, use: npt.ArrayLike | None = None) -> None:
        chances = real("survival", survival)
        self.survival: Array = np.minimum.accumulate(chances, axis=1)
        sequences, self.depth = self.survival.shape
        self.use: Array = np.ones(sequences) if use is None else np.asarray(use, float)
        # [D, B]: of two equal rows the less deep one comes first
        gain = (self.survival * np.minimum(self.use, 1.0)[:, None]).T
        order = np.argsort(-(gain / self.use).ravel(), kind="stable")
        self._depth, self._owner = np.divmod(order, max(sequences, 1))
        # [D + 1, B D]: whether a row gains anything, where no draft is longer than 0, 1, ... D
        self._within = (self._depth < np.arange(self.depth + 1)[:, None]) & (gain.ravel()[order] > 0.0)
        self._rows = np.cumsum(self._within * self.use[self._owner], axis=1)
        self._sums = np.cumsum(self._within * gain.ravel()[order], axis=1)

    def gains(self, rows: float) -> Array:
        """[D + 1] expected accepted tokens of the best use of `rows` rows, where no draft is longer than 0, 1, ... D."""
        taken = (self._rows <= rows + 1e-9).sum(axis=1)  # how many of the sorted rows are looked at
        sums = np.pad(self._sums, ((0, 0), (1, 0)))
        return np.take_along_axis(sums, taken[:, None], axis=1)[:, 0]

    def share(self, rows: float, deepest: int | None = None) -> Share:
        """The best use of at most `rows` expected rows, with no draft longer than `deepest`."""
        limit = self.depth if deepest is None else deepest
        taken = int(np.searchsorted(self._rows[limit], rows + 1e-9, side="right"))
        owners = self._owner[:taken][self._within[limit, :taken]]
        lengths = tuple(np.bincount(owners, minlength=len(self.use)).tolist())
        gain, used = (float(sums[limit, taken - 1]) if taken else 0.0 for sums in (self._sums, self._rows))
        return Share(lengths, gain, used)

    def gain(self, sequence: int, length: int) -> float:
        """Expected accepted tokens of a step in which this sequence drafts `length` tokens."""
        return float(min(self.use[sequence], 1.0) * self.survival[sequence, :length].sum())

    def best(self, seconds: Callable[[float, int], float]) -> Share:
        """The lengths of the most tokens per second, when a step of so many drafted rows and so deep drafts takes `seconds`."""
        sequences = len(self.use)
        found, rate = Share((0,) * sequences, 0.0, 0.0), sequences / seconds(0.0, 0)
        for deepest in range(1, self.depth + 1):
            for rows in np.unique(self._rows[deepest]):
                mine = self.share(float(rows), deepest)
                speed = (sequences + mine.gain) / seconds(mine.rows, max(mine.lengths, default=0))
                if speed > rate:
                    found, rate = mine, speed
        return found
