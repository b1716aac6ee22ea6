"""The line that ends a text in the terminal: how fast it came, what drafting gave, and whether the ledger agrees."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from outrider.cli import tables
from outrider.records import Counts, StepRecord


class Closing:
    """A sink of an engine's steps: `begin` before a text, and afterwards the line."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.first: float | None = None
        self.start = self.seconds = 0.0

    def begin(self, engine: Any) -> Closing:
        """A text begins. The engine's sums are started anew, so that they are those of the text that follows."""
        self.engine, self.first = engine, None
        engine.reset()
        self.start = perf_counter()
        return self

    def __call__(self, record: StepRecord) -> None:
        if self.first is None and record.counts.emitted:
            self.first = perf_counter() - self.start

    def line(self) -> str:
        """The line; `seconds` are those of the text."""
        self.seconds = perf_counter() - self.start
        return sentence(self.engine.counts, self.seconds, self.first, lossless=self.engine.parts.rule.lossless)


def sentence(counts: Counts, seconds: float, first: float | None, *, lossless: bool = True) -> str:
    """Tokens per second, tokens per step, rejections as the rule predicted and as they came, and seconds to the first token."""
    from outrider.telemetry.ledger import acceptance_length, ledger, spent

    if not counts.emitted or first is None:
        return f"no token came in {seconds:.2f} s"
    parts = [f"{counts.emitted} tokens, {tables.rate(counts.emitted / max(seconds, 1e-9))} tokens/s"]
    if counts.judged:
        book = ledger(counts)
        parts.append(f"acceptance length {acceptance_length(counts):.2f}")
        parts.append(f"rejections {book.predicted:.1f} predicted, {book.observed} observed")
    else:
        parts.append("nothing was drafted")
    if counts.bias or not lossless:
        parts.append(spent(counts.bias, counts.emitted))
    return "; ".join([*parts, f"first token after {first:.2f} s"])
