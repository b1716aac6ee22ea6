"""The records of a sweep in a store. A cell has one record for ever; what it took is beside it, written in the same transaction.

Keys: (identity, try, 0) is the record, equal wherever the cell was performed; (identity, try, 1) what was measured, where, and
after how many attempts. `try` is 0, and rises only where a failed cell is tried again because the user asked for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outrider.errors import OutriderError
from outrider.evaluate.store.store import Store, canonical
from outrider.evaluate.sweep.cells import Cell

KIND = "sweep"
RECORD, BESIDE = 0, 1


class Disagreement(OutriderError):
    """One cell was performed twice and found two different things."""


@dataclass(slots=True)
class Known:
    """The latest try of a cell. record: None while there is none. beside: what was measured, where."""

    number: int = -1
    record: dict[str, Any] | None = None
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> str | None:
        """Why it failed; None where it did not."""
        return None if self.record is None else self.record.get("failed")


class Book:
    """One plan's run in a store, written by this process alone. Use it as a context manager, or close it."""

    def __init__(self, where: str | Path, name: str, cells: Iterable[Cell]) -> None:
        """Raises ConfigError for a store that cannot be used, or whose sweep of that name another living process drives."""
        self.store = Store(where)
        try:
            self.run = self.store.begin(KIND, name, {"plan": name}, reopen=True)
            self.known = {cell.identity: Known() for cell in cells}
            for (task, number, part), data in self.store.records(self.run).items():
                self._learn(task, number, part, data)
        except BaseException:
            self.close()
            raise
        self.duplicates = 0

    def _learn(self, task: str, number: int, part: int, data: dict[str, Any]) -> None:
        if (known := self.known.get(task)) is None:  # of another plan's cells, or of older code
            return
        if number > known.number:
            known.number, known.record, known.beside = number, None, {}
        if number == known.number:
            known.record, known.beside = (data, known.beside) if part == RECORD else (known.record, data)

    def has(self, cell: Cell, retry: bool = False) -> bool:
        """Whether a cell needs no work. retry: one that failed does."""
        known = self.known[cell.identity]
        return known.record is not None and not (retry and known.failed)

    def put(self, cell: Cell, record: dict[str, Any], beside: dict[str, Any]) -> bool:
        """Commit what a cell found; False where it is there already, and says the same. Raises Disagreement where it does not."""
        known = self.known[cell.identity]
        if known.record is not None and not known.failed:
            self.duplicates += 1
            if canonical(known.record) != canonical(record):
                raise Disagreement(
                    f"cell {cell.number} ({cell.label}) was performed twice with different results: a machine or a thread "
                    "count differs, or something is not deterministic; the first result is kept"
                )
            return False
        number = known.number + 1
        new = self.store.append(
            self.run, (cell.identity, number, RECORD), record, {(cell.identity, number, BESIDE): beside}
        )
        known.number, known.record, known.beside = number, record, beside
        return new

    def fail(self, cell: Cell, reason: str, attempts: int) -> None:
        """Commit that a cell cannot be had: an outcome without a number."""
        self.put(cell, {"cell": cell.fields, "failed": reason}, {"attempts": attempts})

    def touch(self) -> None:
        """Tell other machines that this process still drives the sweep."""
        self.store.touch(self.run)

    def finish(self, summary: dict[str, Any], *, whole: bool = True) -> None:
        """End the run for now. whole: whether every cell of the plan has its record."""
        self.store.finish(self.run, summary, "done" if whole else "failed")

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def __enter__(self) -> Book:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
