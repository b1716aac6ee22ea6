"""Two imported runs beside each other: what the requests of each took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from outrider.evaluate.records import Record


@dataclass(frozen=True, slots=True)
class Difference:
    """Median of the run over the baseline's, with a bootstrap interval over requests (95%)."""

    what: Literal["first token", "per token", "end to end"]
    value: float
    low: float
    high: float


def differences(run: Iterable[Record], base: Iterable[Record], *, seed: int = 0, draws: int = 2000) -> list[Difference]:
    """Latencies of requests, each run resampled on its own.

    Requests of one run share its queues, so this says nothing about another run of the same system: repeat the runs for that.
    """
    chance, out = np.random.default_rng(seed), []
    ours, theirs = _latencies(run), _latencies(base)
    for what in ours:
        a, b = np.array(ours[what]), np.array(theirs[what])
        if len(a) < 2 or len(b) < 2 or not np.median(b) > 0:
            continue
        ratio = [
            float(np.median(chance.choice(a, len(a))) / max(float(np.median(chance.choice(b, len(b)))), 1e-12))
            for _ in range(draws)
        ]
        low, high = np.quantile(ratio, [0.025, 0.975])
        out.append(Difference(what, float(np.median(a) / np.median(b)), float(low), float(high)))
    return out


def _latencies(records: Iterable[Record]) -> dict[Any, Sequence[float]]:
    timings = [t for r in records for t in r.timings]
    return {
        "first token": [t.first for t in timings],
        "per token": [(t.end - t.first) / (t.tokens - 1) for t in timings if t.tokens > 1 and t.end > t.first],
        "end to end": [t.end for t in timings],
    }
