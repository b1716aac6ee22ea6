"""Pass times by context: the fit finds its own constants, gains rise with context and batch, the crossing is one."""

from __future__ import annotations

import random

import pytest

from outrider.theory.context_times import ContextTimes, TimedPass
from outrider.theory.roofline import self_draft_speedup

TIMES = ContextTimes(1.2e-3, 3e-5, 9e-7, 7e-8, 3e-4, 1e-4)
SHAPES = [(b, n, s) for b in (1, 4) for n in (1, 3, 6) for s in (512, 2048, 16_384)]


def test_the_fit_finds_the_constants_of_exact_times() -> None:
    found = ContextTimes.fit(TimedPass(*shape, TIMES.seconds(*shape)) for shape in SHAPES)
    for name in ("whole", "row", "token", "pair"):
        assert getattr(found, name) == pytest.approx(getattr(TIMES, name), rel=1e-5)


def test_the_fit_of_noisy_times_foretells_others() -> None:
    chance = random.Random(3)
    found = ContextTimes.fit(TimedPass(*s, TIMES.seconds(*s) * chance.uniform(0.95, 1.05)) for s in SHAPES)
    for shape in ((2, 4, 4096), (1, 8, 8192), (4, 2, 1024)):
        assert found.seconds(*shape) == pytest.approx(TIMES.seconds(*shape), rel=0.08)


def test_constants_are_never_negative() -> None:
    """Times that fall with the context are noise, not a gain."""
    found = ContextTimes.fit(TimedPass(1, n, s, 1e-3 / (1 + s / 1e5)) for n in (1, 2) for s in (10, 1000, 9000))
    assert min(found.whole, found.row, found.token, found.pair) == 0.0 and found.whole > 0


@pytest.mark.parametrize("passes", [[], [TimedPass(1, 1, 0, 1.0)] * 3])
def test_too_few_passes_are_refused(passes: list[TimedPass]) -> None:
    with pytest.raises(ValueError, match="four timed passes"):
        ContextTimes.fit(passes)


def test_gains_rise_with_context_and_with_sequences() -> None:
    gains = {(b, s): TIMES.best(b, s, 512, 0.85)[1] for b in (1, 2, 4, 8) for s in (2048, 4096, 8192, 16_384)}
    assert all(gains[b, 2 * s] > gains[b, s] for b, s in gains if (b, 2 * s) in gains)
    assert all(gains[2 * b, s] > gains[b, s] for b, s in gains if (2 * b, s) in gains)


def test_below_the_crossing_a_view_is_a_loss_at_every_length() -> None:
    for sequences in (1, 4):
        at = TIMES.crossing(sequences, 512, 0.8)
        assert at is not None and TIMES.best(sequences, at, 512, 0.8)[1] > 1
        assert TIMES.best(sequences, at - 1, 512, 0.8) == (0, 1.0)
    one, four = TIMES.crossing(1, 512, 0.8), TIMES.crossing(4, 512, 0.8)
    assert one is not None and four is not None and four < one
    assert TIMES.crossing(1, 512, 0.0) is None


def test_without_a_host_it_is_the_formula_of_shares() -> None:
    """`roofline.self_draft_speedup` with the shares that these times give."""
    bare = ContextTimes(TIMES.whole, TIMES.row, TIMES.token, TIMES.pair)
    plain = bare.plain(2, 8192)
    shares = bare.seconds(2, 1, 512) / plain, bare.seconds(2, 5, 8192) / plain
    assert bare.gain(2, 8192, 512, 4, 0.9) == pytest.approx(self_draft_speedup(0.9, 4, *shares))
