"""The controller where no two neighbouring steps can be compared: prompts in every step, sequences coming and going."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest

from outrider.control.adaptive import Adaptive
from outrider.control.row_times import EXTRAPOLATION_FACTOR, RowTimes
from outrider.params import SamplingParams
from outrider.types import SequenceView
from tests.control.verdicts import flat, judged, recorded, steep

FREE = SamplingParams()
PROMPT = 12
"""Rows of the prompt that is read in every step."""


class Busy:
    """A server in which one sequence joins and one leaves in every step; a pass takes `seconds(rows)`, a draft level `level`."""

    def __init__(self, seconds: Callable[[int], float], level: float, accept: float, noise: float = 0.1) -> None:
        self.seconds, self.level, self.accept, self.noise = seconds, level, accept, noise
        self.random, self.clock, self.tokens = random.Random(1), 0.0, 0
        self.pending: list[int] = []
        self.changes = 0

    def run(self, controller: Adaptive, loads: Iterable[int]) -> dict[int, int]:
        """One step for each load; how often each length was asked for."""
        asked: dict[int, int] = {}
        for step, sequences in enumerate(loads):
            used = self.pending[1:]  # the oldest has gone
            counts = judged(used, self.accept, self.random)
            views = [SequenceView(i, step + i, [0], 1, 0, FREE) for i in range(sequences)]
            now = controller.budget(views)
            asked[now[0]] = asked.get(now[0], 0) + 1
            self.changes += bool(self.pending) and self.pending[0] != now[0]
            rows = len(used) + counts.proposed + PROMPT
            factor = 1.0 + self.noise * self.random.uniform(-1, 1)
            target, draft = self.seconds(rows) * factor, self.level * max(now)
            controller.observe(recorded(rows, len(used), sequences, target, draft, counts))
            self.clock += target + draft
            self.tokens += counts.emitted
            self.pending = now
        return asked


def traffic() -> list[int]:
    """A server that fills up: one client, then four, eight, sixteen."""
    return [1] * 60 + [4] * 60 + [8] * 100 + [16] * 600


@pytest.mark.parametrize("accept", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("clock", [flat, steep])
def test_never_slower_where_no_trial_can_be_made(accept, clock) -> None:
    """A server that is full: at the largest load the adaptive controller is as fast as plain decoding, prompts included in both."""
    speed = {}
    for name, controller in (("adaptive", Adaptive(3, 4)), ("plain", Adaptive(0, 0))):
        world = Busy(clock, 0.0005, accept)
        world.run(controller, traffic())
        before, world.changes = (world.tokens, world.clock), 0
        world.run(controller, [16] * 400)
        speed[name] = (world.tokens - before[0]) / (world.clock - before[1])
        assert world.changes <= 2, "a length is kept"
    assert speed["adaptive"] >= 0.99 * speed["plain"], speed
    if clock is flat and accept == 0.8:
        assert speed["adaptive"] > 1.5 * speed["plain"], "a control: the gain is seen"


def test_the_control_a_fixed_length_is_slower_there() -> None:
    worlds = [Busy(steep, 0.0005, 0.1) for _ in range(2)]
    for world, controller in zip(worlds, (Adaptive(3, 3, margin=0.999), Adaptive(0, 0)), strict=True):
        controller.predicted = lambda sequences, length: length  # type: ignore[method-assign]
        world.run(controller, traffic())
    assert worlds[0].tokens / worlds[0].clock < 0.7 * worlds[1].tokens / worlds[1].clock


def test_rows_between_groups_are_a_line_and_far_ones_unknown() -> None:
    times = RowTimes()
    for _ in range(200):
        for rows in (4, 16, 64):
            times.learn(rows, steep(rows))
    assert times.seconds(40) == pytest.approx(steep(40), rel=0.02)
    assert times.seconds(4) == pytest.approx(steep(4), rel=0.02)
    assert times.seconds(int(64 * EXTRAPOLATION_FACTOR)) == pytest.approx(steep(96), rel=0.02)
    assert times.seconds(2) is None
    assert times.seconds(int(64 * EXTRAPOLATION_FACTOR) + 1) is None
    assert RowTimes().seconds(1) is None


def test_weather_carries_over_to_rows_not_seen_in_it() -> None:
    times = RowTimes()
    for _ in range(50):
        times.learn(2, 0.010)
        times.learn(32, 0.032)
    for _ in range(200):
        times.learn(2, 0.020)  # the machine has become half as fast; only small passes come by
    assert times.seconds(32) == pytest.approx(0.064, rel=0.1)


def test_one_wild_step_changes_little() -> None:
    times = RowTimes()
    for _ in range(50):
        times.learn(8, 0.010)
    times.learn(8, 100.0)
    assert times.seconds(8) == pytest.approx(0.010, rel=0.2)
