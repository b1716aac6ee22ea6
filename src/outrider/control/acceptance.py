"""Recent acceptance of draft tokens by depth, and the tokens per step that it implies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from outrider.control.text_mix import TextMix
from outrider.records import StepRecord
from outrider.theory.recurrent import reread
from outrider.theory.speedup import break_even_acceptance

MEMORY, FLOOR = 1000.0, 120.0
"""Sequence-steps, with or without drafts, after which evidence about acceptance has lost 63% of its weight; and the number of
tries below which it does not fade, so that a few steps of a trial do not outweigh everything measured before."""
ENOUGH = 30.0
"""Tries needed for a first estimate."""


@lru_cache(maxsize=4096)
def _read_again(rates: tuple[float, ...]) -> float:
    """Asked in every step: the rates are rounded, so that most answers are known."""
    return reread(rates).rows


class AcceptanceByDepth:
    """Fading shares of the draft tokens that were accepted at each depth, 1 to `longest`."""

    def __init__(self, longest: int) -> None:
        self._hits, self._tries = [0.0] * longest, [0.0] * longest
        self.texts = TextMix(longest)

    @property
    def known(self) -> bool:
        """Whether enough drafts were verified for `tokens_per_step`."""
        return bool(self._tries) and self._tries[0] >= ENOUGH

    def learn(self, record: StepRecord, lengths: Sequence[int]) -> None:
        """Learn from a step that verified drafts of these lengths, minus those of sequences that have ended."""
        if not lengths:
            return
        self.texts.learn(record.each)
        there = min(1.0, record.scored / len(lengths))
        keep = max(0.0, 1.0 - there * len(lengths) / MEMORY)
        accepted = record.counts.accepted_at
        for depth in range(len(self._tries)):
            if self._tries[depth] > FLOOR:
                self._hits[depth] *= keep
                self._tries[depth] *= keep
            tries = there * sum(x > depth for x in lengths)
            if tries:
                self._hits[depth] += accepted[depth] if depth < len(accepted) else 0
                self._tries[depth] += tries

    def tokens_per_step(self, length: int) -> float:
        """E(L) = 1 + sum over depths of the share of drafts accepted there, for the mix of texts that L leads to (see
        `control.text_mix`); unmeasured depths continue geometrically."""
        return (1.0 + sum(self._shares(length))) * self.texts.factor(length)

    def read_again(self, length: int) -> float:
        """Tokens that a step of one sequence reads again, if the target's state cannot be cut: see `theory.recurrent`."""
        shares = [1.0, *self._shares(length)]
        rates = tuple(round(min(1.0, b / a), 2) if a > 0 else 0.0 for a, b in pairwise(shares))
        return _read_again(rates) if length else 0.0

    def _shares(self, length: int) -> list[float]:
        """The share of drafts accepted down to each depth."""
        out, share, fall = list[float](), 1.0, 0.7
        for depth in range(length):
            if self._tries[depth] >= 1.0:
                new = self._hits[depth] / self._tries[depth]
                fall, share = min(1.0, new / share) if share > 0 else 0.0, new
            else:
                share *= fall
            out.append(share)
        return out


def break_even(length: int, cost: float) -> float | None:
    """Rejection probability r per judged token at which `length` breaks even: 1 + sum over d <= length of (1 - r)^d = cost.

    cost: seconds of a speculative step divided by those of a plain one. Returns 1.0 if even certain rejection loses nothing, 0.0
    if even certain acceptance is no gain, None for length 0.
    """
    if length == 0:
        return None
    return 1.0 if cost <= 1.0 else max(0.0, 1.0 - break_even_acceptance(length, 0.0, cost))
