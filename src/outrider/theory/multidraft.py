"""Several candidates at one node: acceptance of the exact rules for k tokens drawn from one draft law.

p is the target, q the draft. With independent drafts two rules share one form. Let

    G(s) = sum (p - s q)_+,      F(s) = 1 - G(s) = sum min(p, s q).

Recursive rejection accepts the m-th token against the m-th residual of Theorem 3 of Yin et al. (NeurIPS 2024); as
taking (.)_+ after each subtraction equals taking it once, its un-normalised residuals are (p - s_m q)_+ with s_1 = 1 and
s_{m+1} = s_m + G(s_m), and all k are refused with probability G(s_k) = rho_k. K-SEQ tests every token with
min(1, p / (s q)), where s makes the accepted mass min(p, s q); it refuses all with probability G(s) too. So both accept
with probability F(s) and sample (p - s q)_+ otherwise: the larger s is better.

K-SEQ accepts at least as often as recursive rejection, for every p, q and k. Proof: write G_m = G(s_m), s_0 = 0,
G_0 = 1. G is convex and s_{m+1} - s_m = G_m, so its slope over that interval, G_{m+1} / G_m - 1, does not fall with m:
G_m is log-convex, hence G_m <= G_k^{m/k} for m <= k. Therefore s_k = sum_{m<k} G_m <= sum_{m<k} G_k^{m/k}
= (1 - G_k) / (1 - G_k^{1/k}), that is (1 - F(s_k) / s_k)^k <= G(s_k): at s_k the k tests of K-SEQ would still accept
with probability at least F(s_k). As G falls and (1 - F(s)/s)^k rises with s, the root of K-SEQ is at least s_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory.checks import positive_int
from outrider.theory.laws import Array, normalised, pair


@dataclass(frozen=True, slots=True, eq=False)
class Threshold:
    """A rule for k independent drafts that outputs min(p, s q) by acceptance and (p - s q)_+ otherwise.

    Attributes:
        acceptance: (...), probability that one of the k tokens is accepted, F(s).
        slope: (...), s.
        residual: (..., V), law of the token after k refusals; the target where that never happens.
    """

    acceptance: Array
    slope: Array
    residual: Array


@dataclass(frozen=True, slots=True, eq=False)
class Hub:
    """SpecHub on one pair of laws, or on rows. Shapes (..., V) unless noted; a is the draft's most probable token.

    Attributes:
        acceptance: (...), probability that one of the two tokens is accepted.
        hub: (...), a.
        other_first, hub_first: probability of drawing the pair (i, a), and (a, i); zero at i = a. If the draft is a
            point mass there is only the pair (a, a), and `hub_first` is one at a.
        take_other_first, take_other_second: mass with which i is accepted from (i, a), and from (a, i).
        hub_leading, hub_second: (...), mass with which a is accepted from the rest of the (a, i), and of the (i, a).
        residual: law of the token after two refusals; the target where that never happens.
    """

    acceptance: Array
    hub: npt.NDArray[np.intp]
    other_first: Array
    hub_first: Array
    take_other_first: Array
    take_other_second: Array
    hub_leading: Array
    hub_second: Array
    residual: Array


def recursive(target: npt.ArrayLike, draft: npt.ArrayLike, drafts: int) -> Threshold:
    """Recursive rejection with `drafts` independent tokens, in O(k V): acceptance 1 - rho_k.

    The root rule of batch speculative decoding, and SpecInfer's multi-step speculative sampling at one node.
    Source: Yin et al., NeurIPS 2024, Theorem 3; Miao et al., "SpecInfer", ASPLOS 2024.

    >>> rule = recursive([0.0, 1.0], [0.5, 0.5], drafts=3)
    >>> float(rule.acceptance), float(rule.slope)
    (0.875, 1.75)
    """
    p, q = pair(target, draft)
    slope = np.ones(p.shape[:-1])
    for _ in range(positive_int("drafts", drafts) - 1):
        slope = slope + _left(p, q, slope)
    return _threshold(p, q, slope)


def kseq(target: npt.ArrayLike, draft: npt.ArrayLike, drafts: int) -> Threshold:
    """K-SEQ with `drafts` independent tokens: each is tested with min(1, p / (s q)), s in [1, k].

    s is the root of 1 - (1 - F(s)/s)^k = F(s), by bisection to the last bit. Accepts with probability at least
    1 - (1 - 1/k)^k times the optimum, and at least as often as `recursive` (proof at the head of this module).
    Source: Sun et al., "SpecTr", NeurIPS 2023, Algorithm 3 and Theorem 3.

    >>> rule = kseq([0.0, 1.0], [0.5, 0.5], drafts=2)
    >>> float(rule.acceptance), float(rule.slope)
    (0.75, 1.5)
    """
    p, q = pair(target, draft)
    k = positive_int("drafts", drafts)
    low, high = np.ones(p.shape[:-1]), np.full(p.shape[:-1], float(k))
    for _ in range(64):
        s = 0.5 * (low + high)
        left = _left(p, q, s)
        more = left >= np.maximum(1.0 - (1.0 - left) / s, 0.0) ** k
        low, high = np.where(more, s, low), np.where(more, high, s)
        if np.all(high - low <= np.spacing(low)):
            break
    return _threshold(p, q, low)


def spechub(target: npt.ArrayLike, draft: npt.ArrayLike) -> Hub:
    """SpecHub, k = 2: every pair of drafts contains the hub a = argmax q (the first, if tied). O(V).

    Pairs: (i, a) with probability q_i, (a, i) with q_a q_i / (1 - q_a), i != a. The target is filled greedily: i from
    (i, a), then i from (a, i), then a from what is left of the (a, .), then a from what is left of the (., a); the
    rest of the target is the residual. Source: Sun et al., "SpecHub", EMNLP 2024.

    >>> float(spechub([0.0, 0.5, 0.5], [0.5, 0.25, 0.25]).acceptance)
    1.0
    """
    p, q = pair(target, draft)
    hub = q.argmax(axis=-1)
    is_hub = np.arange(q.shape[-1]) == hub[..., None]
    other = np.where(is_hub, 0.0, q)
    rest = other.sum(axis=-1, keepdims=True)
    top = np.take_along_axis(q, hub[..., None], -1)
    second = np.divide(top * other, rest, out=np.where(is_hub, 1.0, 0.0), where=rest > 0)
    take_first = np.minimum(p, other)
    take_second = np.where(is_hub, 0.0, np.minimum(p - take_first, second))
    room = np.take_along_axis(p, hub[..., None], -1)[..., 0]
    hub_leading = np.minimum(room, (second - take_second).sum(axis=-1))
    hub_second = np.minimum(room - hub_leading, (other - take_first).sum(axis=-1))
    filled = take_first + take_second + np.where(is_hub, (hub_leading + hub_second)[..., None], 0.0)
    residual = normalised(np.maximum(p - filled, 0.0), p)
    return Hub(filled.sum(axis=-1), hub, other, second, take_first, take_second, hub_leading, hub_second, residual)


def _left(p: Array, q: Array, slope: Array) -> Array:
    """G(s), (...)."""
    return np.maximum(p - slope[..., None] * q, 0.0).sum(axis=-1)


def _threshold(p: Array, q: Array, slope: Array) -> Threshold:
    scaled = slope[..., None] * q
    residual = normalised(np.maximum(p - scaled, 0.0), p)
    return Threshold(np.minimum(p, scaled).sum(axis=-1), slope, residual)
