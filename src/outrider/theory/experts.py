"""Mixtures of experts: how many experts the rows of a verification touch, and what such a verification costs.

A row uses k of E experts. With R rows in a forward, each touched expert's weights are read once, whatever number of rows chose it;
so the bytes of a forward grow with the number of touched experts, which is where a mixture differs from a dense model: there, rows
are free until arithmetic limits them.

Let p_e be the probability that a row chooses expert e (they sum to k). Neighbouring rows of a text do not choose independently:
with probability r (`repeat`) a row keeps the experts of the row above, and otherwise it chooses anew. Then

    P(expert e is touched by none of R rows) = (1 - p_e) (1 - (1 - r) p_e)^(R - 1)
    E[touched(R)] = sum over e of 1 - that

which for r = 0 is linearity of expectation over independent rows, and for equal p_e = k / E the occupancy formula
E (1 - (1 - k / E)^R) (Johnson, Kotz 1977, Urn Models, section 3.1). Both follow from the kernel alone: an expert that no row has
chosen yet is chosen by the next one only if that one chooses anew. The formula does not depend on how the experts of one row depend
on each other. Here rows are those of one path; rows of different sequences are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outrider.theory.checks import fraction, positive_int
from outrider.theory.speedup import best_of, tokens_per_call


@dataclass(frozen=True, slots=True)
class Routing:
    """How rows choose experts. share: [E] probability that a row chooses each; they sum to the experts of a row.

    repeat: probability that a row keeps the experts of the row above it, of [0, 1].
    """

    share: tuple[float, ...]
    repeat: float = 0.0

    def __post_init__(self) -> None:
        if not self.share or any(not 0.0 <= p <= 1.0 for p in self.share) or sum(self.share) <= 0.0:
            raise ValueError("shares are probabilities of at least one expert, not all 0")
        fraction("repeat", self.repeat)

    @property
    def used(self) -> float:
        """Experts of a row."""
        return float(sum(self.share))

    def touched(self, rows: float, sequences: float = 1.0) -> float:
        """Expected experts that the rows of a forward touch: `rows` >= 1 of each of `sequences` independent sequences.

        >>> Routing.uniform(64, 8).touched(1), round(Routing.uniform(64, 8).touched(4), 2)
        (8.0, 26.48)
        >>> round(Routing.uniform(64, 8, repeat=0.5).touched(4), 2)
        17.86
        """
        if rows < 1 or sequences < 1:
            raise ValueError(f"a forward has at least one row of one sequence, got {rows:g} of {sequences:g}")
        p = np.asarray(self.share)
        missed = (1.0 - p) * (1.0 - (1.0 - self.repeat) * p) ** (rows - 1.0)
        return float((1.0 - missed**sequences).sum())

    @staticmethod
    def uniform(count: int, used: int, repeat: float = 0.0) -> Routing:
        """Every expert equally likely: what a router trained to balance its load comes near to."""
        positive_int("count", count)
        if not 1 <= used <= count:
            raise ValueError(f"a row uses 1 to {count} experts, got {used}")
        return Routing((used / count,) * count, repeat)

    @staticmethod
    def measured(chosen: NDArray[np.integer], count: int) -> Routing:
        """The statistics of a layer's router on a text. chosen: [rows, used] distinct experts of consecutive rows.

        repeat is the one with which neighbouring rows share as many experts as they do: under the model they share
        r k + (1 - r) sum of p_e^2 on average.
        """
        rows, used = chosen.shape
        if rows < 2:
            raise ValueError("the statistics of a router need at least two rows")
        on = np.zeros((rows, count))
        np.put_along_axis(on, chosen, 1.0, 1)
        share = on.mean(0)
        kept, chance = float((on[1:] * on[:-1]).sum(1).mean()), float((share**2).sum())
        repeat = (kept - chance) / (used - chance) if used > chance else 1.0
        return Routing(tuple(share.tolist()), min(1.0, max(0.0, repeat)))


@dataclass(frozen=True, slots=True)
class VerificationCost:
    """v(R): time of a forward of R rows relative to one row, where weights limit it. sparse: share of a one-row forward that reads
    experts; the rest (attention, dense layers, output head) does not grow with rows.

    >>> cost = VerificationCost(Routing.uniform(64, 8), sparse=0.9)
    >>> round(cost.relative(1), 3), round(cost.relative(4), 3)
    (1.0, 3.079)
    """

    routing: Routing
    sparse: float

    def __post_init__(self) -> None:
        fraction("sparse", self.sparse)

    def relative(self, rows: float, sequences: float = 1.0) -> float:
        """v(R); of `sequences` sequences with R rows each, relative to one row of each."""
        grown = self.routing.touched(rows, sequences) / self.routing.touched(1, sequences)
        return 1.0 - self.sparse + self.sparse * grown


def best_length(
    acceptance: float, draft_cost: float, times: Sequence[float], longest: int | None = None
) -> tuple[int, float]:
    """The draft length of the largest speed-up, and that speed-up; 0 and 1.0 say not to speculate.

    times: v(1), v(2), ... of 1, 2, ... rows, v(1) = 1. draft_cost: of one draft token relative to a one-row forward of the target.

    >>> dense, sparse = [1.0] * 9, [VerificationCost(Routing.uniform(64, 8), 0.9).relative(n) for n in range(1, 10)]
    >>> best_length(0.8, 0.02, dense)[0], best_length(0.8, 0.02, sparse)[0]
    (8, 0)
    """
    most = len(times) - 1 if longest is None else min(longest, len(times) - 1)
    tokens = [tokens_per_call(acceptance, n) for n in range(most + 1)]
    best = best_of(tokens, draft_cost, [t / times[0] for t in times])
    return best.length, best.speedup


def possible_gain(
    acceptance: float, draft_cost: float, times: Sequence[float], chosen: int, longest: int | None = None
) -> float:
    """How many times faster than with drafts of `chosen` tokens the best fixed length decodes: nothing that chooses one length for
    all steps can gain more. Arguments as of `best_length`; chosen: for example the length that a dense model would take.

    >>> times = [VerificationCost(Routing.uniform(64, 8, 0.4), 0.8).relative(n) for n in range(1, 10)]
    >>> [round(possible_gain(a, 0.0, times, 4), 2) for a in (0.5, 0.8)]
    [1.36, 1.01]
    """
    if not 0 <= chosen < len(times):
        raise ValueError(f"a draft of {chosen} tokens has {chosen + 1} rows, and times of {len(times)} are given")
    own = tokens_per_call(acceptance, chosen) / (draft_cost * chosen + times[chosen] / times[0])
    return best_length(acceptance, draft_cost, times, longest)[1] / own


def simulate_touched(
    routing: Routing, rows: int, *, samples: int = 1000, seed: int = 0, sequences: int = 1
) -> tuple[float, float]:
    """Mean number of touched experts of simulated forwards, and its standard error.

    A row that chooses anew takes expert e with probability p_e exactly: systematic sampling of the shares in random order (Madow
    1949), which takes k or, where they do not sum to a whole number, the two numbers around it.
    """
    rng, share = np.random.default_rng(seed), np.asarray(routing.share)
    positive_int("rows", rows)
    found = np.zeros(samples)
    for i in range(samples):
        touched = np.zeros(len(share), bool)
        for _ in range(sequences):
            current = _draw(rng, share)
            touched |= current
            for _ in range(rows - 1):
                if rng.random() >= routing.repeat:
                    current = _draw(rng, share)
                touched |= current
        found[i] = touched.sum()
    return float(found.mean()), float(found.std(ddof=1) / samples**0.5)


def _draw(rng: np.random.Generator, share: NDArray[np.float64]) -> NDArray[np.bool_]:
    order = rng.permutation(len(share))
    ends = np.cumsum(share[order])
    taken = np.zeros(len(share), bool)
    taken[order] = np.diff(np.floor(ends + rng.random()), prepend=0.0) > 0
    return taken
