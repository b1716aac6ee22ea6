"""Shared randomness instead of acceptance tests: how often draft and target pick the same token.

Give every token an exponential clock E_i, shared by drafter and verifier. The drafter takes argmin E_i / q_i, the
verifier argmin E_i / p_i, which has law p whatever the drafter did. The draft counts as accepted while both agree, and
the first disagreement is already the right token. The coupling is not the maximal one, but the output does not depend
on the drafter at all, and q is not needed to verify.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from outrider.theory.batch import total_variation
from outrider.theory.checks import positive_int
from outrider.theory.laws import Array, pair, ratio


def match_by_token(target: npt.ArrayLike, draft: npt.ArrayLike) -> Array:
    """P(both take token i), (..., V): 1 / sum_j max(p_j / p_i, q_j / q_i), zero where p_i or q_i is. O(V log V) a row.

    The clock of i has to win both races; E_j must exceed E_i max(p_j / p_i, q_j / q_i) for every j. Sorted by p/q, the
    maximum is q_j / q_i up to i and p_j / p_i after it, so two prefix sums give all V sums.
    Source: Daliri et al., "Coupling without communication", 2024 (arXiv 2408.07978).

    >>> match_by_token([0.5, 0.5], [1.0, 0.0])
    array([0.5, 0. ])
    """
    p, q = pair(target, draft)
    reach = _reach(p, q)
    return ratio(p * q, reach, 0.0)


def match_probability(target: npt.ArrayLike, draft: npt.ArrayLike) -> Array:
    """P(both take the same token), (...): the sum of `match_by_token`.

    >>> float(match_probability([0.5, 0.5], [0.5, 0.5])), float(match_probability([0.5, 0.5], [1.0, 0.0]))
    (1.0, 0.5)
    """
    return match_by_token(target, draft).sum(axis=-1)


def match_bounds(target: npt.ArrayLike, draft: npt.ArrayLike) -> tuple[Array, Array]:
    """((1 - TV) / (1 + TV), 1 - TV): `match_probability` is between them; the upper one is the maximal coupling.

    Source: Daliri et al., 2024 (arXiv 2408.07978), Theorem 2.

    >>> low, high = match_bounds([0.5, 0.5], [1.0, 0.0])
    >>> round(float(low), 4), float(high)
    (0.3333, 0.5)
    """
    tv = total_variation(target, draft)
    return (1.0 - tv) / (1.0 + tv), 1.0 - tv


def list_match_bound(target: npt.ArrayLike, draft: npt.ArrayLike, lists: int) -> Array:
    """Lower bound on P(the output is among K draft tokens), (...), with K = `lists` independent sets of clocks.

    Draft k takes argmin_i E_i^k / q_i, the verifier argmin_i min_k E_i^k / p_i, which has law p. The bound is
    sum_j K / (sum_i max(p_i / p_j, q_i / q_j) + (K - 1) / p_j): the probability that j wins and that the set of clocks
    with which it wins also makes it the draft; exact for K = 1.
    Source: "List-level coupling" (GLS), 2025 (arXiv 2506.05632).

    >>> float(list_match_bound([0.5, 0.5], [1.0, 0.0], 1)), round(float(list_match_bound([0.5, 0.5], [1.0, 0.0], 2)), 4)
    (0.5, 0.5)
    """
    p, q = pair(target, draft)
    k = positive_int("lists", lists)
    # Both sides of the fraction times p_j q_j: no division by a probability.
    return ratio(k * p * q, _reach(p, q) + (k - 1) * q, 0.0).sum(axis=-1)


def simulate_lists(
    target: npt.ArrayLike, draft: npt.ArrayLike, lists: int, samples: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """(outputs (n,), drafts (n, K)) of the race with K = `lists` sets of clocks, for one pair of laws (V,).

    >>> outputs, drafts = simulate_lists([1.0, 0.0], [0.5, 0.5], 2, samples=3, rng=np.random.default_rng(0))
    >>> outputs, drafts.shape
    (array([0, 0, 0]), (3, 2))
    """
    p, q = pair(target, draft, ndim=1)
    shape = (positive_int("samples", samples), positive_int("lists", lists), len(p))
    clocks = rng.exponential(size=shape)
    drafts = ratio(clocks, np.broadcast_to(q, shape), np.inf).argmin(axis=2)
    return ratio(clocks.min(axis=1), np.broadcast_to(p, (shape[0], len(p))), np.inf).argmin(axis=1), drafts


def _reach(p: Array, q: Array) -> Array:
    """p_i q_i sum_j max(p_j / p_i, q_j / q_i), (..., V)."""
    order = np.argsort(ratio(p, q, np.inf), axis=-1)
    p_sorted, q_sorted = np.take_along_axis(p, order, -1), np.take_along_axis(q, order, -1)
    after = np.cumsum(p_sorted[..., :0:-1], axis=-1)[..., ::-1]
    after = np.concatenate([after, np.zeros((*p.shape[:-1], 1))], axis=-1)
    reach = np.empty_like(p)
    np.put_along_axis(reach, order, p_sorted * np.cumsum(q_sorted, axis=-1) + q_sorted * after, axis=-1)
    return reach
