"""Biased rules along a Markov chain: expected rejections, per-step bias, and what that says about whole sequences.

A rule gives each position its acceptance b_n and residual P_n, hence an output kernel pi_n = b_n q_n + R_n P_n. States
are visited under the algorithm's own law, the product of the pi_n, and under it the identity of `pareto` adds up:

    E[N_rej] + sum_n E[bias_n] = sum_n E[TV(p_n, q_n)] + sum_n E[excess_n]     (bias with optimal residuals)

so with over-accepting rules it does not matter, in total variation, in which contexts a bias is spent. The bias of the
sequence law has no polynomial-time formula in general; here are bounds on it, an unbiased estimate, and enumeration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory import pareto
from outrider.theory.batch import total_variation
from outrider.theory.chains import Chain
from outrider.theory.checks import positive_int, probabilities, same_shape
from outrider.theory.laws import Array, Estimate, within_unit

LARGEST = 1 << 24
"""Strings that `sequence_tv` is willing to enumerate."""


@dataclass(frozen=True, slots=True, eq=False)
class Tradeoff:
    """A biased rule on a chain. All arrays are (T,), expectations per position under the algorithm's own states.

    Attributes:
        kernels: (T, V, V), the output kernels pi_n.
        reject: P(n-th token came from a rejection).
        bias: E TV(pi_n, p_n).
        optimal_bias: E sum (b q - p)_+, what optimal residuals would give; equals `bias` when they are used.
        tv: E TV(p_n, q_n).
        excess: E sum (min(p, q) - b q)_+; reject + optimal_bias = tv + excess.
        bias_on_target: E TV(pi_n, p_n) with states under the target's law instead.
        lower, upper: bounds on the total variation between the two laws of x_1..x_T: `upper` is the lesser of the sums
            of `bias` and of `bias_on_target` (replace one kernel after the other), at most one; `lower` is the largest
            total variation between the two laws of one pair (x_{n-1}, x_n).
    """

    kernels: Array
    reject: Array
    bias: Array
    optimal_bias: Array
    tv: Array
    excess: Array
    bias_on_target: Array
    lower: float
    upper: float


def tradeoff(chain: Chain, accept: npt.ArrayLike, residual: npt.ArrayLike | None = None) -> Tradeoff:
    """The rule (b, P) on `chain`, in O(T V^2).

    Args:
        chain: the instance.
        accept: b, in [0, 1], (T, V, V) or broadcast to it; indexed as the kernels, `accept[n, x, y]`.
        residual: P, (T, V, V) laws along the last axis; None takes `pareto.optimal_residual`.

    Source: per position Yin et al., NeurIPS 2024, Theorems 4 and 5; the sequence level is left open there.

    >>> from outrider.theory.chains import best_guess
    >>> chain = best_guess(states=3, horizon=4)
    >>> t = tradeoff(chain, pareto.epsilon_acceptance(chain.target, chain.draft, 0.1))
    >>> bool(abs(t.reject.sum() + t.bias.sum() - t.tv.sum()) < 1e-12), t.lower <= t.upper
    (True, True)
    """
    p, q = chain.target, chain.draft
    b = within_unit("accept", accept, p.shape)
    law = pareto.optimal_residual(p, q, b) if residual is None else probabilities("residual", residual, ndim=3)
    same_shape("residual", law, "target", p)
    kernels = pareto.output_kernel(q, b, law)
    bias = 0.5 * np.abs(kernels - p).sum(axis=2)
    ours, theirs = _states(chain.start, kernels), _states(chain.start, p)

    def mean(values: Array, states: Array = ours) -> Array:
        return np.asarray((states[:-1] * values).sum(axis=1))

    expected, on_target = mean(bias), mean(bias, theirs)
    pairs = np.abs(ours[:-1, :, None] * kernels - theirs[:-1, :, None] * p).sum(axis=(1, 2))
    upper = min(1.0, float(expected.sum()), float(on_target.sum()))
    return Tradeoff(
        kernels=kernels,
        reject=mean(pareto.rejection_probability(q, b)),
        bias=expected,
        optimal_bias=mean(pareto.optimal_loss(p, q, b)),
        tv=mean(total_variation(p, q)),
        excess=mean(pareto.excess(p, q, b)),
        bias_on_target=on_target,
        lower=min(0.5 * float(pairs.max()), upper),  # rounding must not put it above a bound that it attains
        upper=upper,
    )


def sequence_tv(chain: Chain, kernels: npt.ArrayLike) -> float:
    """TV between the laws of x_1..x_T under `kernels`, (T, V, V), and under the target, by enumeration of strings.

    Raises:
        ValueError: V^(T+1) exceeds `LARGEST`.

    >>> from outrider.theory.chains import iid
    >>> chain = iid(draft=[0.5, 0.5], target=[1.0, 0.0], horizon=2)
    >>> sequence_tv(chain, chain.draft)
    0.75
    """
    pi = _kernels(chain, kernels)
    if chain.states ** (chain.horizon + 1) > LARGEST:
        raise ValueError(
            f"chain must have at most {LARGEST} strings, got {chain.states}^{chain.horizon + 1}; "
            "use estimate_sequence_tv"
        )
    # Rows are strings from the prompt to x_{n-1}, columns x_n; the prompt is summed out last.
    ours = theirs = chain.start[None, :]
    for n in range(chain.horizon):
        ours, theirs = (_extend(a, k[n]) for a, k in ((ours, pi), (theirs, chain.target)))
    strings = (chain.states, -1, chain.states)
    return 0.5 * float(np.abs(ours.reshape(strings).sum(axis=0) - theirs.reshape(strings).sum(axis=0)).sum())


def estimate_sequence_tv(chain: Chain, kernels: npt.ArrayLike, samples: int, rng: np.random.Generator) -> Estimate:
    """Unbiased estimate of TV of the laws of (x_0, x_1..x_T): the mean of (1 - P(x) / p(x))_+ over x from the target.

    With the prompt known, which is at least `sequence_tv` (equal for a deterministic prompt). Samples are in [0, 1].

    >>> from outrider.theory.chains import iid
    >>> chain = iid(draft=[0.5, 0.5], target=[1.0, 0.0], horizon=2)
    >>> estimate_sequence_tv(chain, chain.draft, samples=10, rng=np.random.default_rng(0)).value
    0.75
    """
    pi, count = _kernels(chain, kernels), positive_int("samples", samples, low=2)
    x = _draw(np.broadcast_to(chain.start, (count, chain.states)), rng)
    log_ratio = np.zeros(count)
    for n in range(chain.horizon):
        y = _draw(chain.target[n][x], rng)
        with np.errstate(divide="ignore"):  # a token that the rule never outputs: ratio zero
            log_ratio += np.log(pi[n, x, y]) - np.log(chain.target[n, x, y])
        x = y
    return Estimate.of(-np.expm1(np.minimum(log_ratio, 0.0)))


def _kernels(chain: Chain, kernels: npt.ArrayLike) -> Array:
    pi = probabilities("kernels", kernels, ndim=3)
    same_shape("kernels", pi, "target", chain.target)
    return pi


def _states(start: Array, kernels: Array) -> Array:
    """(T + 1, V): laws of x_0, ..., x_T."""
    out = np.empty((len(kernels) + 1, len(start)))
    out[0] = start
    for n, kernel in enumerate(kernels):
        out[n + 1] = out[n] @ kernel
    return out


def _extend(measure: Array, kernel: Array) -> Array:
    """(S, V) over (string, last token) to (S V, V): one token more."""
    return (measure[:, :, None] * kernel).reshape(-1, kernel.shape[1])


def _draw(rows: Array, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """One token from each row, by inversion; never one of probability zero."""
    total = np.cumsum(rows, axis=1)
    return (total <= rng.random(len(rows))[:, None] * total[:, -1:]).sum(axis=1)
