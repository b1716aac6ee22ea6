"""What the scripted worlds share: what a step brings where every position is accepted with one probability, its record, clocks."""

from __future__ import annotations

import random
from collections.abc import Sequence

from outrider.records import Counts, StepRecord


def judged(drafts: Sequence[int], accept: float, draws: random.Random) -> Counts:
    """The counts of a step that judges one draft of each length."""
    counts = Counts()
    for length in drafts:
        accepted = 0
        while accepted < length and draws.random() < accept:
            accepted += 1
        counts.add(length, accepted, min(length, accepted + 1), 0.0, 0.0, 0.0)
        counts.emitted += accepted + 1
    return counts


def recorded(rows: int, scored: int, running: int, target: float, draft: float, counts: Counts) -> StepRecord:
    """A step of `target` and `draft` seconds and nothing else."""
    return StepRecord(rows, scored, running, 0, {"target": target, "rule": 0.0, "host": 0.0, "draft": draft}, counts)


def flat(rows: int) -> float:
    """Seconds of a pass of a target bound by memory."""
    return 0.010 + 0.00002 * rows


def steep(rows: int) -> float:
    """Seconds of a pass of a target bound by arithmetic from the eighth row on."""
    return 0.001 * max(rows, 8)
