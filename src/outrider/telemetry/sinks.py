"""Where step records go: memory for tests and reports, JSON lines for everything else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from outrider.records import StepRecord


class MemorySink:
    """Keeps every record in a list."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def __call__(self, record: StepRecord) -> None:
        self.records.append(record)


class JsonlSink:
    """Appends one JSON object per step to a file; close it (or use it as a context manager) to flush the last ones."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()

    def __call__(self, record: StepRecord) -> None:
        self._file.write(json.dumps(asdict(record)) + "\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonlSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
