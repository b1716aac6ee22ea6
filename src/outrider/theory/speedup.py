"""Tokens per target call and speed-up in closed form: what a draft of a given acceptance and cost is worth.

A call is one forward of the target over a draft of `length` tokens; it emits the accepted drafts and one token of the
target's own (the correction of a rejected draft, or the bonus behind a draft that was kept whole). Costs are in units of
one plain target forward: `draft_cost` per drafted token, `verify_cost` for the forward that scores length + 1 rows.

    speed-up = E[tokens per call] / (draft_cost * length + verify_cost + overhead)

With acceptance drawn independently with probability alpha this is Leviathan et al., "Fast Inference from Transformers via
Speculative Decoding", ICML 2023, Theorems 3.8 and 3.11 and equation (1) (their gamma is `length`, their c `draft_cost`).
For one token judged against its draft law alpha = sum min(p, q) = 1 - TV(p, q), p the target's law, q the draft's; for
greedy drafts it is p(argmax q).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory.checks import fraction, number, positive_int, real

VerifyCost = float | Sequence[float] | Callable[[int], float]
"""Cost of scoring `length` drafts: one number for all lengths, a list indexed by length (entry 0 is plain decoding's), or
a function of the length."""


def tokens_per_call(alpha: float, length: float, *, bonus: bool = True) -> float:
    """E[tokens per call] with independent acceptances: 1 + alpha + ... + alpha^length (Leviathan et al. 2023, equation 1).

    Args:
        alpha: probability that a judged draft is accepted, in [0, 1].
        length: drafted tokens, >= 0, or math.inf: then 1 / (1 - alpha), which is infinite at alpha = 1.
        bonus: whether a draft that is kept whole is followed by a token of the target; without it the last power is lost.

    >>> round(tokens_per_call(0.8, 4), 4)
    3.3616
    """
    a = fraction("alpha", alpha)
    if length == math.inf:
        return math.inf if a == 1.0 else 1.0 / (1.0 - a)
    terms = positive_int("length", int(length) if length == int(length) else length, low=0) + 1  # type: ignore[arg-type]
    if not bonus and terms > 1:
        terms -= 1
    # expm1 keeps the sum exact where 1 - alpha is tiny
    if a == 1.0:
        return float(terms)
    return 1.0 if a == 0.0 or terms == 1 else math.expm1(terms * math.log(a)) / (a - 1.0)


def tokens_per_call_by_position(acceptance: npt.ArrayLike) -> float:
    """E[tokens per call] when the draft at depth d is accepted with probability acceptance[d] given that the ones before were.

    1 + sum over d of the product of acceptance[0 .. d]: the survival function of the accepted length, summed. Exact
    whatever the dependence between depths, because the arguments are conditional probabilities.

    >>> round(tokens_per_call_by_position([0.8, 0.6]), 4)
    2.28
    """
    a = real("acceptance", acceptance, ndim=1)
    for i, value in enumerate(a):
        fraction(f"acceptance[{i}]", value)
    return float(1.0 + np.cumprod(a).sum())


def tokens_per_call_root(root: float, alpha: float, length: int) -> float:
    """E[tokens per call] when several drafts compete for the first position: 1 + root (1 - alpha^length) / (1 - alpha).

    Args:
        root: probability that one of them is accepted at the first position (1 - rho_M for recursive rejection among M
            independent drafts, Yin et al., NeurIPS 2024, Theorem 3).
        alpha: acceptance at every deeper position, where only the chosen draft is followed.
        length: drafted tokens of each, >= 0; 0 gives 1.

    >>> round(tokens_per_call_root(0.9, 0.8, 4), 4)
    3.6568
    """
    first, n = fraction("root", root), positive_int("length", length, low=0)
    return 1.0 if n == 0 else 1.0 + first * tokens_per_call(alpha, n - 1)


def tokens_per_call_tree(node: float, depth: float) -> float:
    """E[tokens per call] of a tree of `depth` levels in which one of a node's children is accepted with probability `node`.

    (1 - node^(depth + 1)) / (1 - node): a tree is a chain with the acceptance of a whole family of siblings.

    >>> round(tokens_per_call_tree(0.9, 3), 4)
    3.439
    """
    return tokens_per_call(fraction("node", node), depth)


def call_cost(length: int, draft_cost: float, verify_cost: VerifyCost = 1.0, overhead: float = 0.0) -> float:
    """Time of one call in target forwards: draft_cost * length + verify_cost(length) + overhead; 1 for length 0.

    Length 0 is plain decoding: it drafts nothing, verifies nothing and is the unit.

    Raises:
        ValueError: for negative costs, or a list of verification costs that does not reach `length`.

    >>> call_cost(4, 0.05, 1.1)
    1.3
    """
    n = positive_int("length", length, low=0)
    if n == 0:
        return 1.0
    return number("draft_cost", draft_cost, 0.0) * n + _verify(verify_cost, n) + number("overhead", overhead, 0.0)


def speedup(
    alpha: float, length: int, draft_cost: float, verify_cost: VerifyCost = 1.0, overhead: float = 0.0
) -> float:
    """Speed-up over plain decoding by wall clock: tokens_per_call(alpha, length) / call_cost(length, ...).

    With verify_cost = 1 and overhead = 0 this is Leviathan et al. 2023, Theorem 3.8.

    >>> round(speedup(0.8, 8, 0.05), 3)
    3.092
    """
    return tokens_per_call(alpha, length) / call_cost(length, draft_cost, verify_cost, overhead)


def wall_clock_speedup(
    tokens: float,
    length: int,
    target_seconds: float,
    draft_seconds: float,
    verify_seconds: float,
    overhead: float = 0.0,
) -> float:
    """Speed-up from measured times: tokens * target_seconds / (verify_seconds + length * draft_seconds + overhead).

    Args:
        tokens: E[tokens per call], >= 1, from any of the formulas here, a replay of logs, or an engine's counts.
        length: drafted tokens per call. target_seconds: one plain forward. draft_seconds: one draft forward.
        verify_seconds: one forward over length + 1 rows. overhead: everything else a call costs.

    >>> round(wall_clock_speedup(3.0, 4, 0.010, 0.001, 0.011), 3)
    2.0
    """
    n = positive_int("length", length, low=0)
    time = number("verify_seconds", verify_seconds, 0.0) + n * number("draft_seconds", draft_seconds, 0.0)
    time += number("overhead", overhead, 0.0)
    if time <= 0:
        raise ValueError(f"verify_seconds + length * draft_seconds + overhead must be positive, got {time:g}")
    return number("tokens", tokens, 1.0) * number("target_seconds", target_seconds, 0.0) / time


@dataclass(frozen=True, slots=True)
class BestLength:
    """The draft length with the largest speed-up; length 0 (speed-up 1) means: do not speculate."""

    length: int
    speedup: float

    @property
    def speculate(self) -> bool:
        return self.length > 0


def best_length(
    alpha: float, draft_cost: float, verify_cost: VerifyCost = 1.0, overhead: float = 0.0, *, longest: int = 64
) -> BestLength:
    """Scan the lengths 0 .. `longest` and return the best, the shorter of equals.

    >>> best_length(0.6, 0.1)
    BestLength(length=3, speedup=1.673846153846154)
    >>> best_length(0.3, 0.5).speculate
    False
    """
    n = positive_int("longest", longest)
    return best_of([tokens_per_call(alpha, g) for g in range(n + 1)], draft_cost, verify_cost, overhead)


def best_of(
    tokens: Sequence[float], draft_cost: float, verify_cost: VerifyCost = 1.0, overhead: float = 0.0
) -> BestLength:
    """The best length when tokens[g] is E[tokens per call] at length g (tokens[0] is 1): for measured or replayed lengths.

    >>> best_of([1.0, 1.8, 2.1], 0.1).length
    2
    """
    values = real("tokens", list(tokens), ndim=1)
    if not len(values) or values[0] != 1.0:
        raise ValueError(f"tokens must start with 1 (plain decoding), got {values[:1].tolist()}")
    best = BestLength(0, 1.0)
    for g in range(1, len(values)):
        found = float(values[g]) / call_cost(g, draft_cost, verify_cost, overhead)
        if found > best.speedup:
            best = BestLength(g, found)
    return best


def best_length_continuous(alpha: float, draft_cost: float) -> float:
    """The real length at which `speedup(alpha, ., draft_cost)` (verify_cost 1) is stationary: its maximum.

    Root g of -ln(alpha) alpha^(g+1) (1 + c g) = c (1 - alpha^(g+1)), c = draft_cost. The left side minus the right one
    decreases in g, so there is at most one root; 0 is returned when it would be negative.

    Raises:
        ValueError: unless alpha is in (0, 1) and draft_cost positive (otherwise the maximum is at 0 or at infinity).

    >>> round(best_length_continuous(0.8, 0.05), 2)
    7.86
    """
    a, c = number("alpha", alpha, 0.0, 1.0), number("draft_cost", draft_cost, 0.0)
    if not 0.0 < a < 1.0 or c == 0.0:
        raise ValueError(f"alpha must be in (0, 1) and draft_cost positive, got {alpha:g} and {draft_cost:g}")

    def slope(g: float) -> float:
        power = a ** (g + 1)
        return -math.log(a) * power * (1 + c * g) - c * (1 - power)

    high = 1.0
    while slope(high) > 0:
        high *= 2
    return 0.0 if slope(0.0) <= 0 else _root(slope, 0.0, high)


def break_even_acceptance(
    length: int, draft_cost: float, verify_cost: VerifyCost = 1.0, overhead: float = 0.0
) -> float:
    """The smallest alpha at which `length` drafts cost nothing: tokens_per_call(alpha, length) = call_cost(length, ...).

    0 when even rejected drafts cost nothing, math.inf when no acceptance is enough.

    >>> round(break_even_acceptance(1, 0.3, 1.1), 6)
    0.4
    """
    n = positive_int("length", length)
    cost = call_cost(n, draft_cost, verify_cost, overhead)
    if cost <= 1.0:
        return 0.0
    if cost > n + 1:
        return math.inf
    if cost == n + 1:
        return 1.0
    return _root(lambda a: tokens_per_call(a, n) - cost, 0.0, 1.0)


def operation_factor(alpha: float, length: int, operations_ratio: float) -> float:
    """Arithmetic per emitted token over that of plain decoding (Leviathan et al. 2023, Theorem 3.11).

    (1 - alpha) (length * operations_ratio + length + 1) / (1 - alpha^(length + 1)): speculation trades arithmetic for time,
    and this is the price where arithmetic is what is scarce (large batches).

    Args:
        operations_ratio: operations per token of the draft model over those of the target, >= 0.

    >>> round(operation_factor(0.8, 4, 0.05), 4)
    1.5469
    """
    n = positive_int("length", length, low=0)
    return (n * number("operations_ratio", operations_ratio, 0.0) + n + 1) / tokens_per_call(alpha, n)


def _verify(cost: VerifyCost, length: int) -> float:
    """The verification cost of one length."""
    if callable(cost):
        return number(f"verify_cost({length})", cost(length), 0.0)
    if isinstance(cost, Sequence):
        if length >= len(cost):
            raise ValueError(f"verify_cost has {len(cost)} entries and length {length} needs entry {length}")
        return number(f"verify_cost[{length}]", cost[length], 0.0)
    return number("verify_cost", cost, 0.0)


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """The root of a function that changes its sign once between `low` and `high`, by bisection to 1e-13.

    Not scipy's: to import that takes a second and 50 MB, in the middle of whatever a server that looks at its controller is doing.
    """
    falls = f(low) > 0.0
    while (middle := (low + high) / 2) not in (low, high) and high - low > 1e-13:
        if (f(middle) > 0.0) == falls:
            low = middle
        else:
            high = middle
    return middle
