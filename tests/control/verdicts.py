"""What a step with drafts of these lengths brings in a world where every position is accepted with one probability."""

from __future__ import annotations

import random
from collections.abc import Sequence

from outrider.types import Counts


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
