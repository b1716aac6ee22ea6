"""Targets whose state cannot be cut: how many tokens are read again after rejections, and what that leaves of a speed-up.

Such a target goes back to a snapshot from before the draft, and reads the anchor and the accepted drafts again in the same forward as
the next draft. If that is rejected too, all of it is read again with the one after: a draft that is kept whole clears what has
gathered, and so does a forward of its own for it, which is made when more than `merged` tokens have gathered. What has gathered
before a call is a Markov chain; its stationary distribution gives the cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory.checks import fraction, number, positive_int, real
from outrider.theory.speedup import VerifyCost, call_cost, tokens_per_call_by_position

MERGED = 16
"""Tokens that are read again together with a draft, at most."""


@dataclass(frozen=True, slots=True)
class Reread:
    """Per call of the target: tokens read again, and further forwards made for them alone. Both are 0 if nothing is rejected."""

    rows: float
    forwards: float


def reread(acceptance: npt.ArrayLike, merged: int = MERGED) -> Reread:
    """What rejections cost in the long run.

    Args:
        acceptance: [length] probability that the draft at each depth is accepted, given that the ones before were.
        merged: see the module.

    >>> reread([0.0]).rows  # one token more after every call, from 1 to 17, when it gets a forward of its own
    9.0
    >>> round(reread([0.8] * 4).rows, 4)
    3.6189
    """
    a = real("acceptance", acceptance, ndim=1)
    for i, value in enumerate(a):
        fraction(f"acceptance[{i}]", value)
    most, length = positive_int("merged", merged), len(a)
    reached = np.concatenate([[1.0], np.cumprod(a)])  # [length + 1] the first d drafts are accepted
    lost = reached[:-1] - reached[1:]  # [length] exactly d of them, and then a rejection
    if not lost.any():
        return Reread(0.0, 0.0)
    states = most + length + 1
    step = np.zeros((states, states))
    for gathered in range(states):
        kept = gathered if gathered <= most else 0
        step[gathered, 0] += reached[-1]
        for d, chance in enumerate(lost):
            step[gathered, kept + d + 1] += chance
    system = np.vstack([step.T - np.eye(states), np.ones(states)])
    share = np.linalg.lstsq(system, np.append(np.zeros(states), 1.0), rcond=None)[0]
    return Reread(float(share @ np.arange(states)), float(share[most + 1 :].sum()))


def speedup(
    acceptance: npt.ArrayLike,
    draft_cost: float,
    verify_cost: VerifyCost = 1.0,
    row_cost: float = 0.0,
    merged: int = MERGED,
) -> float:
    """Speed-up over plain decoding: tokens per call / (draft_cost * length + verify_cost + row_cost * rows + forwards).

    Costs in plain forwards. row_cost: of one further row in a forward.

    >>> round(speedup([0.8] * 4, 0.05, 1.1, 0.01), 3)
    2.495
    """
    a = real("acceptance", acceptance, ndim=1)
    again = reread(a, merged)
    cost = call_cost(len(a), draft_cost, verify_cost) + number("row_cost", row_cost, 0.0) * again.rows + again.forwards
    return tokens_per_call_by_position(a) / cost


def best_length(
    alpha: float, longest: int, draft_cost: float, row_cost: float, merged: int = MERGED
) -> tuple[int, float]:
    """The draft length 0 .. `longest` of the highest speed-up, and that speed-up, for independent acceptance `alpha`.

    A forward of n rows costs 1 + row_cost * (n - 1). Length 0 is plain decoding: it is best where rejections cost more than drafts
    save.

    >>> best_length(0.8, 8, 0.02, 0.01)[0] < best_length(0.8, 8, 0.02, 0.0)[0]
    True
    """
    found = [
        (speedup([alpha] * n, draft_cost, 1.0 + row_cost * n, row_cost, merged) if n else 1.0, -n)
        for n in range(positive_int("longest", longest, low=0) + 1)
    ]
    best, n = max(found)
    return -n, best
