"""A scripted engine whose sequences differ: each draft token is accepted with its sequence's own probability, and a step takes a
known time by its rows and its deepest draft. Tokens and seconds are counts of the script; no clock is read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from outrider.params import SamplingParams
from outrider.protocols import Controller
from outrider.records import Counts, SequenceStep, StepRecord
from outrider.theory.shared_rows import SharedRows
from outrider.types import SequenceView

ENDLESS = SamplingParams(max_tokens=1 << 30)
Clock = Callable[[float, float], tuple[float, float]]
"""Rows of a pass and levels of a draft -> seconds of each."""


def bound(rows: float, depth: float) -> tuple[float, float]:
    """A small machine: rows are free up to 6, and cost a tenth of a pass each beyond."""
    return 0.010 * max(1.0, 1.0 + 0.1 * (rows - 6)), 0.0003 * depth


def free(rows: float, depth: float) -> tuple[float, float]:
    """A machine bound by memory: all rows together add a tenth of a pass; drafting costs a thirtieth a level."""
    return 0.010 + 0.00002 * rows, 0.0003 * depth


def cheap(rows: float, depth: float) -> tuple[float, float]:
    """The same with drafts that are dear: rows add little, and a level takes 6% of a pass."""
    return 0.010 + 0.00002 * (rows - 1), 0.0006 * depth


def dear(rows: float, depth: float) -> tuple[float, float]:
    """A machine on which a draft never pays: a row costs as much as a whole sequence's step."""
    return 0.004 * rows, 0.001 * depth


@dataclass
class Text:
    """A sequence: the probability of each of its draft tokens, as a function of how many tokens it has written; and its length."""

    accept: Callable[[int], float]
    limit: int
    params: SamplingParams
    tokens: list[int] = field(default_factory=lambda: [0])
    asked: int = 0


class Mixture:
    """Runs a controller over sequences of these acceptances (a number, or a function of the tokens written), `limit` tokens each,
    after which another of its kind takes the slot. `noise`: the share by which times differ from the clock, at random."""

    def __init__(
        self, clock: Clock, accept: Sequence[float | Callable[[int], float]], *, limit: int = 1 << 29, noise: float = 0.0,
        seed: int = 0, longest: int = 12, params: SamplingParams = ENDLESS,
    ) -> None:  # fmt: skip
        self.clock, self.limit, self.noise, self.longest, self.params = clock, limit, noise, longest, params
        self.accept = [a if callable(a) else (lambda _, a=a: a) for a in accept]
        self.random, self.seconds, self.tokens, self.rows = random.Random(seed), 0.0, 0, 0
        self.texts = [Text(a, limit, params) for a in self.accept]

    def run(self, controller: Controller, steps: int) -> Mixture:
        """Steps of the engine: verify, ask for lengths, draft, report."""
        for _ in range(steps):
            counts, each, drafted = Counts(), [], [t.asked for t in self.texts]
            for slot, text in enumerate(self.texts):
                self._verify(slot, text, counts, each)
            self.texts = [t if len(t.tokens) <= t.limit else Text(t.accept, t.limit, t.params) for t in self.texts]
            views = [SequenceView(i, i, t.tokens, 1, len(t.tokens) - 1, t.params) for i, t in enumerate(self.texts)]
            lengths = controller.budget(views)
            for text, asked in zip(self.texts, lengths, strict=True):
                text.asked = min(asked, self.longest)
            rows = len(self.texts) + sum(drafted)
            factor = 1.0 + self.noise * self.random.uniform(-1, 1)
            target, draft = self.clock(rows, 0.0)[0] * factor, self.clock(0, max(t.asked for t in self.texts))[1]
            seconds = {"target": target, "rule": 0.0, "host": 0.0, "draft": draft}
            controller.observe(StepRecord(rows, len(self.texts), len(self.texts), 0, seconds, counts, each=tuple(each)))
            self.seconds += target + draft
            self.tokens += counts.emitted
            self.rows += rows
        return self

    def _verify(self, slot: int, text: Text, counts: Counts, each: list[SequenceStep]) -> None:
        accepted, chance = 0, text.accept(len(text.tokens))
        while accepted < text.asked and self.random.random() < chance:
            accepted += 1
        judged = min(text.asked, accepted + 1)
        counts.add(text.asked, accepted, judged, 0.0, 0.0, 0.0)
        counts.emitted += accepted + 1
        each.append(SequenceStep(slot, text.asked, judged, accepted))
        text.tokens += [0] * (accepted + 1)

    @property
    def speed(self) -> float:
        """Tokens per second so far."""
        return self.tokens / self.seconds


def survival(accept: Sequence[float], longest: int = 12) -> np.ndarray:
    """[B, longest] of sequences of constant acceptance."""
    return np.asarray(accept)[:, None] ** np.arange(1, longest + 1)[None, :]


def rate(clock: Clock, accept: Sequence[float], lengths: Sequence[int]) -> float:
    """Exact tokens per second of these lengths."""
    gain = sum(float(survival([a])[0, :n].sum()) for a, n in zip(accept, lengths, strict=True))
    rows, deepest = len(accept) + sum(lengths), max(lengths)
    return (len(accept) + gain) / (clock(rows, 0.0)[0] + clock(0, deepest)[1])


def best_common(clock: Clock, accept: Sequence[float], longest: int = 12) -> float:
    """Exact tokens per second of the best length for all."""
    return max(rate(clock, accept, [n] * len(accept)) for n in range(longest + 1))


def best_of_all(clock: Clock, accept: Sequence[float], longest: int = 12) -> float:
    """Exact tokens per second of the best lengths."""
    seconds = lambda rows, deepest: clock(len(accept) + rows, 0.0)[0] + clock(0, deepest)[1]  # noqa: E731
    return rate(clock, accept, SharedRows(survival(accept, longest)).best(seconds).lengths)
