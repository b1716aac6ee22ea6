"""Oracles for rules that judge several candidates at one node: the output law given the tokens that were drawn.

For every rule of `multidraft`, `without_replacement` and `transport`, its literal procedure, with the coins integrated
out, turns a tuple of drawn tokens into an `Outcome`. Averaging outcomes over the law of tuples gives the output law,
which must be the target p, and the acceptance, which must be the closed form. Enumeration is for a few tokens; the
outcome of one tuple costs O(k V) and works for any vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.theory.checks import positive_int, probabilities
from outrider.theory.laws import Array, normalised, pair, ratio
from outrider.theory.multidraft import Hub, Threshold
from outrider.theory.transport import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Tuples:
    """All tuples that can be drawn: `tokens` (N, k) and their law `probability` (N,)."""

    tokens: npt.NDArray[np.intp]
    probability: Array


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a rule does once its candidates are drawn.

    Attributes:
        accepted: (V,), probability that token y is output as an accepted candidate.
        refused: probability that every candidate is refused.
        residual: (V,), law of the output in that case.
    """

    accepted: Array
    refused: float
    residual: Array

    @property
    def law(self) -> Array:
        """(V,), the output law given the tuple."""
        return self.accepted + self.refused * self.residual


def independent(draft: npt.ArrayLike, drafts: int) -> Tuples:
    """The V^k tuples of independent draws.

    >>> independent([0.5, 0.5], 2).probability
    array([0.25, 0.25, 0.25, 0.25])
    """
    q, k = probabilities("draft", draft, ndim=1), positive_int("drafts", drafts)
    tokens = np.array(list(itertools.product(np.flatnonzero(q > 0), repeat=k)), dtype=np.intp)
    return Tuples(tokens, q[tokens].prod(axis=1))


def distinct(draft: npt.ArrayLike, drafts: int) -> Tuples:
    """The ordered tuples of draws without replacement; as long as the support of the draft if that is less than k.

    >>> distinct([0.5, 0.25, 0.25], 2).probability[:2]
    array([0.25, 0.25])
    """
    q, k = probabilities("draft", draft, ndim=1), positive_int("drafts", drafts)
    support = np.flatnonzero(q > 0)
    tokens = np.array(list(itertools.permutations(support, min(k, len(support)))), dtype=np.intp)
    # What is free at each draw: the other members of the tuple still to come, and all tokens outside it.
    outside = np.array([np.delete(q, t).sum() for t in tokens])
    free = outside[:, None] + np.cumsum(q[tokens][:, ::-1], axis=1)[:, ::-1]
    return Tuples(tokens, (q[tokens] / free).prod(axis=1))


def hub_pairs(hub: Hub) -> Tuples:
    """The pairs that SpecHub draws, for one pair of laws.

    >>> from outrider.theory.multidraft import spechub
    >>> hub_pairs(spechub([0.5, 0.5], [0.75, 0.25])).tokens
    array([[1, 0],
           [0, 1]])
    """
    a, first, second = int(hub.hub), np.flatnonzero(hub.other_first), np.flatnonzero(hub.hub_first)
    tokens = np.array([(i, a) for i in first] + [(a, i) for i in second], dtype=np.intp)
    return Tuples(tokens, np.append(hub.other_first[first], hub.hub_first[second]))


def output(tuples: Tuples, outcome: Callable[[Sequence[int]], Outcome]) -> tuple[Array, float]:
    """(law, acceptance) of a rule: its outcomes averaged over `tuples`.

    >>> p, q = [0.5, 0.5], [0.75, 0.25]
    >>> output(independent(q, 2), lambda drawn: recursive_outcome(p, q, drawn))
    (array([0.5, 0.5]), 0.8125)
    """
    outcomes = [outcome([int(y) for y in t]) for t in tuples.tokens]
    law = sum(w * o.law for w, o in zip(tuples.probability, outcomes, strict=True))
    refused = sum(float(w) * o.refused for w, o in zip(tuples.probability, outcomes, strict=True))
    return np.asarray(law), 1.0 - refused


def recursive_outcome(
    target: npt.ArrayLike, draft: npt.ArrayLike, tokens: Sequence[int], replacement: bool = True
) -> Outcome:
    """Recursive rejection: each token is tested against the current residual with min(1, residual / draft).

    `replacement=False`: the draft law loses each token that was drawn, and is normalised.

    >>> recursive_outcome([0.5, 0.5], [0.75, 0.25], [0, 0]).law.round(12)
    array([0.66666667, 0.33333333])
    """
    p, q = pair(target, draft, ndim=1)
    left, accepted = 1.0, np.zeros(len(p))
    for y in _tokens(tokens, len(p)):
        keep = float(min(1.0, ratio(p[y], q[y], 1.0)))
        accepted[y] += left * keep
        left *= 1.0 - keep
        p = normalised(np.maximum(p - q, 0.0), p)
        if not replacement:
            rest = np.where(np.arange(len(q)) == y, 0.0, q)
            q = normalised(rest, rest)
    return Outcome(accepted, left, p)


def threshold_outcome(target: npt.ArrayLike, draft: npt.ArrayLike, rule: Threshold, tokens: Sequence[int]) -> Outcome:
    """K-SEQ: every token is tested with min(1, p / (s q)), `rule` as from `multidraft.kseq` for these laws.

    >>> from outrider.theory.multidraft import kseq
    >>> p, q = [0.0, 1.0], [0.5, 0.5]
    >>> threshold_outcome(p, q, kseq(p, q, 2), [0, 0]).law
    array([0., 1.])
    """
    p, q = pair(target, draft, ndim=1)
    left, accepted = 1.0, np.zeros(len(p))
    for y in _tokens(tokens, len(p)):
        keep = float(min(1.0, ratio(p[y], rule.slope * q[y], 1.0)))
        accepted[y] += left * keep
        left *= 1.0 - keep
    return Outcome(accepted, left, rule.residual)


def hub_outcome(hub: Hub, tokens: Sequence[int]) -> Outcome:
    """SpecHub, given one of its pairs: probabilities are filled mass over the mass of the pair that is still there.

    >>> from outrider.theory.multidraft import spechub
    >>> hub_outcome(spechub([0.0, 0.5, 0.5], [0.5, 0.25, 0.25]), [0, 1]).accepted
    array([0., 1., 0.])
    """
    a = int(hub.hub)
    first, second = _tokens(tokens, len(hub.residual))
    i = second if first == a else first
    drawn, taken, fill = (
        (hub.hub_first, hub.take_other_second, hub.hub_leading)
        if first == a
        else (hub.other_first, hub.take_other_first, hub.hub_second)
    )
    rest = float((drawn - taken).sum())
    accepted = np.zeros(len(hub.residual))
    keep = float(ratio(taken[i], drawn[i], 0.0))
    accepted[i] += keep
    lead = (1.0 - keep) * float(ratio(fill, np.asarray(rest), 0.0))
    accepted[a] += lead
    return Outcome(accepted, max(0.0, 1.0 - keep - lead), hub.residual)


def plan_outcome(plan: Plan, tuples: Tuples, number: int) -> Outcome:
    """An optimal plan, given that the tuple with this `number` in `tuples` was drawn.

    >>> from outrider.theory.transport import optimal_plan
    >>> drawn = independent([0.75, 0.25], 1)
    >>> plan_outcome(optimal_plan([0.5, 0.5], drawn.tokens, drawn.probability), drawn, 0).law.round(12)
    array([0.66666667, 0.33333333])
    """
    accepted = plan.mass[number] / tuples.probability[number]
    return Outcome(accepted, max(0.0, 1.0 - float(accepted.sum())), plan.residual)


def _tokens(tokens: Sequence[int], size: int) -> list[int]:
    for y in tokens:
        if not 0 <= y < size:
            raise ValueError(f"tokens must be in [0, {size}), got {y}")
    return list(tokens)
