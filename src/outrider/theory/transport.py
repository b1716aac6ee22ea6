"""Several candidates at one node: the best any exact rule can do, and a plan that does it.

Choosing among k candidates is an optimal transport problem with membership cost (Sun et al., "SpecTr", NeurIPS 2023):
couple the drawn tuple with an output of law p (the target) so that the output is in the tuple as often as possible. By
max-flow min-cut the best probability is

    alpha* = 1 + min over H of [ p(H) - D(H) ],      D(H) = P(all k candidates are in H)

and the minimum is reached by a set of tokens with the smallest p/q, q the draft. For independent candidates
D(H) = q(H)^k is convex in q(H), so x belongs to the best H if and only if p_x < k s^{k-1} q_x with s = q(H). For
candidates without replacement see Hu et al., ICLR 2025. k = 1 gives 1 - TV(p, q), the maximal coupling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import coo_array

from outrider.theory.checks import positive_int, probabilities, real
from outrider.theory.laws import Array, pair, ratio
from outrider.theory.without_replacement import all_inside


@dataclass(frozen=True, slots=True, eq=False)
class Optimum:
    """The optimal acceptance and the set of tokens that limits it.

    Attributes:
        acceptance: (...), alpha*.
        blocked: (..., V), whether the token is in the minimising H; an optimal plan rejects only tuples inside H.
    """

    acceptance: Array
    blocked: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """An optimal coupling of candidate tuples and output, for small vocabularies.

    Attributes:
        acceptance: alpha*.
        mass: (N, V), probability that tuple n is drawn and its member y is output as accepted.
        residual: (V,), law of the output where no member is accepted; the target where that never happens.
    """

    acceptance: float
    mass: Array
    residual: Array


def optimal_iid(target: npt.ArrayLike, draft: npt.ArrayLike, drafts: int) -> Optimum:
    """alpha* for `drafts` independent candidates, in O(V log V) a row.

    Source: the prefix formula above; Khisti et al., 2024 (arXiv 2410.18234) for when it is one: p(H) >= q(H)^k for all H.

    >>> float(optimal_iid([0.0, 1.0], [0.5, 0.5], drafts=3).acceptance)
    0.875
    """
    p, q = pair(target, draft)
    k = positive_int("drafts", drafts)
    order = _order(p, q)
    inside = np.cumsum(np.take_along_axis(q, order, -1), axis=-1)
    return _optimum(p, q, order, inside**k, lambda mass: mass**k)


def optimal_choice(target: npt.ArrayLike, draft: npt.ArrayLike, drafts: int) -> Array:
    """(..., V), the law m of the candidate that an optimal rule judges: sum of min(target, m) is `optimal_iid`'s acceptance.

    m = clip(p, mu q, lambda q): tokens of H are lifted to the total q(H)^k, the others capped to the rest of one. It is the
    law of the best of k independent candidates under priorities that depend on the token alone (docs/theory.md, 3.1).

    >>> optimal_choice([0.0, 1.0], [0.5, 0.5], drafts=3)
    array([0.125, 0.875])
    """
    p, q = pair(target, draft)
    k = positive_int("drafts", drafts)
    blocked = optimal_iid(p, q, k).blocked & (q > 0)
    shape = (-1, p.shape[-1])
    rows = zip(p.reshape(shape), q.reshape(shape), blocked.reshape(shape), strict=True)
    return np.array([_choice(a, b, h, k) for a, b, h in rows]).reshape(p.shape)


def _choice(p: Array, q: Array, blocked: npt.NDArray[np.bool_], k: int) -> Array:
    """One row of `optimal_choice`."""
    m = np.where(q > 0, p, 0.0)
    inside = min(float(q[blocked].sum()), 1.0) ** k
    if blocked.any():
        m[blocked] = np.maximum(p[blocked], _level(p[blocked], q[blocked], inside, np.maximum) * q[blocked])
    free = ~blocked & (q > 0)
    if free.any():
        m[free] = np.minimum(p[free], _level(p[free], q[free], 1.0 - inside, np.minimum) * q[free])
    return m


def _level(p: Array, q: Array, total: float, pick: Callable[[Array, Array], Array]) -> float:
    """The level with sum of pick(p, level q) = total: linear between the ratios p / q, so found among them."""
    levels = np.unique(ratio(p, q, np.inf))
    low, high = 0, len(levels) - 1
    while low < high:  # the sum rises with the level
        middle = (low + high) // 2
        low, high = (low, middle) if pick(p, levels[middle] * q).sum() >= total else (middle + 1, high)
    edges = ratio(p, q, np.inf)
    if pick(p, levels[low] * q).sum() < total:  # above all ratios
        moved = edges <= levels[low] if pick is np.maximum else np.zeros(len(p), dtype=bool)
    else:
        moved = edges < levels[low] if pick is np.maximum else edges >= levels[low]
    return float((total - p[~moved].sum()) / q[moved].sum()) if moved.any() else float(levels[low])


def optimal_without_replacement(target: npt.ArrayLike, draft: npt.ArrayLike, drafts: int) -> Optimum:
    """alpha* for `drafts` candidates drawn without replacement (fewer if the draft's support is smaller).

    O(V log V) a row for k <= 2; otherwise the law of the drawn set is integrated numerically, see
    `without_replacement.all_inside` (error below 1e-11, seconds at V = 100,000).
    Source: Hu et al., "Towards Optimal Multi-draft Speculative Decoding", ICLR 2025.

    >>> round(float(optimal_without_replacement([0.0, 0.0, 1.0], [0.5, 0.25, 0.25], drafts=2).acceptance), 12)
    0.583333333333
    """
    p, q = pair(target, draft)
    k = positive_int("drafts", drafts)
    order = _order(p, q)
    rows = np.take_along_axis(q, order, -1).reshape(-1, q.shape[-1])
    within = np.array([all_inside(row, k) for row in rows]).reshape(q.shape)
    return _optimum(p, q, order, within, None)


def optimal_plan(target: npt.ArrayLike, tokens: npt.ArrayLike, probability: npt.ArrayLike) -> Plan:
    """An optimal coupling by linear programming: N k variables, for vocabularies of a few tokens.

    Args:
        target: (V,).
        tokens: (N, k), the tuples that can be drawn, as token numbers.
        probability: (N,), their law. Any law of tuples is allowed, whatever it came from.

    Source: Sun et al., "SpecTr", NeurIPS 2023, Section 4.

    >>> plan = optimal_plan([0.5, 0.5], tokens=[[0], [1]], probability=[0.75, 0.25])
    >>> round(plan.acceptance, 12), plan.residual
    (0.75, array([0., 1.]))
    """
    p, law = probabilities("target", target, ndim=1), probabilities("probability", probability, ndim=1)
    members = _members(tokens, len(law), len(p))
    tuple_of, token_of = np.nonzero(members)
    count, ones = len(tuple_of), np.ones(len(tuple_of))
    # Each variable is bounded by the mass of its tuple and by that of its token.
    limits = coo_array(
        (np.tile(ones, 2), (np.append(tuple_of, len(law) + token_of), np.tile(np.arange(count), 2))),
        shape=(len(law) + len(p), count),
    )
    found = linprog(-ones, A_ub=limits.tocsr(), b_ub=np.append(law, p), bounds=(0, None), method="highs")
    if not found.success:
        raise RuntimeError(f"the linear program of an optimal plan was not solved: {found.message}")
    mass = np.zeros(members.shape)
    mass[tuple_of, token_of] = np.maximum(found.x, 0.0)
    rest = np.maximum(p - mass.sum(axis=0), 0.0)
    residual = rest / rest.sum() if rest.sum() > 1e-15 else p
    return Plan(float(mass.sum()), mass, residual)


def _order(p: Array, q: Array) -> npt.NDArray[np.intp]:
    return np.argsort(ratio(p, q, np.inf), axis=-1)


def _optimum(
    p: Array, q: Array, order: npt.NDArray[np.intp], inside: Array, again: Callable[[Array], Array] | None
) -> Optimum:
    """The best prefix of `order`, given D of every prefix; `again` recomputes D from q(H), summed without drift."""
    cut = np.cumsum(np.take_along_axis(p, order, -1), axis=-1) - inside
    best = cut.argmin(axis=-1)[..., None]
    use = np.take_along_axis(cut, best, -1) < 0.0
    blocked = np.zeros(p.shape, dtype=bool)
    np.put_along_axis(blocked, order, (np.arange(p.shape[-1]) <= best) & use, axis=-1)
    lost = np.take_along_axis(inside, best, -1)[..., 0] if again is None else again(np.where(blocked, q, 0.0).sum(-1))
    change = np.where(use[..., 0], np.where(blocked, p, 0.0).sum(axis=-1) - lost, 0.0)
    return Optimum(np.clip(1.0 + change, 0.0, 1.0), blocked)


def _members(tokens: npt.ArrayLike, tuples: int, size: int) -> npt.NDArray[np.bool_]:
    """(N, V): which tokens are in which tuple."""
    values = real("tokens", tokens, ndim=2)
    if len(values) != tuples or values.shape[1] == 0:
        raise ValueError(f"tokens must have shape ({tuples}, k) with k >= 1, got {values.shape}")
    index = values.astype(np.intp)
    wrong = (index != values) | (index < 0) | (index >= size)
    if wrong.any():
        raise ValueError(f"tokens must be whole numbers in [0, {size}), got {values[wrong].flat[0]:g}")
    members = np.zeros((tuples, size), dtype=bool)
    np.put_along_axis(members, index, True, axis=1)
    return members
