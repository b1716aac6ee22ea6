"""Checks whether a quantised draft is faster on this machine, measured once at loading: instruction sets alone do not show it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Protocol, runtime_checkable

from outrider.nn.kv import ContiguousKV
from outrider.types import Draft, Rows, Scores

ROUNDS = 3
SIZES = (1, 4)
"""Rows of a forward: a draft model's step, and its catching up with what was accepted."""


@runtime_checkable
class Forward(Protocol):
    """The interface common to quantised and plain blocks."""

    def forward(self, rows: Rows, kv: ContiguousKV, /) -> Scores: ...


def seconds(model: Forward, new_kv: Callable[[], ContiguousKV]) -> float:
    """The sum over SIZES of the least time of a forward."""
    total = 0.0
    for size in SIZES:
        rows, times = Rows.assemble([0], [[0] * size], [0], Draft.empty(1)), []
        for _ in range(ROUNDS + 1):
            kv = new_kv()
            kv.reserve(rows)
            start = perf_counter()
            model.forward(rows, kv)
            times.append(perf_counter() - start)
        total += min(times[1:])
    return total


def slower(quantize: str, quantised: float, plain: float, dtype: str) -> str | None:
    """A notice if quantised blocks took longer (in seconds) than plain ones in the native decoder."""
    if quantised <= plain:
        return None
    return (
        f"{quantize} weights make this draft slower on this machine ({1e3 * quantised:.1f} ms where {dtype} ones take "
        f"{1e3 * plain:.1f} ms): leave --quantize-draft out"
    )
