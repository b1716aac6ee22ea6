"""The controller when the evidence for its choice stops coming: what it chose in quiet traffic must be left in any other."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest

from outrider.control.adaptive import Adaptive
from outrider.control.fixed import Fixed
from outrider.control.length_search import BLIND, LAST_PAUSE
from outrider.params import SamplingParams
from outrider.types import SequenceView
from tests.control.verdicts import judged, recorded
from tests.covering import slow_beyond

FREE, SEEDED = SamplingParams(), SamplingParams(seed=1)
CLIENTS, LONGEST, PROMPT = 4, 5, 64


def costly(rows: float) -> float:
    """A target that pays for every row."""
    return 0.002 + 0.001 * rows


def cheap(rows: float) -> float:
    """A target bound by memory."""
    return 0.012 + 0.00002 * rows


class Traffic:
    """The same clients in every step, and from step to step a prompt beside them or not."""

    def __init__(self, seconds: Callable[[float], float], accept: float, params: tuple[SamplingParams, ...]) -> None:
        self.seconds, self.accept, self.random = seconds, accept, random.Random(7)
        self.views = [SequenceView(i, 0, [1] * 200, 100, 199, p) for i, p in enumerate(params)]
        self.pending, self.clock, self.tokens = [0] * len(params), 0.0, 0
        self.last: list[int] = []

    def run(self, controller: Adaptive | Fixed, prompts: Callable[[int], bool], steps: int) -> float:
        """Seconds a token over so many steps."""
        clock, tokens = self.clock, self.tokens
        for step in range(steps):
            counts = judged(self.pending, self.accept, self.random)
            rows = len(self.pending) + counts.proposed + PROMPT * prompts(step)
            self.last = controller.budget(self.views)
            draft = 0.0005 * len(self.views) * max(self.last)
            controller.observe(recorded(rows, len(self.pending), len(self.views), self.seconds(rows), draft, counts))
            self.clock += self.seconds(rows) + draft
            self.tokens += counts.emitted
            self.pending = self.last
        return (self.clock - clock) / max(1, self.tokens - tokens)


def free(seconds: Callable[[float], float], accept: float) -> Traffic:
    return Traffic(seconds, accept, (FREE,) * CLIENTS)


ENDS = list(product(range(0, 40, 5), [1.0, 0.97, 0.8]))


@pytest.mark.parametrize(("quiet", "share"), slow_beyond(ENDS, ENDS[::2]))
def test_a_losing_length_is_left_though_prompts_come_in_nearly_every_step(quiet: int, share: float) -> None:
    """Wherever in its trials quiet traffic ends, drafts that lose are given up: within 3% of plain decoding, learning included."""
    took = {}
    for name, controller in (("ours", Adaptive(LONGEST, LONGEST)), ("plain", Fixed(0))):
        draws, world = random.Random(quiet), free(costly, 0.1)
        world.run(controller, lambda _: False, quiet)
        took[name] = world.run(controller, lambda _, r=draws: r.random() < share, 3000)
    assert took["ours"] <= 1.03 * took["plain"], took


def test_the_control_a_length_that_is_kept_loses_there() -> None:
    kept, plain = Traffic(costly, 0.1, (SEEDED,) * CLIENTS), free(costly, 0.1)  # seeds pin the first length
    lost = kept.run(Adaptive(LONGEST, LONGEST), lambda _: True, 500)
    assert lost > 1.2 * plain.run(Fixed(0), lambda _: True, 500)


def test_a_length_that_gains_is_kept_though_prompts_come_in_every_step() -> None:
    took = {}
    for name, controller in (("ours", Adaptive(LONGEST, LONGEST)), ("plain", Fixed(0))):
        world = free(cheap, 0.8)
        world.run(controller, lambda _: False, 600)
        took[name] = world.run(controller, lambda _: True, 2000)
    assert took["ours"] < 0.6 * took["plain"], took


def test_a_choice_that_was_proven_is_given_up_when_the_world_changes_among_prompts() -> None:
    """Proven in quiet traffic, then acceptance falls while no two neighbouring steps can be compared."""
    controller, world = Adaptive(LONGEST, LONGEST), free(costly, 0.97)
    world.seconds = cheap
    world.run(controller, lambda _: False, 1500)
    assert world.last[0] == LONGEST
    world.seconds, world.accept = costly, 0.02
    world.run(controller, lambda _: True, 2500)
    assert world.last == [0] * CLIENTS


def test_one_request_with_a_seed_does_not_blind_the_controller_to_the_others() -> None:
    """Its length is pinned, so no step has one length for all: what is accepted and what rows cost is learnt all the same."""
    controller, world = Adaptive(LONGEST, LONGEST), Traffic(costly, 0.1, (*(FREE,) * CLIENTS, SEEDED))
    world.run(controller, lambda _: False, 1500)
    assert world.last == [*(0,) * CLIENTS, LONGEST]


def test_where_all_have_seeds_their_length_is_told_and_not_a_choice_that_nobody_follows() -> None:
    controller, world = Adaptive(LONGEST, LONGEST), Traffic(costly, 0.1, (SEEDED,) * CLIENTS)
    world.run(controller, lambda _: False, 1500)
    assert world.last == [LONGEST] * CLIENTS and controller.outlook().length == LONGEST
    assert controller.outlook().speedup is None


def test_trials_return_when_traffic_is_quiet_again() -> None:
    controller, world = Adaptive(LONGEST, LONGEST), free(costly, 0.1)
    world.run(controller, lambda _: True, 500)
    assert world.last == [0] * CLIENTS
    world.seconds, world.accept = cheap, 0.9
    world.run(controller, lambda _: False, 4 * BLIND + 4 * LAST_PAUSE)
    assert controller.outlook().length >= 1
