"""Small parts that the modules on one conditional law share: pairs of laws, acceptance functions, normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory.checks import probabilities, real, same_shape

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A Monte Carlo mean and its standard error (sample deviation over the square root of the sample size).

    >>> Estimate(0.5, 0.01).standard_error
    0.01
    """

    value: float
    standard_error: float

    @classmethod
    def of(cls, samples: Array) -> Estimate:
        """The mean of at least two samples.

        >>> Estimate.of(np.array([0.0, 1.0]))
        Estimate(value=0.5, standard_error=0.5)
        """
        if samples.size < 2:
            raise ValueError(f"samples must number at least 2, got {samples.size}")
        return cls(float(samples.mean()), float(samples.std(ddof=1) / np.sqrt(samples.size)))


def pair(target: npt.ArrayLike, draft: npt.ArrayLike, ndim: int | None = None) -> tuple[Array, Array]:
    """Both laws as float64 (..., V), after checking that they are distributions of one shape.

    >>> pair([0.5, 0.5], [1, 0])
    (array([0.5, 0.5]), array([1., 0.]))
    """
    p, q = probabilities("target", target, ndim), probabilities("draft", draft, ndim)
    same_shape("target", p, "draft", q)
    return p, q


def within_unit(name: str, array: npt.ArrayLike, shape: tuple[int, ...]) -> Array:
    """`array` as float64, broadcast to `shape`, after checking that its values are in [0, 1].

    >>> within_unit("budget", 0.1, (2,))
    array([0.1, 0.1])
    """
    values = real(name, array)
    wrong = (values < 0.0) | (values > 1.0)
    if wrong.any():
        raise ValueError(f"{name} must be in [0, 1], got {values[wrong].flat[0]:g}")
    return _broadcast(name, values, shape)


def not_negative(name: str, array: npt.ArrayLike, shape: tuple[int, ...]) -> Array:
    """`array` as float64, broadcast to `shape`, after checking that its values are not negative.

    >>> not_negative("eps", 2, ())
    array(2.)
    """
    values = real(name, array)
    if (values < 0.0).any():
        raise ValueError(f"{name} must not be negative, got {values[values < 0].flat[0]:g}")
    return _broadcast(name, values, shape)


def _broadcast(name: str, values: Array, shape: tuple[int, ...]) -> Array:
    try:
        return np.broadcast_to(values, shape)
    except ValueError:
        raise ValueError(f"{name} must have shape {shape} or broadcast to it, got {values.shape}") from None


def ratio(numerator: Array, denominator: Array, otherwise: float) -> Array:
    """numerator / denominator, and `otherwise` where the denominator is zero.

    A quotient too large for float64 is infinite.

    >>> ratio(np.array([1.0, 1.0]), np.array([2.0, 0.0]), 0.0)
    array([0.5, 0. ])
    """
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), otherwise)
    with np.errstate(over="ignore"):
        return np.divide(numerator, denominator, out=out, where=denominator > 0)


def normalised(measure: Array, otherwise: Array) -> Array:
    """`measure` (..., V), not negative, divided by its sum along the last axis; `otherwise` where that sum is zero.

    >>> normalised(np.array([[1.0, 3.0], [0.0, 0.0]]), np.array([1.0, 0.0]))
    array([[0.25, 0.75],
           [1.  , 0.  ]])
    """
    # Two divisions: the sum of a row of subnormal numbers may have no reciprocal.
    top = measure.max(axis=-1, keepdims=True)
    scaled = ratio(measure, top, 0.0)
    return np.where(top > 0, ratio(scaled, scaled.sum(axis=-1, keepdims=True), 0.0), otherwise)


def kl_divergence(first: npt.ArrayLike, second: npt.ArrayLike) -> Array:
    """KL(first || second) in nats along the last axis, (...): infinite where `second` misses a part of `first`.

    >>> float(kl_divergence([0.5, 0.5], [0.5, 0.5])), float(kl_divergence([0.5, 0.5], [1.0, 0.0]))
    (0.0, inf)
    """
    a, b = probabilities("first", first), probabilities("second", second)
    same_shape("first", a, "second", b)
    return kl_unchecked(a, b)


def kl_unchecked(a: Array, b: Array) -> Array:
    """`kl_divergence` without the checks: also for laws whose sums are off by rounding."""
    quotient = ratio(a, b, np.inf)
    logs = np.log(quotient, out=np.zeros_like(quotient), where=a > 0)
    # A sum of signed terms may come out at -1e-17 where the laws agree.
    return np.maximum(np.multiply(a, logs, out=np.zeros_like(logs), where=a > 0).sum(axis=-1), 0.0)
