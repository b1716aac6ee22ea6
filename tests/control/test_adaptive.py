"""The controller of draft lengths on scripted clocks: worlds whose best length is known exactly."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest

from outrider.control.acceptance import break_even
from outrider.control.adaptive import Adaptive
from outrider.control.fixed import Fixed
from outrider.control.length_search import LAST_PAUSE
from outrider.control.row_times import load_class
from outrider.errors import ConfigError
from outrider.params import SamplingParams
from outrider.types import SequenceView
from tests.control.verdicts import judged, recorded
from tests.covering import covering, slow_beyond

FREE, SEEDED, GREEDY = SamplingParams(), SamplingParams(seed=1), SamplingParams(seed=1, temperature=0)


class World:
    """A machine on which a step of b sequences with drafts of length L takes `seconds(b, L)`, drafting included.

    Each position is accepted with probability `accept`. weather: multiplies all times of a step.
    """

    def __init__(
        self,
        seconds: Callable[[int, int], float],
        accept: float,
        seed: int = 0,
        weather: Callable[[int], float] = lambda step: 1.0,
    ) -> None:
        self.seconds, self.accept, self.weather = seconds, accept, weather
        self.random, self.clock, self.tokens, self.steps = random.Random(seed), 0.0, 0, 0
        self.pending: list[int] = []

    def run(
        self, controller: Adaptive | Fixed, sequences: int, steps: int, params: SamplingParams = FREE
    ) -> dict[int, int]:
        """Steps of a steady load; how often each length was asked for."""
        asked: dict[int, int] = {}
        views = [SequenceView(i, i, [0], 1, 0, params) for i in range(sequences)]
        for _ in range(steps):
            self.steps += 1
            used = self.pending
            counts = judged(used, self.accept, self.random)
            now = controller.budget(views)
            asked[now[0]] = asked.get(now[0], 0) + 1
            verified = max(used, default=0)
            factor = self.weather(self.steps)
            half = lambda length: self.seconds(sequences, length) / 2 * factor  # noqa: E731, B023
            rows, target, draft = len(used) + counts.proposed, half(verified), half(max(now))
            controller.observe(recorded(rows, len(used), sequences, target, draft, counts))
            self.clock += target + draft
            self.tokens += counts.emitted
            self.pending = now
        return asked


def expected(accept: float, length: int) -> float:
    return sum(accept**d for d in range(length + 1))


def best(world: World, sequences: int, longest: int) -> int:
    return max(range(longest + 1), key=lambda x: expected(world.accept, x) / world.seconds(sequences, x))


def memory_bound(b: int, length: int) -> float:
    return 0.010 + 0.0015 * length


def compute_bound(b: int, length: int) -> float:
    """Rows cost what they are: a batch of 8 pays for every draft."""
    return 0.004 + 0.002 * b * (length + 1)


FOUND = list(product([0.0, 0.3, 0.6, 0.9], [memory_bound, compute_bound], [1, 8]))
STEADY = list(product([0.0, 0.2, 0.5, 0.8], [memory_bound, compute_bound], [1, 4, 8]))


@pytest.mark.parametrize(("accept", "clock", "sequences"), slow_beyond(FOUND, covering(FOUND)))
def test_it_finds_a_length_within_a_few_per_cent_of_the_best(accept, clock, sequences) -> None:
    world = World(clock, accept)
    controller = Adaptive(3, 6)
    world.run(controller, sequences, 3000)
    length = controller.outlook().length
    worth = [expected(accept, x) / clock(sequences, x) for x in range(7)]
    assert worth[length] >= 0.93 * max(worth), (length, best(world, sequences, 6))
    assert worth[length] >= 0.999 * worth[0]


@pytest.mark.parametrize(
    ("accept", "clock", "sequences"), slow_beyond(STEADY, covering(STEADY, lambda c: {c[:2], c[2]}))
)
def test_it_is_never_slower_than_plain_decoding(accept, clock, sequences) -> None:
    """Over 6,000 steps, learning included, at several loads: at least 98% of the plain rate."""
    world, plain = World(clock, accept), World(clock, accept)
    world.run(Adaptive(3, 4), sequences, 6000)
    plain.run(Fixed(0), sequences, 6000)
    assert world.tokens / world.clock >= 0.98 * plain.tokens / plain.clock


def test_the_control_a_fixed_length_is_slower_there() -> None:
    """Without the controller the same world is slower by far, so the test above can fail."""
    world, plain = World(compute_bound, 0.2), World(compute_bound, 0.2)
    world.run(Adaptive(3, 4), 8, 6000, SEEDED)  # a seed pins the length
    plain.run(Fixed(0), 8, 6000)
    assert world.tokens / world.clock < 0.6 * plain.tokens / plain.clock


def test_weather_does_not_move_it() -> None:
    """A machine that is ten times slower for long spells: neighbouring steps still compare rightly."""
    storm = lambda step: 10.0 if step // 70 % 2 else 1.0  # noqa: E731
    gusts = random.Random(5)
    for accept, clock in ((0.7, memory_bound), (0.3, compute_bound)):
        world = World(clock, accept, weather=lambda step: storm(step) * gusts.uniform(0.8, 1.25))
        controller = Adaptive(3, 4)
        world.run(controller, 8, 4000)
        worth = [expected(accept, x) / clock(8, x) for x in range(5)]
        assert worth[controller.outlook().length] >= 0.93 * max(worth)


def test_it_follows_a_change_of_traffic_both_ways() -> None:
    world, controller = World(memory_bound, 0.9), Adaptive(3, 3)
    world.run(controller, 4, 1500)
    assert controller.outlook().length == 3
    world.accept = 0.02
    world.run(controller, 4, 2 * LAST_PAUSE + 500)
    assert controller.outlook().length == 0
    world.accept = 0.9
    world.run(controller, 4, 4 * LAST_PAUSE)
    assert controller.outlook().length >= 2


def test_trials_become_rare() -> None:
    """Hysteresis: in a steady world 98% of late steps use the choice."""
    world, controller = World(memory_bound, 0.8), Adaptive(3, 3)
    world.run(controller, 2, 6000)
    asked = world.run(controller, 2, 4000)
    assert max(asked.values()) >= 0.98 * 4000


def test_loads_are_judged_apart() -> None:
    world, controller = World(compute_bound, 0.6), Adaptive(2, 4)
    for _ in range(12):
        world.run(controller, 1, 150)
        world.run(controller, 8, 150)
    world.run(controller, 1, 5)
    alone = controller.outlook().length
    world.run(controller, 8, 5)
    assert alone >= 1
    assert controller.outlook().length == 0


def test_a_seed_pins_the_length_unless_it_cannot_matter() -> None:
    views = [SequenceView(i, i, [0], 1, 0, p) for i, p in enumerate((FREE, SEEDED, GREEDY))]
    world, controller = World(compute_bound, 0.0), Adaptive(3, 3)
    world.run(controller, 8, 1500)
    world.run(controller, 3, 1500)
    assert controller.outlook().length == 0
    assert controller.budget(views) == [0, 3, 0]
    coupled = Adaptive(3, 3, invariant=True)
    World(compute_bound, 0.0).run(coupled, 3, 1500)
    assert coupled.budget(views) == [0, 0, 0]


def test_the_outlook_says_what_the_world_is() -> None:
    world, controller = World(memory_bound, 0.8, seed=3), Adaptive(3, 3)
    world.run(controller, 4, 3000)
    look = controller.outlook()
    assert look.length == 3
    assert look.plain_seconds == pytest.approx(0.010, rel=0.02)
    assert look.speedup == pytest.approx(expected(0.8, 3) * 0.010 / 0.0145, rel=0.1)
    assert look.break_even is not None
    assert expected(1 - look.break_even, 3) == pytest.approx(1.45, rel=0.03)


@pytest.mark.parametrize(("length", "cost", "want"), [(0, 1.0, None), (3, 0.9, 1.0), (3, 4.0, 0.0), (1, 1.25, 0.75)])
def test_break_even(length, cost, want) -> None:
    assert break_even(length, cost) == (want if want is None else pytest.approx(want))


def test_load_classes_grow_by_half() -> None:
    assert [load_class(b) for b in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 33)] == [
        1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 16, 16, 24, 48,
    ]  # fmt: skip


def test_bad_bounds_are_refused() -> None:
    for arguments in ((4, 3), (-1, 3)):
        with pytest.raises(ConfigError, match="draft lengths"):
            Adaptive(*arguments)
    with pytest.raises(ConfigError, match="margin"):
        Adaptive(1, 2, margin=1.5)


def test_what_plain_decoding_would_have_taken_counts_each_step_at_its_own_load() -> None:
    """Eight sequences, which decode plainly, then one, which gains: over any window the sums give the gain of its steps, while
    the estimate for the present load is that of one sequence and says nothing of the eight."""
    world, controller = World(compute_bound, 0.8), Adaptive(3, 4)
    gain = {b: max(expected(0.8, x) * compute_bound(b, 0) / compute_bound(b, x) for x in range(5)) for b in (8, 1)}
    assert gain[8] == 1.0 and gain[1] > 1.4
    world.run(controller, 8, 600)
    world.run(controller, 1, 200)  # the first trials at this load
    marks = [(controller.compared, controller.plain, world.clock, world.tokens)]
    for sequences, steps in ((8, 300), (1, 3000)):
        world.run(controller, sequences, steps)
        marks.append((controller.compared, controller.plain, world.clock, world.tokens))
    for (a, b), sequences in zip(((0, 1), (1, 2)), (8, 1), strict=True):
        compared, plain, seconds, _ = (y - x for x, y in zip(marks[a], marks[b], strict=True))
        assert compared >= 0.95 * seconds
        assert abs(plain / compared - gain[sequences]) < 0.04 * gain[sequences]
    compared, plain, seconds, tokens = (y - x for x, y in zip(marks[0], marks[2], strict=True))
    # seconds of plain decoding of these tokens
    true = 300 * compute_bound(8, 0) + (tokens - 300 * 8) * compute_bound(1, 0)
    assert abs(plain - true) < 0.04 * true
    now = controller.outlook().speedup
    # a control: of one sequence
    assert now is not None and now > 1.3 * (marks[1][1] - marks[0][1]) / (marks[1][0] - marks[0][0])


def test_a_load_without_a_trial_is_not_compared() -> None:
    world, controller = World(memory_bound, 0.8), Adaptive(3, 4)
    world.run(controller, 2, 500, SEEDED)
    assert controller.compared == controller.plain == 0.0
