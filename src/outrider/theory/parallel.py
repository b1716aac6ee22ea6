"""Drafting in parallel with verification: what it can gain, and when it loses.

Units: one plain target forward takes time 1; `draft_cost` c is the time of one drafted token while the target runs, `verify_cost`
v(n) that of a target forward over n drafts and the anchor (`speedup.VerifyCost`). Every draft is accepted independently with
probability alpha. The sequential rate to compare with is `speedup.speedup`.

Three schemes. PEARL (Liu et al. 2024, arXiv 2408.11850): two processes, the drafter continues behind what is being verified and
assumes that it is kept; the bonus token is given up. Speculative speculation (2026, arXiv 2603.03251): the drafter prepares
drafts for predicted outcomes of the verification and uses the one that came true. DSI (Timor et al. 2024, arXiv 2405.14105):
enough target replicas that verification is never waited for: a bound. The closed forms are ours, from renewal arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from outrider.theory.checks import fraction, number, positive_int, real
from outrider.theory.speedup import VerifyCost, call_cost, tokens_per_call


def pearl_rate(alpha: float, length: int, draft_cost: float, verify_cost: VerifyCost = 1.0) -> float:
    """Tokens per target forward of PEARL with blocks of `length` >= 1 drafts.

    Between two rejections 1 / (1 - alpha) tokens are emitted, in one step that verifies the first draft alone while the block is
    made, and in alpha + alpha^length / (1 - alpha^length) steps that verify a block while the next one is made. (The first of
    those has one draft less; it is counted as a whole block.) A step takes as long as the slower of its two halves. Verifying a
    block takes `length` rows, one less than elsewhere: no bonus token is drawn.

    >>> round(pearl_rate(0.8, 5, 0.2), 3)
    2.186
    """
    a, n = fraction("alpha", alpha), positive_int("length", length)
    drafting = number("draft_cost", draft_cost, 0.0) * n
    first, block = max(drafting, 1.0), max(drafting, _verify(n - 1, verify_cost))
    if a == 1.0:
        return n / block
    return 1.0 / (1.0 - a) / (first + (a + a**n / (1.0 - a**n)) * block)


def speculated_rate(
    alpha: float,
    length: int,
    draft_cost: float,
    hit: float,
    verify_cost: VerifyCost = 1.0,
    *,
    branch_cost: float | None = None,
) -> float:
    """Tokens per target forward when drafts of `length` tokens are prepared for predicted outcomes of the verification.

    Args:
        hit: probability that the outcome was among the predicted ones: then the next draft is there at once.
        draft_cost: time of one token drafted after a miss, while the target waits.
        branch_cost: time of one token of all prepared drafts together, while the target verifies; None: draft_cost.

    A step takes max(v, length * branch_cost), and after a miss length * draft_cost more.

    >>> round(speculated_rate(0.8, 4, 0.1, 0.85), 3)
    3.171
    """
    h, n = fraction("hit", hit), positive_int("length", length)
    c = number("draft_cost", draft_cost, 0.0)
    ahead = c if branch_cost is None else number("branch_cost", branch_cost, 0.0)
    step = max(_verify(n, verify_cost), n * ahead)
    return tokens_per_call(alpha, n) / (step + (1.0 - h) * n * c)


def unlimited_rate(alpha: float, draft_cost: float) -> float:
    """Tokens per target forward with target replicas for every prefix (DSI): 1 / (alpha c + 1 - alpha). An accepted token
    costs its drafting, a rejected one a target forward. One drafter that drafts one continuation can do no better.

    >>> round(unlimited_rate(0.8, 0.2), 3)
    2.778
    """
    a, c = fraction("alpha", alpha), number("draft_cost", draft_cost, 0.0)
    if c > 1.0:
        raise ValueError(f"draft_cost must be at most 1, the target's own time, got {c}")
    time = a * c + 1.0 - a
    return float("inf") if time == 0.0 else 1.0 / time


def fan_out(alpha: float, length: int, total: float, decay: float) -> npt.NDArray[np.float64]:
    """(length + 1,): how many corrections to prepare a draft for after 0 .. length accepted tokens, `total` in all.

    With F candidates the true one is missed with probability proportional to F^-decay (decay > 0). Minimising the probability of
    a miss, the sum of P(k) F_k^-decay, gives F_k proportional to P(k)^(1 / (1 + decay)), where P(k) is the probability that
    exactly k tokens are accepted: (1 - alpha) alpha^k below `length`, alpha^length there.

    >>> fan_out(0.5, 1, 4.0, 1.0)
    array([2., 2.])
    """
    a, n = fraction("alpha", alpha), positive_int("length", length)
    power = number("decay", decay, 0.0)
    if power == 0.0:
        raise ValueError("decay must be positive: with 0 no candidate is worth anything")
    weight = _outcomes(a, n) ** (1.0 / (1.0 + power))
    return number("total", total, 0.0) * weight / weight.sum()


def miss_probability(alpha: float, counts: npt.ArrayLike, decay: float) -> float:
    """The probability of a miss when counts[k] >= 1 corrections are prepared after k accepted tokens, see `fan_out`.

    >>> miss_probability(0.5, [2, 2], 1.0)
    0.5
    """
    f = real("counts", counts, ndim=1)
    if len(f) < 2 or (f < 1).any():
        raise ValueError(f"counts must hold at least two numbers of at least 1, got {f}")
    return float(_outcomes(fraction("alpha", alpha), len(f) - 1) @ f ** -number("decay", decay, 0.0))


def shared_cores_rate(
    alpha: float,
    length: int,
    draft_cost: float,
    slower: float,
    verify_cost: VerifyCost = 1.0,
    draft_slower: float = 1.0,
) -> float:
    """`pearl_rate` when drafter and target share the cores of one machine, in tokens per target forward on *all* cores.

    Args:
        slower: time of a target forward on its share of the cores and of the memory's bandwidth, over that on all of them, >= 1.
        draft_slower: the same for a drafted token, >= 1.

    Two cores that share a memory bus which both are needed to fill have `slower` near 2, and lose; where one core fills it, 1.

    >>> round(shared_cores_rate(0.8, 4, 0.1, 2.0) / 2.401, 2)
    0.42
    """
    s, d = number("slower", slower, 1.0), number("draft_slower", draft_slower, 1.0)
    n = positive_int("length", length)
    return pearl_rate(alpha, n, draft_cost * d / s, _verify(n - 1, verify_cost)) / s


def best(rates: Sequence[float]) -> tuple[int, float]:
    """The best of the rates at lengths 1, 2, ...: (length, rate)."""
    if not rates:
        raise ValueError("rates must not be empty")
    at = int(np.argmax(rates))
    return at + 1, float(rates[at])


def _verify(length: int, verify_cost: VerifyCost) -> float:
    return call_cost(length, 0.0, verify_cost)


def _outcomes(alpha: float, length: int) -> npt.NDArray[np.float64]:
    """P(exactly k of `length` drafts are accepted), k = 0 .. length."""
    powers = alpha ** np.arange(length + 1)
    return np.append((1.0 - alpha) * powers[:-1], powers[-1]).astype(np.float64)
