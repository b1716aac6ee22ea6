"""Instances for the tests of the theory: random, sparse and degenerate, as Hypothesis strategies and by seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from outrider.theory.chains import Chain

Array = npt.NDArray[np.float64]
Z = 6.2
"""A standard normal exceeds this in absolute value with probability 5.7e-10: the false-alarm rate of a z-test here."""
ALARM = 1e-9
"""False-alarm rate of a chi-square test here."""


def normalised(weights: npt.ArrayLike) -> Array:
    values = np.asarray(weights, dtype=np.float64)
    return values / values.sum(axis=-1, keepdims=True)


@st.composite
def rows(draw: st.DrawFn, states: int) -> Array:
    """A law over `states` outcomes with small whole weights: zeros, ties and point masses are common."""
    weights = draw(st.lists(st.integers(0, 4), min_size=states, max_size=states).filter(any))
    return normalised(weights)


@st.composite
def pairs(draw: st.DrawFn, most: int = 6) -> tuple[Array, Array]:
    """(target, draft) over 1 to `most` outcomes; sometimes equal."""
    states = draw(st.integers(1, most))
    target = draw(rows(states))
    return target, (target if draw(st.booleans()) and draw(st.booleans()) else draw(rows(states)))


@st.composite
def sparse_chains(draw: st.DrawFn, states: int = 3, horizon: int = 3) -> Chain:
    """Chains of up to `states` states and `horizon` positions with many zeros."""
    v, t = draw(st.integers(1, states)), draw(st.integers(1, horizon))
    kernels = [np.array([[draw(rows(v)) for _ in range(v)] for _ in range(t)]) for _ in range(2)]
    return Chain(draw(rows(v)), *kernels)


def spiky(states: int, horizon: int, seed: int, zeros: float = 0.0, spread: float = 3.0) -> Chain:
    """A chain with very unequal probabilities; each entry is zero with probability `zeros`."""
    random = np.random.default_rng(seed)

    def kernel() -> Array:
        weights = random.random((horizon, states, states)) ** spread + 1e-6
        weights *= random.random(weights.shape) >= zeros
        weights[weights.sum(axis=2) == 0.0] = 1.0
        return normalised(weights)

    return Chain(normalised(random.random(states)), kernel(), kernel())
