"""The controller charges tokens that are read again to the drafts that were rejected, though the next step reads them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from outrider.control.adaptive import Adaptive
from outrider.params import SamplingParams
from outrider.theory.recurrent import MERGED, speedup
from outrider.types import SequenceView
from tests.control.verdicts import judged, recorded

BASE, ROW = 0.010, 0.001
"""Seconds of a pass, and of each of its rows beyond the first."""


def run(controller: Adaptive, accept: float, steps: int, told: bool, seed: int = 0) -> dict[int, int]:
    """Lengths asked for in the second half of a run of one sequence. told: the record says what was read again."""
    chance, asked, behind, pending = random.Random(seed), dict[int, int](), 0, list[int]()
    view = SequenceView(0, 0, [0], 1, 0, SamplingParams())
    for step in range(steps):
        counts = judged(pending, accept, chance) if pending else judged([0], accept, chance)
        length, now = max(pending, default=0), controller.budget([view])
        forwards = 1 + (behind > MERGED and length > 0)
        seconds = BASE * forwards + ROW * (length + behind)
        record = recorded(1 + length, 1, 1, seconds, 0.0005 * max(now), counts)
        controller.observe(replace(record, replayed=behind if told else 0))
        gathered = 0 if behind > MERGED else behind
        behind = 0 if length == 0 or counts.rejected == 0 else gathered + 1 + counts.accepted
        pending = now
        if step > steps // 2:
            asked[now[0]] = asked.get(now[0], 0) + 1
    return asked


def exact(accept: float, length: int) -> float:
    """Speed-up of this machine."""
    return speedup([accept] * length, 0.05, 1.0 + ROW / BASE * length, ROW / BASE) if length else 1.0


@pytest.mark.parametrize("accept", [0.35, 0.9])
def test_the_choice_is_that_of_the_theory(accept: float) -> None:
    """Drafts that lose by being read again are given up, and drafts that win are kept, at a length about as good as the best."""
    asked = run(Adaptive(4, 6), accept, 4000, told=True)
    chosen = max(asked, key=lambda x: asked[x])
    assert exact(accept, chosen) >= 0.95 * max(exact(accept, n) for n in range(7))
    assert (chosen == 0) == (accept < 0.5)


def test_a_controller_that_is_not_told_charges_the_wrong_length() -> None:
    """Negative control: plain steps of a trial pay for the drafts before them, so drafting goes on though it loses."""
    asked = run(Adaptive(4, 6), 0.35, 4000, told=False)
    assert max(asked, key=lambda x: asked[x]) > 0
