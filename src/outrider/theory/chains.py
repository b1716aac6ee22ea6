"""Instances of the theory: a target and a draft that are Markov chains over the same few states.

A prompt x_0 is drawn from `start`; the n-th token follows `target[n - 1, x_{n-1}, :]`, and a drafter proposes it from
`draft[n - 1, x_{n-1}, :]`. On such a pair everything that Yin et al. (NeurIPS 2024) state for general models is a sum
over V states instead of V^T prefixes, so it can be computed exactly (`rejections`, `batch`) and simulated (`simulate`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory.checks import positive_int, probabilities, same_shape

_CHUNK = 1 << 17
"""Transition probabilities handled at once: 1 MiB of float64, so that passes over a chunk stay in the cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """A pair of nonstationary Markov chains over V states and T positions.

    Attributes:
        start: (V,), law of the prompt x_0.
        draft: (T, V, V), `draft[n, x, y]` is the probability that the drafter proposes y as x_{n+1} after x_n = x.
        target: (T, V, V), the same for the target.

    Arrays are checked, turned into float64 and held as read-only views (a view of the caller's memory where it is
    float64 already).

    Raises:
        ValueError: an array is not made of distributions, or the shapes disagree; the message names the array.

    >>> chain = Chain(start=[1.0, 0.0], draft=[[[0.5, 0.5], [0.5, 0.5]]], target=[[[0.9, 0.1], [0.2, 0.8]]])
    >>> chain.states, chain.horizon
    (2, 1)
    """

    start: npt.NDArray[np.float64]
    draft: npt.NDArray[np.float64]
    target: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        start = probabilities("start", self.start, ndim=1)
        draft = _kernel("draft", self.draft)
        target = _kernel("target", self.target)
        same_shape("draft", draft, "target", target)
        if draft.shape[1] != start.shape[0]:
            raise ValueError(f"start must have {draft.shape[1]} states as draft has, got {start.shape[0]}")
        for name, array in (("start", start), ("draft", draft), ("target", target)):
            view = array.view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    @property
    def states(self) -> int:
        """V, the size of the vocabulary."""
        return self.target.shape[1]

    @property
    def horizon(self) -> int:
        """T, the number of tokens after the prompt."""
        return self.target.shape[0]

    def truncated(self, horizon: int) -> Chain:
        """The same instance, ended after `horizon` tokens; 1 <= horizon <= T.

        >>> best_guess(states=3, horizon=9).truncated(4).horizon
        4
        """
        if positive_int("horizon", horizon) > self.horizon:
            raise ValueError(f"horizon must be at most {self.horizon}, the horizon of the chain, got {horizon}")
        return Chain(self.start, self.draft[:horizon], self.target[:horizon])

    def chunks(self) -> Iterator[slice]:
        """Consecutive slices of positions, small enough that their transitions stay in the cache.

        >>> list(best_guess(states=3, horizon=9).chunks())
        [slice(0, 9, None)]
        """
        step = max(1, _CHUNK // (self.states * self.states))
        for first in range(0, self.horizon, step):
            yield slice(first, min(first + step, self.horizon))


def best_guess(states: int = 7, horizon: int = 50, seed: int = 10) -> Chain:
    """A random instance in the manner of Yin et al. (NeurIPS 2024, Appendix F): rows of uniforms, normalised.

    The paper states 7 states, T = 50 or 100, seed 10 and a uniform prompt, but not how rows are drawn. This is the
    simplest reading: `np.random.RandomState(seed)` draws `rand(horizon, states, states)` for the draft, then the same
    for the target, and each row is divided by its sum. It comes within the reading accuracy of the paper's plain
    speculative decoding (16.405 rejections where the paper's plot shows 16.41) but not of its batch curves, so the
    paper's own instance is a different one of the same kind. A shorter horizon is a different draw, not a truncation.

    >>> chain = best_guess(states=7, horizon=50, seed=10)
    >>> bool(abs(chain.target.sum(axis=2) - 1).max() < 1e-12)
    True
    """
    size = (positive_int("horizon", horizon), positive_int("states", states), states)
    if not 0 <= positive_int("seed", seed, low=0) < 2**32:
        raise ValueError(f"seed must be less than 2**32, got {seed}")
    random = np.random.RandomState(seed)
    draft, target = random.rand(*size), random.rand(*size)
    draft /= draft.sum(axis=2, keepdims=True)
    target /= target.sum(axis=2, keepdims=True)
    return Chain(np.full(states, 1.0 / states), draft, target)


def stationary(start: npt.ArrayLike, draft: npt.ArrayLike, target: npt.ArrayLike, horizon: int) -> Chain:
    """The instance whose (V, V) kernels are the same at every position. Memory stays V^2: positions share it.

    >>> chain = stationary([0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.1], [0.2, 0.8]], horizon=1000)
    >>> chain.target.shape
    (1000, 2, 2)
    """
    shape = (positive_int("horizon", horizon), -1, -1)
    kernels = probabilities("draft", draft, ndim=2), probabilities("target", target, ndim=2)
    draft, target = (np.broadcast_to(k, (shape[0], *k.shape)) for k in kernels)
    return Chain(probabilities("start", start, ndim=1), draft, target)


def iid(draft: npt.ArrayLike, target: npt.ArrayLike, horizon: int) -> Chain:
    """The instance whose tokens are independent, each with target law `target` and draft law `draft`, both (V,).

    This is the setting of Leviathan et al. (ICML 2023): every token is accepted with probability
    alpha = sum min(p, q). The prompt is uniform and without influence.

    >>> iid([0.5, 0.5], [0.9, 0.1], horizon=3).target[2, 1]
    array([0.9, 0.1])
    """
    rows = probabilities("draft", draft, ndim=1), probabilities("target", target, ndim=1)
    same_shape("draft", rows[0], "target", rows[1])
    size = rows[0].shape[0]
    draft, target = (np.broadcast_to(r, (positive_int("horizon", horizon), size, size)) for r in rows)
    return Chain(np.full(size, 1.0 / size), draft, target)


def _kernel(name: str, array: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """`array` as float64 of shape (T, V, V) with T, V >= 1 and rows that are distributions."""
    values = np.asarray(array)
    if values.ndim != 3 or 0 in values.shape or values.shape[1] != values.shape[2]:
        raise ValueError(f"{name} must have shape (T, V, V) with T, V >= 1, got {values.shape}")
    if values.dtype != np.float64:
        return probabilities(name, values, ndim=3)
    # A repeated axis (stride zero) holds one copy: checking that copy checks all of them.
    probabilities(name, values[tuple(slice(0, 1) if s == 0 else slice(None) for s in values.strides)])
    return values
