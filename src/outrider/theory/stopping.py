"""When to stop drafting: rules that look at the draft only, and so leave every exact verification exact.

Drafting token i + 1 after tokens 1..i costs time and pays if all of them are accepted. Let a_i be the probability that
the i-th token is accepted if it is reached, known to the drafter once it is drafted (from its own confidence, say), and
S_i = a_1 ... a_i. A round that drafts k tokens yields 1 + S_1 + ... + S_k tokens on average and takes a verification
and k draft steps. Whether token i + 1 is drafted may depend on all that the drafter has seen so far, but a token once
drawn has to be submitted: dropping a drawn token because it looks bad biases the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.sparse import csr_array
from scipy.special import betainc, betaincinv

from outrider.theory.checks import number, positive_int, probabilities, real
from outrider.theory.laws import Array, within_unit


@dataclass(frozen=True, slots=True)
class Renewal:
    """The policy with the most tokens per unit of time.

    Attributes:
        rate: rho*, tokens per unit of time.
        threshold: continue if and only if S_i exceeds it, rho* c / E[a]; drafting stops at the length cap anyway.
    """

    rate: float
    threshold: float


def should_continue(
    survival: npt.ArrayLike, expected: npt.ArrayLike, rate: float, draft_cost: float
) -> npt.NDArray[np.bool_]:
    """Whether to draft one token more: S_i E[a_{i+1} | what the drafter knows] > rate * draft_cost, (...).

    With `rate` the optimal tokens per time this maximises the long-run rate: looking one step ahead is enough, because
    S_i only falls, so a step that does not pay now will not pay later. Source: optimal stopping in the monotone case
    (Chow, Robbins, Siegmund, 1971) applied to the renewal-reward ratio.

    >>> should_continue([0.9, 0.1], 0.5, rate=2.0, draft_cost=0.1)
    array([ True, False])
    """
    s = real("survival", survival)
    s = within_unit("survival", s, s.shape)
    mean = within_unit("expected", expected, s.shape)
    return np.asarray(s * mean > number("rate", rate, low=0.0) * number("draft_cost", draft_cost, low=0.0))


def renewal(
    values: npt.ArrayLike,
    weights: npt.ArrayLike,
    draft_cost: float,
    verify_cost: float = 1.0,
    max_length: int = 64,
    grid: int = 2001,
) -> Renewal:
    """The optimal rate and threshold when a_1, a_2, ... are independent draws from a known law.

    rho* is the root of: best expected (tokens - rho time) of a round = 0. The best value is a recursion in the
    survival s, u(s) = max(0, s E[a] - rho c + E u(s a)), taken `max_length` times on a grid of s in [0, 1] with linear
    interpolation: exact where u is linear, otherwise the error is O(1 / grid^2).

    Args:
        values, weights: (n,) the law of a: values in [0, 1], weights that sum to one. For measured acceptances a
            histogram of a few hundred bins is enough; see `beta_law` for a Beta law.
        draft_cost: time of one draft step, > 0; verify_cost: time of one verification, > 0.
        max_length: cap on the tokens drafted in a round.
        grid: points in s.

    Source: Dinkelbach's form of the renewal-reward ratio, and `should_continue`.

    >>> result = renewal(*beta_law(3.0, 1.2), draft_cost=0.08)
    >>> round(result.rate, 3), round(result.threshold, 3)
    (2.237, 0.251)
    """
    a, law = _law(values, weights)
    cost, verify = _positive("draft_cost", draft_cost), _positive("verify_cost", verify_cost)
    cap, points = positive_int("max_length", max_length), np.linspace(0.0, 1.0, positive_int("grid", grid, low=2))
    later, mean = _interpolation(points, a, law), float(law @ a)

    def surplus(rate: float) -> float:
        future = np.zeros(len(points))
        for _ in range(cap):
            update = np.maximum(points * mean - rate * cost + later @ future, 0.0)
            if np.array_equal(update, future):
                break
            future = update
        return 1.0 - rate * verify + float(future[-1])

    # Never drafting gives the lower end; all tokens accepted at no cost, the upper.
    low, high = 1.0 / verify, (cap + 1.0) / verify
    rate = low if surplus(low) <= 0.0 else float(brentq(surplus, low, high, xtol=1e-14, rtol=1e-14))  # pyright: ignore[reportArgumentType]
    return Renewal(rate, rate * cost / mean if mean > 0 else float("inf"))


def fixed_rate(mean: float, length: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Tokens per unit of time when every round drafts `length` tokens of mean acceptance `mean`, independent.

    >>> round(fixed_rate(3 / 4.2, 5, draft_cost=0.08), 4)
    2.168
    """
    m, n = number("mean", mean, 0.0, 1.0), positive_int("length", length, low=0)
    time = _positive("verify_cost", verify_cost) + n * _positive("draft_cost", draft_cost)
    return float((m ** np.arange(n + 1)).sum()) / time


def beta_law(a: float, b: float, points: int = 200) -> tuple[Array, Array]:
    """(values, weights) of a law of `points` equal atoms close to Beta(a, b): the means of its quantile bins.

    The mean is that of the Beta law, to rounding.

    >>> values, weights = beta_law(3.0, 1.0, points=4)
    >>> bool(abs(values @ weights - 0.75) < 1e-12)
    True
    """
    a, b, n = _positive("a", a), _positive("b", b), positive_int("points", points)
    edges = betaincinv(a, b, np.linspace(0.0, 1.0, n + 1))
    # E[x; x <= e] = a / (a + b) times the distribution function of Beta(a + 1, b).
    means = n * a / (a + b) * np.diff(betainc(a + 1.0, b, edges))
    return np.clip(means, 0.0, 1.0), np.full(n, 1.0 / n)


def specdec_threshold(discard_cost: float, verify_cost: float, overhead: float = 0.0) -> float:
    """(c2 + d) / (c1 + c2 + d): stop when the probability that some drafted token is rejected reaches this.

    c1 is the cost of a draft token that is discarded, c2 of a verification, d >= 0 what a later stop loses besides.
    Source: Huang et al., "SpecDec++", 2024 (arXiv 2405.19715), Theorem 3.1.

    >>> specdec_threshold(1.0, 1.0), specdec_threshold(1.0, 2.0, 1.0)
    (0.5, 0.75)
    """
    c1, c2 = _positive("discard_cost", discard_cost), number("verify_cost", verify_cost, low=0.0)
    rest = c2 + number("overhead", overhead, low=0.0)
    return rest / (c1 + rest)


def specdec_length(acceptances: npt.ArrayLike, threshold: float) -> npt.NDArray[np.intp]:
    """(...): tokens drafted by SpecDec++ when they have the predicted `acceptances` (..., K), K the length cap.

    Drafting stops after the first k with 1 - a_1 ... a_k > threshold; that token is submitted too.

    >>> specdec_length([[0.9, 0.9, 0.9], [0.5, 0.5, 0.5]], threshold=0.7)
    array([3, 2])
    """
    a = real("acceptances", acceptances)
    if a.ndim == 0 or a.shape[-1] == 0:
        raise ValueError(f"acceptances must have at least one token along its last axis, got shape {a.shape}")
    stop = 1.0 - np.cumprod(within_unit("acceptances", a, a.shape), axis=-1) > number("threshold", threshold, 0.0, 1.0)
    stop[..., -1] = True
    return stop.argmax(axis=-1) + 1


def _interpolation(points: Array, values: Array, law: Array) -> csr_array:
    """The matrix that takes u on `points` to E u(s a) on `points`, by linear interpolation."""
    size = len(points)
    place = points[:, None] * values * (size - 1)
    left = np.minimum(place.astype(np.intp), size - 2)
    share = place - left
    rows = np.repeat(np.arange(size), 2 * len(values))
    columns = np.stack([left, left + 1], axis=-1).ravel()
    entries = (np.stack([1.0 - share, share], axis=-1) * law[:, None]).ravel()
    return csr_array((entries, (rows, columns)), shape=(size, size))


def _law(values: npt.ArrayLike, weights: npt.ArrayLike) -> tuple[Array, Array]:
    a, law = real("values", values, ndim=1), probabilities("weights", weights, ndim=1)
    return np.array(within_unit("values", a, law.shape)), law


def _positive(name: str, value: float) -> float:
    result = number(name, value, low=0.0)
    if result == 0.0:
        raise ValueError(f"{name} must be positive, got 0")
    return result
