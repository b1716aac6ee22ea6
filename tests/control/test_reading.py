"""The controller where drafters must read what they draft for: prompts, and what was written while they were not asked."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product

import pytest

from outrider.control.adaptive import Adaptive
from outrider.control.fixed import Fixed
from outrider.control.prefill_cost import DEFERRED_PREFILL_ROWS, ENOUGH, ESTIMATE_DECAY_STEPS, PrefillCost
from outrider.params import SamplingParams
from outrider.records import Counts
from outrider.types import SequenceView
from tests.control.verdicts import flat, judged, recorded, steep
from tests.covering import covering, slow_beyond

FREE = SamplingParams()
CHUNK = 256


@dataclass
class Request:
    number: int
    prompt: int
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    read: int = 0
    drafted: int = 0

    def __post_init__(self) -> None:
        self.tokens = [0] * self.prompt

    def view(self, slot: int) -> SequenceView:
        return SequenceView(slot, self.number, self.tokens, self.prompt, self.cached, FREE)


class Closed:
    """Clients that ask again as soon as they are served, for `output` tokens after a prompt of `prompt` rows.

    A pass takes `seconds(rows)`, a level of drafts `level`, and the drafter reads a row it has not seen in `row` seconds.
    """

    def __init__(
        self,
        seconds: Callable[[int], float],
        *,
        clients: int = 16,
        prompt: int = 100,
        output: int = 32,
        accept: float = 0.8,
        level: float = 0.0005,
        row: float = 0.0,
    ) -> None:
        self.seconds, self.prompt, self.output, self.accept = seconds, prompt, output, accept
        self.level, self.row = level, row
        self.random, self.clock, self.tokens, self.read, self.asked = random.Random(3), 0.0, 0, 0, 0
        self.live = [self._next() for _ in range(clients)]

    def _next(self) -> Request:
        self.asked += 1
        return Request(self.asked, self.prompt)

    def step(self, controller: Adaptive | Fixed) -> None:
        rows, scored, counts = 0, [], Counts()
        room = CHUNK
        for request in self.live:
            missing = len(request.tokens) - request.cached
            part = 1 if missing == 1 else min(missing, room)
            room -= part if missing > 1 else 0
            request.cached += part
            rows += part
            if part == missing:
                scored.append(request)
        for request in scored:
            counts.merge(one := judged([request.drafted], self.accept, self.random))
            rows += request.drafted
            request.tokens += [0] * min(one.emitted, self.output - len(request.tokens) + request.prompt)
            request.cached = len(request.tokens) - 1
        self.tokens += counts.emitted
        self.live = [self._next() if len(r.tokens) - r.prompt >= self.output else r for r in self.live]
        lengths = controller.budget([r.view(i) for i, r in enumerate(self.live)])
        drafting = self._draft(lengths)
        controller.observe(recorded(rows, len(scored), len(self.live), self.seconds(rows), drafting, counts))
        self.clock += self.seconds(rows) + drafting

    def _draft(self, lengths: list[int]) -> float:
        """Seconds of drafting for those whose prompt is through, and of reading what they wrote unseen."""
        deepest = unread = 0
        for request, length in zip(self.live, lengths, strict=True):
            ready = len(request.tokens) - request.cached == 1
            request.drafted = length if ready else 0
            if request.drafted:
                deepest, unread = max(deepest, length), unread + len(request.tokens) - request.read
                request.read = len(request.tokens)
        self.read += unread
        return self.level * deepest + self.row * max(0, unread - len(self.live) * (1 + deepest))

    def speed(self, controller: Adaptive | Fixed, steps: int) -> float:
        """Tokens a second over so many steps."""
        tokens, clock = self.tokens, self.clock
        for _ in range(steps):
            self.step(controller)
        return (self.tokens - tokens) / (self.clock - clock)


CLOSED = list(product([flat, steep], [0.2, 0.8], [0.0, 0.0002]))


@pytest.mark.parametrize(("clock", "accept", "row"), slow_beyond(CLOSED, covering(CLOSED)))
def test_never_slower_in_a_closed_loop(clock, accept, row) -> None:
    """Learning included at most 3% are lost over 1,500 steps; afterwards at most 1%."""
    ours, plain = (Closed(clock, accept=accept, row=row) for _ in range(2))
    controller = Adaptive(3, 4)
    assert ours.speed(controller, 1500) >= 0.97 * plain.speed(Fixed(0), 1500)
    assert ours.speed(controller, 3000) >= 0.99 * plain.speed(Fixed(0), 3000)


def gentle(rows: int) -> float:
    """A target on which three drafts for four sequences cost a third of a step."""
    return 0.010 + 0.0003 * rows


def test_reading_is_counted_against_speculation() -> None:
    """Where steps gain by drafts and requests lose by the reading of their prompts, the choice is not to speculate."""
    late = {}
    for row in (0.0, 0.003):
        world, plain, controller = (
            Closed(gentle, clients=4, output=16, row=row),
            Closed(gentle, clients=4, output=16),
            Adaptive(3, 3),
        )
        world.speed(controller, 2000)
        late[row] = world.speed(controller, 2000) / plain.speed(Fixed(0), 2000)
    assert late[0.003] >= 0.98
    assert late[0.0] > 1.2, "the control: without reading it speculates, and gains"


def test_the_control_a_fixed_length_loses_there() -> None:
    worlds = [Closed(gentle, clients=4, output=16, row=0.003) for _ in range(2)]
    pinned = Adaptive(3, 3)
    pinned.choice = lambda sequences: 3  # type: ignore[method-assign]
    assert worlds[0].speed(pinned, 1000) < 0.9 * worlds[1].speed(Fixed(0), 1000)


class Stalled(Closed):
    """The machine stands still for a second while the drafter reads the prompts of some requests."""

    stalls: tuple[int, ...] = (2,)

    def _draft(self, lengths: list[int]) -> float:
        fresh = any(r.number in self.stalls and r.read == 0 and n for r, n in zip(self.live, lengths, strict=True))
        return super()._draft(lengths) + (1.0 if fresh else 0.0)


@pytest.mark.parametrize("output", [24, 64])
def test_a_stall_does_not_end_drafting_for_good(output) -> None:
    """One client for whom drafts pay; afterwards it is as fast as if nothing had been."""
    worlds = [kind(gentle, clients=1, output=output, row=0.00005) for kind in (Stalled, Closed)]
    controllers = [Adaptive(3, 4), Adaptive(3, 4)]
    for world, controller in zip(worlds, controllers, strict=True):
        world.speed(controller, 2000)
    assert worlds[0].speed(controllers[0], 2000) >= 0.95 * worlds[1].speed(controllers[1], 2000)


def views(*written: int, prompt: int = 10) -> list[SequenceView]:
    return [SequenceView(i, i, [0] * (prompt + n), prompt, prompt + n - 1, FREE) for i, n in enumerate(written)]


def known() -> PrefillCost:
    """A drafter that reads a row in ten milliseconds."""
    reading = PrefillCost()
    for _ in range(ENOUGH):
        reading.learn(rows=100, seconds=1.0)
    return reading


def test_what_was_not_read_is_owed() -> None:
    reading, live = known(), views(0, 0)
    assert reading.behind(live) == pytest.approx(0.2)  # two prompts of ten rows
    reading.notice(live, drafting=True)
    assert reading.behind(live) == 0.0
    for view in live:
        view.tokens.extend([0] * 5)
    live = [replace(v, cached=len(v.tokens) - 1) for v in live]
    reading.notice(live, drafting=False)
    assert reading.behind(live) == pytest.approx(0.1, rel=0.001)
    reading.notice(live[:1], drafting=True)
    assert reading.behind(live) == pytest.approx(0.15, rel=0.001), (
        "one was read, the other has gone with what was known of it"
    )


def test_requests_that_ended_tell_what_is_ahead() -> None:
    reading = known()
    old, new = views(30), views(4)
    assert reading.ahead(new) == math.inf
    assert reading.share(10.0) == 0.0
    reading.notice(old, drafting=True)
    reading.notice(new, drafting=True)  # another request in the same slot
    assert reading.ahead(new) == pytest.approx(26.0)
    assert reading.ahead(views(40)) == pytest.approx(30.0 / 4), "longer than usual: not over at once"
    assert reading.share(30.0) == pytest.approx(0.1), "ten rows of prompt to thirty tokens, ten milliseconds each"


def test_a_stall_in_one_reading_is_not_believed() -> None:
    reading, live = PrefillCost(), views(0)
    reading.learn(rows=100, seconds=100.0)
    assert reading.behind(live) == 0.0, "one reading says nothing"
    for _ in range(ENOUGH):
        reading.learn(rows=100, seconds=1.0)
    assert reading.behind(live) == pytest.approx(0.1)


def test_what_is_not_measured_for_long_is_believed_less() -> None:
    """So that a time that was wrong cannot keep the drafter from being measured again."""
    reading, live = known(), views(5)
    for _ in range(int(3 * ESTIMATE_DECAY_STEPS)):
        reading.notice(live, drafting=False)
    assert reading.behind(live) < 0.06 * 0.15
    reading.learn(rows=100, seconds=1.0)
    assert reading.behind(live) == pytest.approx(0.15)


def test_no_more_is_owed_than_a_drafter_puts_off() -> None:
    assert known().behind(views(2000)) == pytest.approx(0.01 * DEFERRED_PREFILL_ROWS)


def test_a_slot_that_was_given_away_is_read_again() -> None:
    """Preempted: the same tokens in the same slot, and nothing in any cache."""
    reading, (view,) = known(), views(40)
    reading.notice([view], drafting=True)
    assert reading.behind([view]) == 0.0
    again = SequenceView(view.slot, view.seed, view.tokens, view.prompt, 0, view.params)
    assert reading.behind([again]) == pytest.approx(0.49)


def test_who_had_no_draft_refused_none() -> None:
    """Three sequences whose drafts are all accepted, and every step a fourth that has just read its prompt."""
    controller, draws = Adaptive(2, 2), random.Random(0)
    live = [*views(3, 3, 3), replace(views(0)[0], slot=3, cached=0)]
    for _ in range(40):
        controller.budget(live)
        counts = judged([2, 2, 2], 1.0, draws)
        counts.merge(judged([0], 1.0, draws))
        controller.observe(recorded(20, 4, 4, 0.01, 0.001, counts))
    assert controller.tokens_per_step(2) == pytest.approx(3.0)
