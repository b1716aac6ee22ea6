"""Temperature zero: how close a drafter has to be so that its token is certainly accepted.

At temperature zero every exact rule accepts a draft token if and only if it is the target's most probable one, so what
counts is which order the drafter's law has, not its total variation. For a law p (target) and a rule, the certificate
is the least KL(p || q) over all drafter laws q that can cause a rejection: a drafter closer than that, in nats, cannot
be rejected. The least is an information projection on order constraints, hence pools of tokens that q makes equal to
their mean (pool adjacent violators):

    C = sum over the pool of p ln(p / mean)

Ties count as rejections, so the certificate is the infimum. Source: A. Sharma, 2026 (arXiv 2606.30265).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from outrider.theory.checks import number, positive_int, probabilities, same_shape
from outrider.theory.laws import Array, ratio


def strict(target: npt.ArrayLike) -> Array:
    """Certificate, (...), that the drafter's most probable token is the target's.

    With p_0 >= p_1 the two largest: p_0 ln(2 p_0 / (p_0 + p_1)) + p_1 ln(2 p_1 / (p_0 + p_1)), at most ln 2, and about
    (p_0 - p_1)^2 / (2 (p_0 + p_1)) for a small margin. V >= 2.

    >>> float(strict([0.5, 0.5])), round(float(strict([1.0, 0.0])), 12)
    (0.0, 0.69314718056)
    """
    return among_top(target, 1)


def among_top(target: npt.ArrayLike, m: int) -> Array:
    """Certificate, (...), that the target's most probable token is among the drafter's `m` most probable; V > m.

    The cheapest violation lifts the m runners-up to the level of p_0: p_0 is pooled with the smallest of them, upwards
    while the next is below the mean. At most ln(m + 1).

    >>> round(float(among_top([1.0, 0.0, 0.0], 2)), 12)
    1.098612288668
    """
    p = probabilities("target", target)
    m = positive_int("m", m)
    if p.shape[-1] <= m:
        raise ValueError(f"m must be less than the number of tokens, {p.shape[-1]}, got {m}")
    top = np.sort(p, axis=-1)[..., ::-1]
    first, others = top[..., 0], top[..., m:0:-1]
    return _pooled(first, others, np.concatenate([others[..., 1:], np.full((*first.shape, 1), np.inf)], axis=-1), 1.0)


def accepted_if(target: npt.ArrayLike, accepted: npt.ArrayLike) -> Array:
    """Certificate, (...), that the drafter's most probable token is in the set `accepted`, a boolean (..., V).

    Infinite where every token is accepted, zero where the target's own most probable one is not. The cheapest violation
    lifts the most probable token outside the set, which is pooled with all tokens above the resulting mean.

    >>> float(accepted_if([0.5, 0.25, 0.25], [True, True, False])) == float(strict([0.5, 0.25, 0.25]))
    True
    """
    p = probabilities("target", target)
    allowed = np.asarray(accepted)
    if allowed.dtype != np.bool_:
        raise ValueError(f"accepted must be boolean, got {allowed.dtype}")
    same_shape("accepted", allowed, "target", p)  # pyright: ignore[reportArgumentType]
    lifted = np.where(allowed, -1.0, p).max(axis=-1)
    top = np.sort(p, axis=-1)[..., ::-1]
    below = np.concatenate([top[..., 1:], np.full((*lifted.shape, 1), -np.inf)], axis=-1)
    cost = _pooled(np.maximum(lifted, 0.0), top, below, -1.0)
    return np.where(lifted < 0, np.inf, np.where(lifted >= top[..., 0], 0.0, cost))


def within_margin(target: npt.ArrayLike, margin: float) -> npt.NDArray[np.bool_]:
    """Tokens with p(y) >= max p - margin, margin >= 0: an `accepted` set for `accepted_if`.

    >>> within_margin([0.5, 0.375, 0.125], 0.125)
    array([ True,  True, False])
    """
    p = probabilities("target", target)
    return p >= p.max(axis=-1, keepdims=True) - number("margin", margin, low=0.0)


def within_factor(target: npt.ArrayLike, factor: float) -> npt.NDArray[np.bool_]:
    """Tokens with p(y) >= factor max p, factor in [0, 1]: an `accepted` set for `accepted_if`.

    >>> within_factor([0.5, 0.375, 0.125], 0.5)
    array([ True,  True, False])
    """
    p = probabilities("target", target)
    return p >= number("factor", factor, 0.0, 1.0) * p.max(axis=-1, keepdims=True)


def within_top(target: npt.ArrayLike, m: int) -> npt.NDArray[np.bool_]:
    """The target's `m` most probable tokens (ties to the lower index): an `accepted` set for `accepted_if`.

    >>> within_top([0.2, 0.5, 0.3], 2)
    array([False,  True,  True])
    """
    p = probabilities("target", target)
    order = np.argsort(-p, axis=-1, kind="stable")[..., : positive_int("m", m)]
    chosen = np.zeros(p.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=-1)
    return chosen


def _pooled(start: Array, queue: Array, following: Array, side: float) -> Array:
    """sum p ln(p / mean) of `start` (...) pooled with the head of `queue` (..., n), as far as the pool reaches.

    The pool ends after the first member whose follower does not belong: side = 1, follower >= mean, side = -1,
    follower <= mean. `following` is `queue` shifted by one with a follower that never belongs at its end.
    """
    count = np.arange(2, queue.shape[-1] + 2)
    mean = (start[..., None] + np.cumsum(queue, axis=-1)) / count
    last = (side * (following - mean) >= 0.0).argmax(axis=-1)[..., None]
    level = np.take_along_axis(mean, last, -1)
    pool = np.concatenate([start[..., None], np.where(np.arange(queue.shape[-1]) <= last, queue, 0.0)], axis=-1)
    quotient = ratio(pool, level, 1.0)
    logs = np.log(quotient, out=np.zeros_like(quotient), where=pool > 0)
    return np.maximum((pool * logs).sum(axis=-1), 0.0)
