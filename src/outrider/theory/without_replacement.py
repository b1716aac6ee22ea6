"""Several candidates drawn without replacement: recursive rejection, and the law of which tokens are drawn.

p is the target, q the draft; the m-th token is drawn from q restricted to the tokens not yet drawn and normalised.
When the draft's support is used up nothing more is drawn.

Recursive rejection tests the m-th token against the current residual p^m and draft law q^m, p^{m+1} = [p^m - q^m]_+
normalised. A refused token has no residual mass, so the residual is always (p - t q)_+ / G(t), G(t) = sum (p - t q)_+:
the history enters through one number, t_1 = 0 and t_{m+1} = t_m + G(t_m) / (1 - mass drawn before). The m-th token is
refused with probability G(t_{m+1}) / G(t_m), hence the product over m telescopes:

    P(all k refused) = E[ G(t_{k+1}) ]

under the law of the chain in which every token is drawn from the refused part of its test, (q^m - p^m)_+ normalised.
That is a sum over the first k - 1 tokens: exact in O(V log V) for k = 2 and O(V^(k-1)) in general, and in between a
Monte Carlo mean of a quantity that varies little.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from outrider.theory.checks import positive_int, probabilities
from outrider.theory.laws import Array, Estimate, pair, ratio

LARGEST = 1 << 20
"""Histories that `recursive_acceptance` is willing to enumerate for one row."""


def recursive_acceptance(target: npt.ArrayLike, draft: npt.ArrayLike, drafts: int) -> Array:
    """Probability that one of `drafts` tokens drawn without replacement is accepted, (...). Exact.

    The rule of RSD, MCSD and Sequoia. O(V log V) a row for k <= 2, else the V^(k-1) histories are enumerated.
    Source: Jeon et al., "Recursive Speculative Decoding", 2024 (arXiv 2402.14160), Algorithm 2.

    Raises:
        ValueError: more than `LARGEST` histories; use `estimate_recursive_acceptance`.

    >>> float(recursive_acceptance([0.0, 0.0, 1.0], [0.5, 0.25, 0.25], drafts=2)) # 1/4 + 1/2 1/2 + 1/4 1/3
    0.5833333333333334
    """
    p, q = pair(target, draft)
    k = positive_int("drafts", drafts)
    flat = [_refused(a, b, k) for a, b in zip(p.reshape(-1, p.shape[-1]), q.reshape(-1, p.shape[-1]), strict=True)]
    return 1.0 - np.array(flat).reshape(p.shape[:-1])


def estimate_recursive_acceptance(
    target: npt.ArrayLike, draft: npt.ArrayLike, drafts: int, samples: int, rng: np.random.Generator
) -> Estimate:
    """Monte Carlo twin of `recursive_acceptance` for one pair of laws (V,): unbiased, O(V log V + samples k log V).

    Averages 1 - G(t_{k+1}) over chains of refused tokens; no coin is tossed, so the spread is small.

    >>> rng = np.random.default_rng(0)
    >>> result = estimate_recursive_acceptance([0.0, 0.0, 1.0], [0.5, 0.25, 0.25], 2, samples=1000, rng=rng)
    >>> abs(result.value - 7 / 12) < 6 * result.standard_error
    True
    """
    p, q = pair(target, draft, ndim=1)
    k, count = positive_int("drafts", drafts), positive_int("samples", samples, low=2)
    gap = _Gap(p, q)
    t, used = np.zeros(count), np.zeros((count, 0), dtype=np.intp)
    for m in range(min(k, int((q > 0).sum()))):
        left, free = gap(t), np.maximum(gap.free(used), np.finfo(np.float64).tiny)
        rise = left / free
        t = t + rise
        if m + 1 < k:
            used = np.column_stack([used, gap.draw(t, rise, used, rng)])
    return Estimate.of(1.0 - gap(t))


def all_inside(draft: npt.ArrayLike, drafts: int) -> Array:
    """(V,): for every j, the probability that `drafts` tokens drawn without replacement are all among the first j + 1.

    k <= 2 by prefix sums. For larger k by exponential clocks: token i rings at rate q_i and the order of ringing is
    the order of drawing, so all k are inside H if at least k of H ring before the first outside H does. The integral
    over that first ring, with Poisson-binomial counts, is taken by the trapezoidal rule in log time: absolute error
    below 1e-11, O(V k) for each of a few hundred nodes.

    >>> all_inside([0.5, 0.25, 0.25], 2).round(12)
    array([0.        , 0.41666667, 1.        ])
    """
    q = probabilities("draft", draft, ndim=1)
    k = min(positive_int("drafts", drafts), int((q > 0).sum()))
    inside, support = np.cumsum(q), np.cumsum(q > 0)
    outside = np.append(np.cumsum(q[:0:-1])[::-1], 0.0)
    if k == 1:
        result = inside
    elif k == 2:
        odds = ratio(q, 1.0 - q, 0.0)
        # sum_{x in H} q_x (q(H) - q_x) / (1 - q_x)
        result = inside * np.cumsum(odds) - np.cumsum(odds * q)
    else:
        result = _ring(q, outside, k)
    result = np.where(outside > 0, result, 1.0)
    return np.where(support < k, 0.0, np.clip(result, 0.0, 1.0))


class _Gap:
    """G(t) and draws from the refused part, for many t at once: tokens sorted by p/q, prefix sums."""

    def __init__(self, p: Array, q: Array) -> None:
        self.order = np.argsort(ratio(p, q, np.inf), kind="stable")
        self.p, self.q = p[self.order], q[self.order]
        self.ratio = ratio(self.p, self.q, np.inf)
        self.p_sum, self.q_sum = (np.append(0.0, np.cumsum(a)) for a in (self.p, self.q))
        self.p_left, self.q_left = (np.append(np.cumsum(a[::-1])[::-1], 0.0) for a in (self.p, self.q))

    def __call__(self, t: Array) -> Array:
        j = np.searchsorted(self.ratio, t, side="right")
        return np.maximum(self.p_left[j] - t * self.q_left[j], 0.0)

    def free(self, used: npt.NDArray[np.intp]) -> Array:
        """1 - mass of the `used` positions, (n,): for a single one from sums on both sides, without cancellation."""
        if used.shape[1] == 1:
            return self.q_sum[used[:, 0]] + self.q_left[used[:, 0] + 1]
        return 1.0 - self.q[used].sum(axis=1)

    def weight_before(self, j: npt.NDArray[np.intp], t: Array, rise: Array) -> Array:
        """Sum of clip(t q - p, 0, rise q), the refused part, over the first j tokens in order of p/q."""
        full = np.minimum(j, np.searchsorted(self.ratio, t - rise, side="right"))
        part = np.maximum(np.minimum(j, np.searchsorted(self.ratio, t, side="right")), full)
        edge = t * (self.q_sum[part] - self.q_sum[full]) - (self.p_sum[part] - self.p_sum[full])
        return rise * self.q_sum[full] + np.maximum(edge, 0.0)

    def draw(self, t: Array, rise: Array, used: npt.NDArray[np.intp], rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """One position a chain from the refused part, without the `used` positions, by inversion."""
        size, count = len(self.q), len(t)
        taken = np.sort(used, axis=1)
        tq = t[:, None] * self.q[taken] - self.p[taken]
        weight = np.clip(tq, 0.0, rise[:, None] * self.q[taken])
        total = self.weight_before(np.full(count, size), t, rise) - weight.sum(axis=1)
        u = rng.random(count) * np.maximum(total, 0.0)
        for i in range(taken.shape[1]):  # step over the used positions, from the left
            u = u + np.where(u >= self.weight_before(taken[:, i], t, rise), weight[:, i], 0.0)
        low, high = np.zeros(count, dtype=np.intp), np.full(count, size - 1, dtype=np.intp)
        while (low < high).any():
            middle = (low + high) // 2
            beyond = self.weight_before(middle + 1, t, rise) <= u
            low, high = np.where(beyond, middle + 1, low), np.where(beyond, high, middle)
        return self._unused(low, taken)

    def _unused(self, drawn: npt.NDArray[np.intp], taken: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """`drawn`, moved to a neighbouring free position of the support where rounding hit a used one."""
        for i in np.flatnonzero((taken == drawn[:, None]).any(axis=1) | (self.q[drawn] == 0.0)):
            allowed = self.q > 0
            allowed[taken[i]] = False
            choices = np.flatnonzero(allowed)
            drawn[i] = choices[np.abs(choices - drawn[i]).argmin()]
        return drawn


def _refused(p: Array, q: Array, k: int) -> float:
    """E[G(t_{k+1})] for one row, by enumeration of the first k - 1 refused tokens."""
    gap = _Gap(p, q)
    support = gap.q > 0
    k = min(k, int(support.sum()))
    p, q = gap.p[support], gap.q[support]
    # Tokens outside the draft's support are never drawn, but their target mass is refused mass.
    if len(q) ** (k - 1) > LARGEST:
        raise ValueError(
            f"drafts must give at most {LARGEST} histories, got {len(q)}^{k - 1}; use estimate_recursive_acceptance"
        )
    weight, t, used = np.ones(1), np.ones(1), np.zeros((1, 0), dtype=np.intp)
    before, last = np.zeros(1), np.ones(1)  # t_m, and the rise of t since: both of the token now drawn
    for _ in range(k - 1):
        free = np.repeat(q[None], len(t), axis=0)
        np.put_along_axis(free, used, 0.0, axis=1)
        refuse = np.clip(t[:, None] * q - p, 0.0, last[:, None] * q) * (free > 0)
        # After the token: what is still free, as a sum of both sides rather than a difference.
        edge = np.zeros((len(t), 1))
        left = np.hstack([edge, np.cumsum(free, axis=1)[:, :-1]])
        right = np.hstack([np.cumsum(free[:, :0:-1], axis=1)[:, ::-1], edge])
        row, token = np.nonzero(refuse)
        total = refuse.sum(axis=1)
        weight = weight[row] * refuse[row, token] / total[row]
        used = np.column_stack([used[row], token])
        before = t[row]
        last = gap(before) / np.maximum((left + right)[row, token], np.finfo(np.float64).tiny)
        t = before + last
    if len(weight) == 0:  # some test never refuses
        return 0.0
    return float(weight @ gap(t))


def _ring(q: Array, outside: Array, k: int) -> Array:
    """P(at least k of the first j + 1 clocks ring before any other), for every j whose outside mass is positive."""
    rates = outside[outside > 0]
    if not len(rates):
        return np.zeros(len(q))
    # An analytic integrand in log time, that falls off like t^{k+1} and exp(-outside t): trapezoids converge fast.
    step = 0.2
    result = np.zeros(len(q))
    for t in np.exp(np.arange(np.log(1e-5), np.log(60.0 / rates.min()), step)):
        # A clock that has not rung after 50 means is as good as certain to; capped, its odds stay finite.
        x = np.minimum(q * t, 50.0)
        with np.errstate(divide="ignore"):  # tokens outside the support: log 0
            log_odds = np.log(np.expm1(x))
        silent = np.cumsum(x)
        few, term = np.exp(-silent), np.zeros(len(q) + 1)
        for _ in range(1, k):  # exactly one ring, two, ..., k - 1
            term = np.append(-np.inf, np.logaddexp.accumulate(term[:-1] + log_odds))
            few += np.exp(term[1:] - silent)
        result += step * outside * t * np.exp(-outside * t) * np.maximum(1.0 - few, 0.0)
    return result
