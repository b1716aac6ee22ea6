"""How often speculative decoding rejects, and how many target calls that takes: exactly, for Markov chains.

Letters: p is the target, q the draft (Yin et al. have them the other way round). Every output token is judged by one
test, and N_rej counts the tests that failed. A *call* is one parallel evaluation of the target over a whole draft; with
drafts to the horizon, calls = N_rej + 1 - R_T, R_T telling whether the last token came from a rejection.

All functions take `drafts`, the number M of drafts per call as in `batch` (1: plain speculative decoding), and
`length`, the longest draft. None drafts to the horizon T every time, as the paper does; a length K stops after K
tokens, and if all K are accepted one more token, the *bonus*, is sampled from the target without a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory import batch
from outrider.theory.chains import Chain
from outrider.theory.checks import fraction, positive_int

Array = npt.NDArray[np.float64]
Counter = Callable[[Array], Array]


def per_position(chain: Chain, drafts: int | float = 1) -> Array:
    """(T,): probability that the n-th output token comes from a rejection; drafts to the horizon.

    For one draft this is E_{x ~ p} TV(p_n, q_n)(x_{n-1}): Yin et al., NeurIPS 2024, Theorem 1; see
    `batch.per_position` for more.

    >>> from outrider.theory.chains import iid
    >>> per_position(iid([0.5, 0.5], [0.9, 0.1], horizon=3))
    array([0.4, 0.4, 0.4])
    """
    if drafts != 1:
        return batch.per_position(chain, drafts)
    out, pi = np.empty(chain.horizon), chain.start
    for part in chain.chunks():
        p = chain.target[part]
        distance = np.maximum(p - chain.draft[part], 0.0).sum(axis=2)
        for n in range(len(p)):
            out[part.start + n] = pi @ distance[n]
            pi = pi @ p[n]
    return out


def expected_rejections(chain: Chain, drafts: int | float = 1) -> float:
    """E[N_rej] = sum_n E TV(p_n, q_n), drafts to the horizon, in O(T V^2).

    Source: Yin et al., NeurIPS 2024, Theorem 1 (one draft) and Theorem 3 (`drafts` of them).

    >>> from outrider.theory.chains import best_guess
    >>> round(expected_rejections(best_guess(states=7, horizon=50, seed=10)), 4)
    16.4049
    """
    return float(per_position(chain, drafts).sum())


def lower_bound(chain: Chain) -> float:
    """The least E[N_rej] of any unbiased rule of the paper's family; speculative decoding attains it.

    Source: Yin et al., NeurIPS 2024, Theorem 2. The family: one draft path; the candidate for position n is accepted
    with a probability b(candidate, verified prefix), and after a refusal the token is drawn from a law that depends on
    the verified prefix. Being unbiased means p - b q >= 0, hence b <= min(1, p/q), hence P(reject) >= TV(p, q).

    The family is narrow. A rule that also looks at later candidates of the same path is outside it and may reject less
    often at no further cost: block verification (Sun et al., ICLR 2025) does. So are several drafts (`batch`).

    >>> from outrider.theory.chains import best_guess
    >>> lower_bound(best_guess()) == expected_rejections(best_guess())
    True
    """
    return expected_rejections(chain, 1)


@dataclass(frozen=True, slots=True, eq=False)
class CountLaw:
    """The law of a count, such as the number of rejections in one output of T tokens.

    Attributes:
        pmf: (T + 1,), `pmf[k]` is the probability of the value k.
    """

    pmf: Array

    @property
    def mean(self) -> float:
        return float(self.pmf @ np.arange(len(self.pmf)))

    @property
    def variance(self) -> float:
        return float(self.pmf @ (np.arange(len(self.pmf)) - self.mean) ** 2)

    @property
    def standard_deviation(self) -> float:
        return float(np.sqrt(self.variance))

    def quantile(self, level: float) -> int:
        """The least k with P(count <= k) >= level, 0 <= level <= 1; for level 0 the least possible value.

        >>> CountLaw(np.array([0.25, 0.5, 0.25])).quantile(0.5)
        1
        """
        level = fraction("level", level)
        possible = np.flatnonzero(self.pmf > 0.0)
        reached = self.pmf.cumsum()[possible] >= min(level, 1.0) * (1.0 - 4e-15 * len(self.pmf))
        return int(possible[np.argmax(reached)] if reached.any() else possible[-1])

    def tail(self, k: int) -> float:
        """P(count >= k).

        >>> CountLaw(np.array([0.25, 0.5, 0.25])).tail(1)
        0.75
        """
        return float(self.pmf[max(0, k) :].sum())


def rejection_law(chain: Chain, drafts: int | float = 1, length: int | None = None) -> CountLaw:
    """The exact law of the number of rejections, in O(T^2 V^2) (times `length` where one is given).

    A dynamic program over (last token, position within the draft, count): from a root (the position after a
    rejection, a bonus, or the prompt) the flow p - g_{M+1} accepts and g_{M+1} rejects, from a deeper one min(p, q)
    and (p - q)_+ (g as in `batch`). Derived from the steps in the proof of Yin et al., NeurIPS 2024, Theorem 3.

    Args:
        drafts: M >= 1 or `math.inf`.
        length: longest draft, >= 0; 0 is plain decoding. None: to the horizon.

    >>> from outrider.theory.chains import best_guess
    >>> law = rejection_law(best_guess(), drafts=4)
    >>> round(law.mean, 4), round(law.standard_deviation, 3), law.quantile(0.5)
    (14.0901, 2.739, 14)
    """
    return CountLaw(_end(chain, drafts, length, chain.horizon + 1, on_rejection=_shift).sum(axis=(0, 2)))


def call_law(chain: Chain, drafts: int | float = 1, length: int | None = None) -> CountLaw:
    """The exact law of the number of target calls; arguments and cost as for `rejection_law`.

    >>> from outrider.theory.chains import iid
    >>> call_law(iid([0.5, 0.5], [0.5, 0.5], horizon=5), length=2).pmf  # 2 drafted and a bonus, twice
    array([0., 0., 1., 0., 0., 0.])
    """
    return CountLaw(_end(chain, drafts, length, chain.horizon + 1, on_call=_shift).sum(axis=(0, 2)))


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and standard deviation of a count."""

    mean: float
    standard_deviation: float


def rejection_moments(chain: Chain, drafts: int | float = 1, length: int | None = None) -> Moments:
    """Mean and standard deviation of the number of rejections, without its law: O(T V^2) (times `length`).

    >>> from outrider.theory.chains import best_guess
    >>> round(rejection_moments(best_guess()).standard_deviation, 3)
    3.329
    """
    return _moments(_end(chain, drafts, length, 3, on_rejection=_count))


def call_moments(chain: Chain, drafts: int | float = 1, length: int | None = None) -> Moments:
    """Mean and standard deviation of the number of target calls; as `rejection_moments`.

    >>> from outrider.theory.chains import iid
    >>> call_moments(iid([0.5, 0.5], [0.5, 0.5], horizon=5), length=0)
    Moments(mean=5.0, standard_deviation=0.0)
    """
    return _moments(_end(chain, drafts, length, 3, on_call=_count))


@dataclass(frozen=True, slots=True)
class Calls:
    """Expected counts of one output of T tokens: four counters that are easily taken for each other.

    Attributes:
        tokens: T.
        calls: target calls. With drafts to the horizon, E[N_rej] + 1 - P(R_T = 1).
        rejections: tokens that came from a rejection.
        bonus: tokens sampled from the target after a fully accepted draft; 0 with drafts to the horizon.
        accepted: tokens that were drafted and accepted: T - rejections - bonus.
    """

    tokens: int
    calls: float
    rejections: float
    bonus: float

    @property
    def accepted(self) -> float:
        return self.tokens - self.rejections - self.bonus

    @property
    def tokens_per_call(self) -> float:
        """T / E[calls]: the speed-up over plain decoding in target calls, when drafting costs nothing.

        Yin et al. print T / E[N_rej] instead, which is infinite for a perfect draft where this is T.
        """
        return self.tokens / self.calls


def calls(chain: Chain, drafts: int | float = 1, length: int | None = None) -> Calls:
    """Expected calls, rejections, bonus and accepted tokens, in O(T V^2) (times `length`).

    Position j of the draft is part of the state: j = 0 begins a call and has M = `drafts` candidates, 0 < j < length
    has one, j = length takes the bonus and goes back to 0; a rejection goes back to 0. A draft is cut at the horizon.
    For independent tokens with acceptance alpha this is the renewal process of Leviathan et al., ICML 2023, with
    (1 - alpha^{K+1}) / (1 - alpha) tokens per call.

    >>> from outrider.theory.chains import best_guess
    >>> round(calls(best_guess()).tokens_per_call, 3)
    2.921
    >>> round(calls(best_guess(), length=3).calls, 2), round(calls(best_guess(), length=3).bonus, 2)
    (21.11, 6.02)
    """
    begun = rejected = bonus = 0.0
    for step in _steps(chain, drafts, length, rows=1):
        begun, rejected, bonus = begun + step.begun.sum(), rejected + step.rejected.sum(), bonus + step.bonus.sum()
    return Calls(chain.horizon, float(begun), float(rejected), float(bonus))


def _same(mass: Array) -> Array:
    return mass


def _shift(mass: Array) -> Array:
    """Count one event in a (K, V) table of masses by count. The last row overflows only where no mass can be."""
    return np.concatenate([np.zeros_like(mass[:1]), mass[:-1]])


def _count(mass: Array) -> Array:
    """Count one event in the factorial moments (mass, E[N], E[N(N-1)/2]): a product with 1 + e, to second order."""
    return mass + _shift(mass)


def _moments(end: Array) -> Moments:
    _, mean, pairs = (float(x) for x in end.sum(axis=(0, 2)))
    return Moments(mean, float(np.sqrt(max(0.0, 2.0 * pairs + mean - mean * mean))))


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """What happened at one position: (rows, V) masses by last token, and the (S, rows, V) state after it."""

    begun: Array
    rejected: Array
    bonus: Array
    state: Array


def _end(chain: Chain, drafts: int | float, length: int | None, rows: int, **counters: Counter) -> Array:
    """(S, rows, V) after the last position."""
    state = np.empty(0)
    for step in _steps(chain, drafts, length, rows, **counters):
        state = step.state
    return state


def _steps(
    chain: Chain,
    drafts: int | float,
    length: int | None,
    rows: int,
    on_rejection: Counter = _same,
    on_call: Counter = _same,
) -> Iterator[_Step]:
    """Walk the positions with `rows` masses at once, row zero beginning as the prompt's law.

    States of the draft: 0 at a root, j after j accepted tokens, up to `length`; with drafts to the horizon all j >= 1
    behave alike and are one state. The counters act on the rows when a token is rejected and when a call begins.
    """
    drafts = batch.check_drafts(drafts)
    if length is not None and positive_int("length", length, low=0) >= chain.horizon:
        length = None  # every draft is cut at the horizon: the same
    state = np.zeros((2 if length is None else length + 1, rows, chain.states))
    state[0, 0] = chain.start
    for part in chain.chunks():
        p, q = chain.target[part], chain.draft[part]
        deep, root, least = np.maximum(p - q, 0.0), batch.refused(p, q, drafts), np.minimum(p, q)
        for n in range(len(p)):
            state[0] = on_call(state[0])
            begun = state[0]
            taken = state if length is None else state[:-1]  # the states in which a draft token is judged
            bonus = state[-1] @ p[n] if length is not None else np.zeros_like(begun)
            after = np.zeros_like(state)
            rejected = np.zeros_like(begun)
            if len(taken):
                rejected = taken[0] @ root[n] + (taken[1:] @ deep[n]).sum(axis=0)
                after[1] = taken[0] @ (p[n] - root[n])
                after[1 if length is None else 2 :] += taken[1:] @ least[n]
            after[0] += on_rejection(rejected) + bonus
            state = after
            yield _Step(begun, rejected, bonus, state)
