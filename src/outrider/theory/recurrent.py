"""Targets whose state cannot be cut: how many tokens are read again after rejections, and what that leaves of a speed-up.

Such a target goes back to a snapshot from before the draft, and reads the anchor and the accepted drafts again in the same
forward as the next draft. If that is rejected too, all of it is read again with the one after: a draft that is kept whole
clears what has gathered, and so does a forward of its own for it, which is made when more than `merged` tokens have gathered.

In closed form. A draft of n tokens is kept whole with probability P = a_1 a_2 ... a_n, and leaves j tokens (the anchor and j - 1
accepted drafts) with probability f_j = a_1 ... a_(j-1) (1 - a_j). Without a limit what has gathered before a call, G, is 0 with
probability P and otherwise what it was and j more, so that E[G] = (1 - P) E[G] + sum of j f_j, or

    E[G] = sum of j f_j / P = (E[tokens per call] - (n + 1) P) / P

which is the replay of one call times the mean number of calls, 1 / P, until a draft is kept whole: short drafts of high acceptance
read little again, and E[G] grows without bound where a draft is seldom kept whole. With the limit M, calls fall into rounds: a
round begins with nothing to read again in the call's own forward, and ends with a draft that is kept whole or with more than M
gathered. u_0 = 1 and u_g = sum of f_j u_(g-j) are the mean numbers of calls of a round that find g <= M tokens, v_g = the same sum
over g - j <= M the probability that it ends with g > M (the renewal equation, Feller 1968, volume 1, section XIII.3). Rounds are
alike, so

    rows = (sum of g u_g + sum of g v_g) / sum of u_g,    forwards = sum of v_g / sum of u_g

per call. Both forms agree with the simulated rule (`tests/theory/test_reread.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

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


def _left(acceptance: npt.ArrayLike) -> tuple[list[float], float]:
    """f_1 .. f_n and P of the module."""
    a = real("acceptance", acceptance, ndim=1)
    for i, value in enumerate(a):
        fraction(f"acceptance[{i}]", value)
    reached = [1.0, *np.cumprod(a).tolist()]
    return [up - down for up, down in pairwise(reached)], reached[-1]


def gathered(acceptance: npt.ArrayLike) -> float:
    """E[G]: tokens that a call reads again where nothing but a draft that is kept whole clears them; infinite if none ever is.

    >>> round(gathered([0.8] * 4), 4)
    3.207
    """
    left, whole = _left(acceptance)
    again = sum(j * f for j, f in enumerate(left, 1))
    return again / whole if whole > 0 else float("inf") if again else 0.0


def reread(acceptance: npt.ArrayLike, merged: int = MERGED) -> Reread:
    """What rejections cost in the long run.

    Args:
        acceptance: [length] probability that the draft at each depth is accepted, given that the ones before were.
        merged: see the module.

    >>> reread([0.0]).rows  # one token more after every call, from 1 to 17, when it gets a forward of its own
    9.0
    >>> round(reread([0.8] * 4).rows, 4), round(reread([0.8] * 4, merged=1000).rows, 4)
    (3.0096, 3.207)
    """
    left, _ = _left(acceptance)
    most = positive_int("merged", merged)
    found = [1.0]  # u_g, then v_g
    for g in range(1, most + len(left) + 1):
        found.append(sum(f * found[g - j] for j, f in enumerate(left, 1) if 0 <= g - j <= most))
    calls = sum(found[: most + 1])
    return Reread(sum(g * share for g, share in enumerate(found)) / calls, sum(found[most + 1 :]) / calls)


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
    2.513
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
