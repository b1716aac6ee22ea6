"""Draft lengths as contexts grow: a step costs W + k S, so a view that loses at first wins later."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from outrider.control.adaptive import Adaptive
from outrider.control.row_times import ENOUGH, RowTimes, context_class
from outrider.params import SamplingParams
from outrider.theory.context_times import FURTHER_ROW, ContextTimes
from outrider.types import SequenceView
from tests.control.verdicts import judged, recorded

VIEW, ACCEPT = 512, 0.85
TIMES = ContextTimes(whole=1e-3, row=2e-5, token=1e-3 / 1800, pair=FURTHER_ROW * 1e-3 / 1800, step=2e-4, level=5e-5)
"""The shipped target's shape: keys and values weigh as much as weights at 1,800 tokens."""


def tokens_of(length: int) -> float:
    return sum(ACCEPT**d for d in range(length + 1))


class Growing:
    """One sequence that gets longer, on a clock by TIMES."""

    def __init__(self, seed: int = 0) -> None:
        self.random, self.clock, self.tokens, self.best = random.Random(seed), 0.0, 0, 0.0

    def run(self, controller: Adaptive, start: int, end: int, faster: int = 1) -> None:
        """From one context to another, by `faster` tokens for each that is emitted. best: the seconds
        that the best length of every moment would have taken for as many tokens."""
        context, pending = float(start), [0]
        while context < end:
            counts = judged(pending, ACCEPT, self.random)
            cached, rows = int(context), 1 + pending[0]
            now = controller.budget([SequenceView(0, 0, range(cached + 1), cached, cached, SamplingParams())])
            verify = TIMES.step + TIMES.seconds(1, rows, cached)
            draft = TIMES.drafted(1, cached, VIEW, now[0]) - TIMES.step - TIMES.seconds(1, now[0] + 1, cached)
            record = recorded(rows, 1, 1, verify, draft, counts)
            controller.observe(replace(record, cached=cached, attended=cached * rows))
            self.clock += verify + draft
            self.tokens += counts.emitted
            self.best += counts.emitted * min(TIMES.drafted(1, cached, VIEW, n) / tokens_of(n) for n in range(7))
            context += faster * counts.emitted
            pending = now


def test_lengths_follow_the_context() -> None:
    """From 300 to 30,000 tokens, learning included: within 8% of the best length of every moment; hardly slower than plain decoding
    where a view loses."""
    world, controller = Growing(), Adaptive(3, 6)
    world.run(controller, 300, 1000)
    assert world.clock < 1.05 * world.tokens * TIMES.plain(1, 650)
    world.run(controller, 1000, 30_000, faster=2)
    assert controller.outlook().length >= 2
    assert world.clock < 1.08 * world.best


def test_the_control_one_length_for_all_contexts_is_slower() -> None:
    plain, drafted = Growing(), Growing()
    plain.run(Adaptive(0, 0), 1000, 30_000, faster=2)
    assert plain.clock > 1.5 * plain.best
    drafted.run(Pinned(6), 300, 2000)
    assert drafted.clock > 1.15 * drafted.best


class Pinned(Adaptive):
    """Always one length."""

    def __init__(self, length: int) -> None:
        super().__init__(length, length)

    def choice(self, sequences) -> int:
        return self.longest


def test_a_group_seen_at_short_context_is_foretold_at_a_long_one() -> None:
    times, chance = RowTimes(), random.Random(1)
    noisy = lambda rows, cached: TIMES.seconds(1, rows, cached) * chance.uniform(0.9, 1.2)  # noqa: E731
    for _ in range(50):
        times.learn(1, noisy(1, 500), 500.0)
    for cached in range(500, 8500, 20):
        times.learn(4, noisy(4, cached), cached * (1 + 3 * FURTHER_ROW))
    assert times.seconds(1, 8000.0) == pytest.approx(1.05 * TIMES.seconds(1, 1, 8000), rel=0.15)
    assert times.seconds(4, 8000.0 * (1 + 3 * FURTHER_ROW)) == pytest.approx(1.05 * TIMES.seconds(1, 4, 8000), rel=0.1)


def test_noise_is_no_slope() -> None:
    """Times that have nothing to do with what is cached: predictions do not move by more than a few per cent of them."""
    times, chance = RowTimes(), random.Random(2)
    for _ in range(400):
        times.learn(3, chance.uniform(0.9, 1.2), chance.uniform(0, 4000))
    assert times.seconds(3, 16_000.0) == pytest.approx(1.05, rel=0.25)
    fresh = RowTimes()
    for i in range(ENOUGH):
        fresh.learn(3, 1.0 + i, 1000.0 * i)
    assert fresh.seconds(3, 0.0) == fresh.seconds(3)  # too little for a slope


def test_classes_of_contexts() -> None:
    assert [context_class(n) for n in (0, 1023, 1024, 2047, 2048, 16_384)] == [0, 0, 1, 1, 2, 5]
