"""Which combinations of a table run in `make test`: a set that covers what is asked. The others run in `make test-slow`.

Nothing is dropped: the union of both is the full product.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations
from random import Random
from typing import Any

import pytest

Combination = tuple[Any, ...]


def pairs(combination: Combination) -> set[Hashable]:
    """What a pairwise covering has to meet: each value of one axis beside each value of another."""
    return set(combinations(enumerate(combination), 2))


def covering(
    product: Iterable[Combination],
    meets: Callable[[Combination], set[Hashable]] = pairs,
    cost: Callable[[Combination], float] = lambda combination: 0.0,
) -> list[Combination]:
    """A small part of `product` that meets everything the whole of it meets; always the same one.

    meets: what a combination shows (`pairs` of values unless told). cost: of several that show as much, the cheapest is taken.
    """
    left = [(c, meets(c)) for c in product]
    Random(0).shuffle(left)  # spreads what need not be met over all values; in order it would always be the first
    left.sort(key=lambda one: cost(one[0]))
    missing: set[Hashable] = set().union(*(what for _, what in left))
    most = max((len(what) for _, what in left), default=0)
    chosen: list[Combination] = []
    for wanted in range(most, 0, -1):  # all that add `wanted` before those that add less
        for combination, what in left:
            if len(what & missing) >= wanted:
                chosen.append(combination)
                missing -= what
    return chosen


def slow_beyond(product: Sequence[Combination], kept: Iterable[Combination]) -> list[Any]:
    """The whole product for `parametrize`; what is not in `kept` carries the mark `slow`."""
    fast = set(kept)
    assert fast <= set(product)
    return [pytest.param(*c, marks=() if c in fast else pytest.mark.slow) for c in product]
