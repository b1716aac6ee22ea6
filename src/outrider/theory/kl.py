"""Fronts between rejection and Kullback-Leibler divergence, for one law and for whole sequences.

A rule of the rejection family that outputs pi rejects with probability at least TV(q, pi), with equality for
b = min(1, pi/q), so a rule is a choice of pi. With p the target and q the draft, least TV(q, pi) under a bound on a
divergence from the target that is a convex function of pi/p, summed against p, is reached by

    pi = clip(q, c2 p, c1 p),      c2 <= 1 <= c1,      sum pi = 1

(stationarity: where pi < q the derivative of the divergence is one constant, where pi > q another). The family has one
parameter, here the rejection probability R: mass R is taken from the tokens with the largest q/p, down to one level
c1, and given to those with the smallest, up to one level c2. Every member is also on the total-variation front of
Theorem 5 of Yin et al. (NeurIPS 2024). With KL(p || pi) this is mentored decoding (Tran-Thien, 2023).

Unlike total variation, KL decomposes over a sequence, KL(P || p) = sum_n E_P KL(pi_n || p_n), and it is strictly
convex, so how a budget is spread over contexts matters: `sequence_policy` computes the best spread on a chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from outrider.theory.batch import total_variation
from outrider.theory.chains import Chain
from outrider.theory.checks import number
from outrider.theory.laws import Array, kl_unchecked, normalised, not_negative, pair, ratio, within_unit

Direction = Literal["target_first", "kernel_first"]
"""Which divergence is bounded: "target_first" is KL(p || pi), "kernel_first" is KL(pi || p)."""


@dataclass(frozen=True, slots=True, eq=False)
class ClipRule:
    """A member of the clip family. Shapes (..., V) for laws and acceptance, (...) for the rest.

    Attributes:
        accept: min(1, pi/q), one where q = 0.
        residual: (c2 p - q)_+ normalised; the target where nothing is rejected.
        kernel: pi, the output law.
        reject: P(reject) = TV(q, pi).
        upper: c1; infinite where only tokens with p = 0 (or none) lost mass.
        lower: c2.
        divergence: the divergence that was asked for, in nats.
    """

    accept: Array
    residual: Array
    kernel: Array
    reject: Array
    upper: Array
    lower: Array
    divergence: Array


@dataclass(frozen=True, slots=True, eq=False)
class KLPolicy:
    """The optimal over-acceptance on a chain for one price of divergence.

    Attributes:
        kernels: (T, V, V), the output kernels pi_n.
        value: (T + 1, V), `value[n, x]` is the least expected cost of what follows x at position n; value[T] = 0.
        rejections: E[N_rej], attained with b = min(1, pi/q).
        divergence: KL of the output law of x_1..x_T from the target's, given the prompt, in nats.
        objective: rejections + weight * divergence, equal to start @ value[0].
    """

    kernels: Array
    value: Array
    rejections: float
    divergence: float
    objective: float


def clip_rule(
    target: npt.ArrayLike, draft: npt.ArrayLike, reject: npt.ArrayLike, direction: Direction = "target_first"
) -> ClipRule:
    """The member of the clip family that rejects with probability min(`reject`, TV(p, q)). O(V log V).

    Tokens with p = 0 lose their mass first, in proportion to q, since nothing is worse than they are. reject = 0
    is pi = q, reject >= TV is pi = p.

    >>> rule = clip_rule([0.5, 0.5, 0.0], [0.75, 0.0, 0.25], reject=0.375)
    >>> rule.kernel, float(rule.upper), float(rule.lower)
    (array([0.625, 0.375, 0.   ]), 1.25, 0.75)
    """
    p, q = pair(target, draft)
    _check_direction(direction)
    return _rule(_Clip(p, q), within_unit("reject", reject, p.shape[:-1]), direction)


def mentored(
    target: npt.ArrayLike, draft: npt.ArrayLike, budget: npt.ArrayLike, direction: Direction = "target_first"
) -> ClipRule:
    """The rule that rejects least among those whose divergence from the target is at most `budget` >= 0 nats.

    `budget` is (...) or broadcast to it. Solved by bisection on the rejection probability to the last bit; the
    divergence never exceeds the budget by more than rounding. Source: Tran-Thien, "An optimal lossy variant of
    speculative decoding", 2023, for KL(p || pi).

    >>> rule = mentored([0.5, 0.5], [0.9, 0.1], budget=0.05)
    >>> round(float(rule.divergence), 12), bool(rule.reject < 0.4)
    (0.05, True)
    """
    p, q = pair(target, draft)
    _check_direction(direction)
    clip, limit = _Clip(p, q), not_negative("budget", budget, p.shape[:-1])
    low, high = np.zeros(p.shape[:-1]), clip.tv.copy()
    keep = _divergence(p, clip.kernel(low)[0], direction) <= limit
    high = np.where(keep, 0.0, high)
    for _ in range(64):
        middle = 0.5 * (low + high)
        good = _divergence(p, clip.kernel(middle)[0], direction) <= limit
        low, high = np.where(good, low, middle), np.where(good, middle, high)
    # Near zero the divergence is quadratic, and rounding hides it: no budget at all means the target itself.
    high = np.where(limit == 0.0, clip.tv, high)
    return _rule(clip, high, direction)


def sequence_policy(chain: Chain, weight: float) -> KLPolicy:
    """Minimise E[N_rej] + weight * KL(output law || target law) over all rules on `chain`; weight >= 1e-6, per nat.

    Dynamic program from the end, V_T = 0: with p' = p exp(-V_{n+1} / weight),

        V_n(x) = min over pi of TV(q, pi) + weight KL(pi || p) + sum_y pi(y) V_{n+1}(y)
        pi     = clip(q, c p', c e^{1/weight} p'),   c such that pi sums to one

    O(T V^2 log V). A large weight gives speculative decoding, a small one the draft (within the target's support).
    Source: Bellman's equation and the clip form above.

    >>> from outrider.theory.chains import best_guess
    >>> policy = sequence_policy(best_guess(states=3, horizon=4), weight=2.0)
    >>> bool(abs(policy.objective - policy.rejections - 2.0 * policy.divergence) < 1e-12)
    True
    """
    weight = number("weight", weight, low=1e-6)
    kernels, value = np.empty(chain.target.shape), np.zeros((chain.horizon + 1, chain.states))
    steps = np.empty((2, chain.horizon, chain.states))
    for n in range(chain.horizon - 1, -1, -1):
        p, q = chain.target[n], chain.draft[n]
        pi = kernels[n] = bellman(p, q, value[n + 1], weight)
        steps[:, n] = np.maximum(q - pi, 0.0).sum(axis=1), kl_unchecked(pi, p)
        value[n] = steps[0, n] + weight * steps[1, n] + pi @ value[n + 1]
    state, totals = chain.start, np.zeros(2)
    for n in range(chain.horizon):
        totals += steps[:, n] @ state
        state = state @ kernels[n]
    return KLPolicy(kernels, value, float(totals[0]), float(totals[1]), float(chain.start @ value[0]))


class _Clip:
    """Water levels of the clip family for rows of p and q: sorted once, solved exactly for any rejected mass."""

    def __init__(self, p: Array, q: Array) -> None:
        self.p, self.q, self.tv = p, q, total_variation(p, q)
        self.outside = np.where(p == 0.0, q, 0.0)
        self.off = self.outside.sum(axis=-1)
        quotient = ratio(q, p, -1.0)  # tokens with p = 0 are not ranked: both their sums are zero
        order = np.argsort(quotient, axis=-1)
        self.rising = np.take_along_axis(quotient, order, -1)
        self.p_up = np.take_along_axis(p, order, -1)
        self.q_up = np.where(self.p_up > 0, np.take_along_axis(q, order, -1), 0.0)

    def kernel(self, reject: Array) -> tuple[Array, Array, Array]:
        """(pi, c1, c2) for the rejected mass `reject`, (...), at most TV."""
        inside = np.maximum(reject - self.off, 0.0)
        upper = _top_level(self.rising[..., ::-1], self.p_up[..., ::-1], self.q_up[..., ::-1], inside)
        upper = np.where(inside > 0, np.maximum(upper, 1.0), np.inf)
        lower = np.minimum(_bottom_level(self.rising, self.p_up, self.q_up, reject), 1.0)
        left = np.maximum(1.0 - ratio(reject, self.off, 1.0), 0.0)[..., None]
        cap = np.where(np.isinf(upper), 1.0, upper)[..., None] * self.p
        high = np.where(np.isinf(upper)[..., None], np.inf, cap)
        pi = np.where(self.p == 0.0, left * self.outside, np.clip(self.q, lower[..., None] * self.p, high))
        done = (reject >= self.tv)[..., None]
        return np.where(done, self.p, pi), upper, lower


def _top_level(falling: Array, p: Array, q: Array, mass: Array) -> Array:
    """c with sum (q - c p)_+ = mass: ratios q/p falling, p and q in that order."""
    some_p, some_q = np.cumsum(p, axis=-1), np.cumsum(q, axis=-1)
    held = some_q - np.maximum(falling, 0.0) * some_p
    k = _last(held <= mass[..., None])
    return ratio(_at(some_q, k) - mass, _at(some_p, k), np.inf)


def _bottom_level(rising: Array, p: Array, q: Array, mass: Array) -> Array:
    """c with sum (c p - q)_+ = mass: ratios q/p rising, p and q in that order."""
    some_p, some_q = np.cumsum(p, axis=-1), np.cumsum(q, axis=-1)
    held = np.maximum(rising, 0.0) * some_p - some_q
    k = _last((held <= mass[..., None]) | (some_p <= 0))
    return ratio(_at(some_q, k) + mass, _at(some_p, k), 1.0)


def _last(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    return mask.shape[-1] - 1 - mask[..., ::-1].argmax(axis=-1)


def _at(rows: Array, k: npt.NDArray[np.intp]) -> Array:
    return np.take_along_axis(rows, k[..., None], -1)[..., 0]


def _rule(clip: _Clip, reject: Array, direction: Direction) -> ClipRule:
    reject = np.minimum(reject, clip.tv)
    pi, upper, lower = clip.kernel(reject)
    accept = np.minimum(ratio(pi, clip.q, 1.0), 1.0)
    residual = normalised(np.maximum(pi - clip.q, 0.0), clip.p)
    rejected = np.maximum(clip.q - pi, 0.0).sum(axis=-1)
    return ClipRule(accept, residual, pi, rejected, upper, lower, _divergence(clip.p, pi, direction))


def _divergence(p: Array, pi: Array, direction: Direction) -> Array:
    return kl_unchecked(p, pi) if direction == "target_first" else kl_unchecked(pi, p)


def _check_direction(direction: str) -> None:
    if direction not in get_args(Direction):
        raise ValueError(f"direction must be one of {get_args(Direction)}, got {direction!r}")


def bellman(p: Array, q: Array, future: Array, weight: float) -> Array:
    """pi of the dynamic program, (V, V): bisection on log c, then the level itself from the sets it leaves clipped."""
    with np.errstate(divide="ignore"):
        log_q, log_p = np.log(q), np.log(p) - future / weight
    log_p -= log_p.max(axis=1, keepdims=True)
    high = -np.log(np.exp(log_p).sum(axis=1, keepdims=True))  # there even the lower clips sum to one
    low, gap = high - 1.0 / weight, 1.0 / weight
    for _ in range(100):
        c = 0.5 * (low + high)
        under = np.exp(_clip(log_q, log_p + c, gap)).sum(axis=1, keepdims=True) < 1.0
        low, high = np.where(under, c, low), np.where(under, high, c)
    # Kernels sum to one to the last bit, so that an expectation over many positions stays one.
    pi = np.exp(_clip(log_q, log_p + high, gap))
    return pi / pi.sum(axis=1, keepdims=True)


def _clip(log_q: Array, floor: Array, gap: float) -> Array:
    return np.maximum(np.minimum(log_q, floor + gap), floor)
