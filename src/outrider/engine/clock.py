"""Seconds of a step by phase."""

from __future__ import annotations

from time import perf_counter

from outrider.records import PHASES


class PhaseClock:
    """Measures the phases of one step, one after the other; `host` is whatever no other phase took.

    `with clock("target"): ...`: inside, the seconds are this phase's.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._entered = "", 0.0
        self._start = perf_counter()

    def __call__(self, phase: str) -> PhaseClock:
        self._phase = phase
        return self

    def __enter__(self) -> None:
        self._entered = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._phase] += perf_counter() - self._entered

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase up to now."""
        known = sum(self._seconds.values())
        return {**self._seconds, "host": perf_counter() - self._start - known}
