"""Seconds of a step by phase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from outrider.records import PHASES


class PhaseClock:
    """Measures the phases of one step; `host` is the time that no other phase took."""

    def __init__(self) -> None:
        self._start, self._seconds = perf_counter(), dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time spent inside the context as this phase's."""
        start = perf_counter()
        yield
        self._seconds[phase] += perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase up to now."""
        known = sum(self._seconds.values())
        return {**self._seconds, "host": perf_counter() - self._start - known}
