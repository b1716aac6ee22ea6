"""Lengths per sequence and BASS's rule on scripted engines whose best lengths are known exactly. Times are the script's."""

from __future__ import annotations

import math
import random

import pytest

from outrider.control.adaptive import Adaptive
from outrider.control.bass import Bass
from outrider.control.fixed import Fixed
from outrider.control.per_sequence import PerSequence
from outrider.control.registry import load_controller
from outrider.errors import ConfigError
from outrider.params import SamplingParams
from outrider.records import Counts, SequenceStep, StepRecord
from outrider.types import SequenceView
from tests.control.mixture import Mixture, best_common, best_of_all, bound, cheap, dear, free, rate

FIRST, LONGEST = 3, 12
MIXED = [0.95, 0.5] * 4


def settled(world: Mixture, controller, learn: int, steps: int) -> float:
    """Speed after `learn` steps."""
    world.run(controller, learn)
    world.tokens, world.seconds = 0, 0.0
    return world.run(controller, steps).speed


@pytest.mark.parametrize("accept", [0.0, 0.5, 0.9])
def test_the_script_takes_the_time_and_brings_the_tokens_that_the_formula_says(accept) -> None:
    """1,500 steps of 4 sequences: the mean number of accepted tokens is within 6 of its standard errors."""
    for length in (0, 3):
        world = Mixture(bound, [accept] * 4).run(Fixed(length), 1500)
        assert world.speed == pytest.approx(rate(bound, [accept] * 4, [length] * 4), rel=6 * 2.0 / math.sqrt(6000))


def test_a_mixture_is_faster_than_with_the_best_common_length() -> None:
    """Half copies and half free texts, eight at a time: within 5% of the best lengths, and at least 1.05 over any common one."""
    speed = settled(Mixture(bound, MIXED, limit=150, noise=0.05), PerSequence(FIRST, LONGEST), 600, 1200)
    assert speed >= 1.05 * best_common(bound, MIXED)
    assert speed >= 0.95 * best_of_all(bound, MIXED)


@pytest.mark.parametrize("kind", [Adaptive, PerSequence])
def test_small_gains_that_add_up_are_found(kind) -> None:
    """A length more gains less than the margin from 8 on, and four more together 6%. All texts are alike: where they differ, longer
    drafts leave more of the hard ones in the batch."""
    accept = [0.92] * 8
    speed = settled(Mixture(cheap, accept, limit=96, noise=0.03), kind(FIRST, LONGEST), 1200, 600)
    assert speed >= 0.97 * best_common(cheap, accept)


@pytest.mark.parametrize("sequences", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_it_is_level_with_a_common_length_and_with_bass(sequences) -> None:
    accept = [0.95, 0.5] * (sequences // 2)
    speed = {
        kind: settled(Mixture(bound, accept, limit=150, noise=0.05, seed=1), kind(FIRST, LONGEST), 500, 700)
        for kind in (Adaptive, Bass, PerSequence)
    }
    assert speed[PerSequence] >= 1.0 * speed[Adaptive] and speed[PerSequence] > speed[Bass], speed


@pytest.mark.parametrize("clock", [bound, dear, pytest.param(free, marks=pytest.mark.slow)])
def test_it_is_never_slower_than_plain_decoding(clock) -> None:
    """1,500 steps of eight sequences of which two copy, learning included."""
    accept = [0.9, 0.9, 0.3, 0.3, 0.1, 0.1, 0.3, 0.1]
    speed = Mixture(clock, accept, limit=150, noise=0.05).run(PerSequence(FIRST, LONGEST), 1500).speed
    assert speed >= 0.97 * rate(clock, accept, [0] * 8)


def test_the_control_a_fixed_length_is_slower_there() -> None:
    accept = [0.9, 0.9, 0.3, 0.3, 0.1, 0.1, 0.3, 0.1]
    assert Mixture(dear, accept).run(Fixed(FIRST), 300).speed < 0.6 * rate(dear, accept, [0] * 8)


def test_equal_sequences_lose_nothing_by_it() -> None:
    """Shares differ by chance alone; shrinkage leaves almost nothing of that."""
    accept = [0.6] * 4
    ours = settled(Mixture(bound, accept, noise=0.05), PerSequence(FIRST, LONGEST), 500, 1000)
    assert ours >= 0.95 * best_of_all(bound, accept)


def test_copies_get_the_rows() -> None:
    world, controller = Mixture(bound, MIXED, limit=1 << 28), PerSequence(FIRST, LONGEST)
    world.run(controller, 700)
    asked = [t.asked for t in world.texts]
    assert min(asked[::2]) > max(asked[1::2]), asked


def test_a_text_that_begins_to_copy_is_noticed() -> None:
    """From token 2,000 on the second sequence copies too."""
    later = lambda written: 0.95 if written > 2000 else 0.1  # noqa: E731
    world, controller = Mixture(bound, [0.95, later, 0.95, 0.95], limit=1 << 28), PerSequence(FIRST, LONGEST)
    while len(world.texts[1].tokens) < 2000:
        world.run(controller, 100)
    before = world.texts[1].asked
    world.run(controller, 600)
    assert before <= 1 < world.texts[1].asked


def test_seeds_requests_and_ends_set_their_limits() -> None:
    params = [
        SamplingParams(seed=1), SamplingParams(draft_length=2), SamplingParams(max_tokens=6), SamplingParams(),
        SamplingParams(seed=1, temperature=0),
    ]  # fmt: skip
    controller = PerSequence(FIRST, LONGEST)
    Mixture(free, [0.95] * 5, limit=1 << 28).run(controller, 900)
    views = [SequenceView(i, i, [0] * 4, 1, 3, p) for i, p in enumerate(params)]
    lengths = controller.budget(views)
    assert lengths[0] == FIRST, "a seed pins the length"
    assert lengths[1] <= 2, "its own limit"
    assert lengths[2] <= 2, "three of six tokens are written, and the last one needs no draft"
    assert lengths[3] > FIRST and lengths[4] > FIRST
    reading = SequenceView(5, 5, [0] * 9, 9, 0, SamplingParams())
    assert controller.budget([*views, reading])[5] == 0, "its prompt is not read yet"
    assert controller.budget(views[:1]) == [FIRST], "nobody is left to share"
    assert controller.budget([reading]) == [0] and controller.budget([]) == []
    assert PerSequence(FIRST, LONGEST, invariant=True).budget(views[:1]) == [FIRST]


def test_lengths_are_a_function_of_counts_and_never_of_tokens() -> None:
    """The same counts with other token ids: the same lengths, step by step."""

    class Recorded(PerSequence):
        def __init__(self, token: int) -> None:
            super().__init__(FIRST, LONGEST)
            self.token, self.asked = token, []

        def budget(self, sequences):
            for view in sequences:
                view.tokens[:] = [self.token] * len(view.tokens)
            self.asked.append(super().budget(sequences))
            return self.asked[-1]

    one, two = Recorded(0), Recorded(7)
    for controller in (one, two):
        Mixture(bound, [0.9, 0.3, 0.6], limit=80, noise=0.1, seed=4).run(controller, 400)
    assert one.asked == two.asked and len({tuple(x) for x in one.asked}) > 3


def test_the_outlook_counts_what_shares_bring() -> None:
    world, controller = Mixture(bound, MIXED, limit=150), PerSequence(FIRST, LONGEST)
    world.run(controller, 1500)
    look = controller.outlook()
    assert look.length >= 1 and look.speedup == pytest.approx(world.speed / rate(bound, MIXED, [0] * 8), rel=0.12)
    assert [s.length for s in controller.speeds()][:1] == [0]


# ------------------------------------------------------------------ BASS
def literal(lengths_and_accepted: list[list[int]]) -> list[int]:
    """The rule as the paper writes it, on a list of accepted counts for each round."""
    length, shortened, out = 7, 0, []
    for accepted in lengths_and_accepted:
        if max(accepted) >= length:
            length, shortened = min(length + 2, 32), 0
        else:
            length, shortened = max(1, max(accepted), length - math.ceil(length / 10) - shortened), 1
        out.append(length)
    return out


def test_bass_follows_its_rule() -> None:
    draws, controller, rounds, found = random.Random(1), Bass(3), [], []
    views = [SequenceView(i, i, [0], 1, 0, SamplingParams()) for i in range(3)]
    for _ in range(60):
        for _ in range(2):  # the draft of an older length comes first
            length = controller.budget(views)[0]
            accepted = [min(length, draws.randrange(12)) for _ in range(3)]
            each = tuple(SequenceStep(i, length, min(length, a + 1), a) for i, a in enumerate(accepted))
            before = controller.length
            controller.observe(StepRecord(0, 3, 3, 0, {}, Counts(), each=each))
            if controller.length != before:
                rounds.append(accepted)
                found.append(controller.length)
    assert found == literal(rounds) and len(set(found)) > 4


def test_bass_drafts_longer_in_larger_batches() -> None:
    """The weakness for which it is here: with 16 sequences one lucky one keeps the length high, where rows cost most."""
    length = {}
    for b in (1, 16):
        controller = Bass(3)
        Mixture(dear, [0.6] * b, longest=32).run(controller, 200)
        world = Mixture(dear, [0.6] * b, longest=32).run(controller, 400)
        length[b] = world.rows / 400 / b - 1
    assert length[16] > 2 * length[1]


def test_bass_leaves_seeded_requests_alone_and_learns_nothing_beside_them() -> None:
    views = [SequenceView(i, i, [0], 1, 0, SamplingParams(seed=s)) for i, s in enumerate((None, 1))]
    controller = Bass(3)
    for _ in range(3):
        assert controller.budget(views) == [7, 3]
        each = (SequenceStep(0, 7, 7, 7), SequenceStep(1, 3, 3, 3))
        controller.observe(StepRecord(0, 2, 2, 0, {}, Counts(), each=each))


def test_controllers_by_name() -> None:
    assert isinstance(load_controller("per_sequence", 3, 12), PerSequence)
    assert isinstance(load_controller("bass", 3, 32), Bass) and isinstance(load_controller("auto", 3, 3), Fixed)
    assert isinstance(load_controller("adaptive", 0, 0), Fixed), "nothing is drafted"
    with pytest.raises(ConfigError, match="did you mean 'per_sequence'"):
        load_controller("per-sequence", 3, 3)
    for bad in ((4, 3), (-1, 3), (0, 0)):
        with pytest.raises(ConfigError, match="draft lengths"):
            Bass(*bad)
