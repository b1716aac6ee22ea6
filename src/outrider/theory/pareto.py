"""Biased rules: how much rejection a bias buys, for one conditional law and along a chain.

A rule of the rejection family accepts the draft token x with probability b(x) and otherwise samples a residual law P.
With p the target and q the draft (Yin et al. have the letters the other way round), its output is

    pi = b q + R P,      R = P(reject) = sum (1 - b) q.

Theorems 4 and 5 of Yin et al. (NeurIPS 2024) say how little bias TV(pi, p) a given b allows, and that over-accepting
rules, b >= min(1, p/q), all lie on one line: P(reject) + bias = TV(p, q). Two short arguments complete the picture.
For any b, sum |p - b q| = sum (p - b q) + 2 sum (b q - p)_+ gives bias = sum (b q - p)_+, and adding R gives

    P(reject) + bias = TV(p, q) + sum (min(p, q) - b q)_+

so the last sum is the exact distance from the front. And for over-accepting b, (p - b q)_+ = (p - q)_+: the ordinary
residual of speculative sampling stays optimal, whatever the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory.batch import total_variation
from outrider.theory.checks import probabilities, same_shape
from outrider.theory.laws import Array, normalised, not_negative, pair, ratio, within_unit


@dataclass(frozen=True, slots=True, eq=False)
class ResidualSet:
    """All residual laws of least bias: those P with 0 <= P <= upper and sum P = 1.

    Attributes:
        upper: (..., V), (p - b q)_+ / R; ones where nothing is ever rejected (R = 0), since P then has no influence.

    >>> best = optimal_residuals([0.5, 0.5, 0.0], [0.0, 0.5, 0.5], accept=[1.0, 1.0, 0.5])
    >>> best.upper
    array([2., 0., 0.])
    >>> bool(best.contains([1.0, 0.0, 0.0])), bool(best.contains([0.0, 1.0, 0.0]))
    (True, False)
    """

    upper: Array

    def contains(self, residual: npt.ArrayLike, tolerance: float = 1e-12) -> npt.NDArray[np.bool_]:
        """(...): whether the law `residual`, (..., V), has least bias, up to `tolerance` in every coordinate."""
        law = probabilities("residual", residual)
        same_shape("residual", law, "upper", self.upper)
        return np.asarray((law <= self.upper + tolerance).all(axis=-1))


def rejection_probability(draft: npt.ArrayLike, accept: npt.ArrayLike) -> Array:
    """R = sum (1 - b) q, (...). `accept` is b, in [0, 1], of the shape of `draft` or broadcast to it.

    >>> float(rejection_probability([0.5, 0.5], [1.0, 0.5]))
    0.25
    """
    q = probabilities("draft", draft)
    return _reject(q, within_unit("accept", accept, q.shape))


def output_kernel(draft: npt.ArrayLike, accept: npt.ArrayLike, residual: npt.ArrayLike) -> Array:
    """pi = b q + R P, (..., V): the law of the token that the rule (b, P) outputs.

    >>> output_kernel([0.5, 0.5], [1.0, 0.5], [1.0, 0.0])
    array([0.75, 0.25])
    """
    q, law = probabilities("draft", draft), probabilities("residual", residual)
    same_shape("draft", q, "residual", law)
    b = within_unit("accept", accept, q.shape)
    return b * q + _reject(q, b)[..., None] * law


def optimal_residual(target: npt.ArrayLike, draft: npt.ArrayLike, accept: npt.ArrayLike) -> Array:
    """One residual law of least bias, (p - b q)_+ normalised, (..., V); the target where that is zero everywhere.

    For every over-accepting b this is the ordinary residual (p - q)_+, normalised.
    Source: Yin et al., NeurIPS 2024, Theorem 4.

    >>> optimal_residual([0.5, 0.5, 0.0], [0.0, 0.5, 0.5], accept=[1.0, 1.0, 0.5])
    array([1., 0., 0.])
    """
    p, q = pair(target, draft)
    return normalised(np.maximum(p - within_unit("accept", accept, p.shape) * q, 0.0), p)


def optimal_residuals(target: npt.ArrayLike, draft: npt.ArrayLike, accept: npt.ArrayLike) -> ResidualSet:
    """The set of all residual laws of least bias, see `ResidualSet`. Source: Yin et al., NeurIPS 2024, Theorem 4."""
    p, q = pair(target, draft)
    b = within_unit("accept", accept, p.shape)
    reject = _reject(q, b)[..., None]
    return ResidualSet(np.where(reject > 0, ratio(np.maximum(p - b * q, 0.0), reject, 1.0), 1.0))


def optimal_loss(target: npt.ArrayLike, draft: npt.ArrayLike, accept: npt.ArrayLike) -> Array:
    """min over P of TV(b q + R P, p) = sum (b q - p)_+, (...): the least bias that b allows, for arbitrary b in [0, 1].

    Equal to half of sum |p - b q| less R / 2 (the form of Theorem 4); TV(p, q) where nothing is rejected.
    Source: Yin et al., NeurIPS 2024, Theorem 4.

    >>> float(optimal_loss([0.5, 0.5, 0.0], [0.0, 0.5, 0.5], accept=[1.0, 1.0, 0.5]))
    0.25
    """
    p, q = pair(target, draft)
    return np.maximum(within_unit("accept", accept, p.shape) * q - p, 0.0).sum(axis=-1)


def loss(target: npt.ArrayLike, draft: npt.ArrayLike, accept: npt.ArrayLike, residual: npt.ArrayLike) -> Array:
    """TV(pi, p), (...): the bias of the rule (b, P). At least `optimal_loss`.

    >>> float(loss([0.5, 0.5], [0.5, 0.5], accept=[1.0, 0.5], residual=[1.0, 0.0]))
    0.25
    """
    p, q = pair(target, draft)
    return 0.5 * np.abs(output_kernel(q, accept, residual) - p).sum(axis=-1)


def excess(target: npt.ArrayLike, draft: npt.ArrayLike, accept: npt.ArrayLike) -> Array:
    """sum (min(p, q) - b q)_+, (...): how far above the line P(reject) + bias = TV(p, q) the acceptance b lies.

    Zero if and only if b >= min(1, p/q) wherever q > 0 (Yin et al., NeurIPS 2024, Theorem 5, is the "if").

    >>> float(excess([0.5, 0.5], [0.5, 0.5], accept=0.75))
    0.25
    """
    p, q = pair(target, draft)
    return np.maximum(np.minimum(p, q) - within_unit("accept", accept, p.shape) * q, 0.0).sum(axis=-1)


def epsilon_acceptance(target: npt.ArrayLike, draft: npt.ArrayLike, eps: npt.ArrayLike) -> Array:
    """b_eps = min(1, (p + eps) / q), (..., V), one where q = 0; `eps` >= 0 is (...) or broadcast to it.

    Then P(reject) = sum (q - p - eps)_+ and the least bias is sum min((q - p)_+, eps). eps = 0 is speculative sampling.
    Source: Yin et al., NeurIPS 2024, Section 4.1.

    >>> epsilon_acceptance([0.5, 0.5], [1.0, 0.0], 0.25)
    array([0.75, 1.  ])
    """
    p, q = pair(target, draft)
    return np.minimum(ratio(p + not_negative("eps", eps, p.shape[:-1])[..., None], q, 1.0), 1.0)


def front(target: npt.ArrayLike, draft: npt.ArrayLike, budget: npt.ArrayLike) -> Array:
    """Least P(reject) of any rule whose bias TV(pi, p) is at most `budget` in [0, 1]: (TV(p, q) - budget)_+, (...).

    Any rule with output law pi rejects with probability at least TV(q, pi) >= TV(p, q) - TV(pi, p).
    Source: Yin et al., NeurIPS 2024, Theorem 5.

    >>> float(front([1.0, 0.0], [0.5, 0.5], 0.125))
    0.375
    """
    tv = total_variation(target, draft)
    return np.maximum(tv - within_unit("budget", budget, tv.shape), 0.0)


def epsilon_for_budget(target: npt.ArrayLike, draft: npt.ArrayLike, budget: npt.ArrayLike) -> Array:
    """The least eps whose b_eps has bias `budget`, or TV(p, q) where that is less, (...). Exact, O(V log V).

    >>> float(epsilon_for_budget([0.5, 0.5, 0.0], [0.0, 0.25, 0.75], 0.25))
    0.25
    """
    p, q = pair(target, draft)
    return _level(np.maximum(q - p, 0.0), within_unit("budget", budget, p.shape[:-1]))


def budget_acceptance(target: npt.ArrayLike, draft: npt.ArrayLike, budget: npt.ArrayLike) -> Array:
    """The b_eps that spends the bias `budget` exactly, (..., V): on the front, with the ordinary residual.

    >>> b = budget_acceptance([0.5, 0.5], [1.0, 0.0], 0.25)
    >>> float(rejection_probability([1.0, 0.0], b)), float(optimal_loss([0.5, 0.5], [1.0, 0.0], b))
    (0.25, 0.25)
    """
    return epsilon_acceptance(target, draft, epsilon_for_budget(target, draft, budget))


def clip_kernel(target: npt.ArrayLike, draft: npt.ArrayLike, budget: npt.ArrayLike) -> Array:
    """pi = clip(q, p - delta, p + eps), (..., V), both levels chosen so that the bias is `budget` (or TV if less).

    It is the output of b_eps with the residual (p - delta - q)_+, normalised, which is an optimal one too. Among all
    output laws on the front with this bias it has the least max |pi - p|, namely max(eps, delta), because a level that
    caps one side of |pi - p| holds least mass when it is flat.

    >>> clip_kernel([0.5, 0.5, 0.0], [0.0, 0.25, 0.75], 0.25)
    array([0.375, 0.375, 0.25 ])
    """
    p, q = pair(target, draft)
    spend = within_unit("budget", budget, p.shape[:-1])
    eps, delta = (_level(np.maximum(gap, 0.0), spend)[..., None] for gap in (q - p, p - q))
    return np.clip(q, p - delta, p + eps)


def _reject(q: Array, b: Array) -> Array:
    return ((1.0 - b) * q).sum(axis=-1)


def _level(gap: Array, budget: Array) -> Array:
    """The least e with sum min(gap, e) = min(budget, sum gap), for gap >= 0 along the last axis."""
    size = gap.shape[-1]
    rising = np.sort(gap, axis=-1)
    below = np.cumsum(rising, axis=-1) - rising
    left = size - np.arange(size)
    reached = below + left * rising >= budget[..., None]
    reached[..., -1] = True
    k = reached.argmax(axis=-1)[..., None]
    level = (budget[..., None] - np.take_along_axis(below, k, -1)) / left[k]
    return np.clip(level, 0.0, rising[..., -1:])[..., 0]
