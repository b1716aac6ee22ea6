"""CPU seconds of every test, of its children too: what a test costs, however busy the machine is. `make durations` prints them.

As a plugin (`pytest -p tests.durations --cpu-seconds=FILE`) it appends a JSON line for each phase of a test, and one for what a
process did besides (imports, collection). `python -m tests.durations FILE` adds up by folder, file and function. Time of a child is
counted where it is waited for.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

OTHER = "imports and collection"
SHOWN = 100
"""How many tests are listed."""


def cpu_seconds() -> float:
    """User and system, of this process and of its children that have ended."""
    return sum(os.times()[:4])


class Recorder:
    """Writes the lines; what is not spent in tests is `OTHER`."""

    def __init__(self, path: Path) -> None:
        self.path, self.inside = path, 0.0

    def write(self, test: str, seconds: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"test": test, "seconds": round(seconds, 3)}) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = cpu_seconds()
        result = yield
        self.inside += (spent := cpu_seconds() - before)
        self.write(item.nodeid, spent)
        return result

    def pytest_unconfigure(self) -> None:
        self.write(OTHER, cpu_seconds() - self.inside)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-seconds", type=Path, default=None, metavar="FILE", help="append CPU seconds of tests to FILE"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--cpu-seconds")
    if path is not None and not config.getoption("numprocesses", None):  # workers write, not the one that hands out
        config.pluginmanager.register(Recorder(path.absolute()))


def main(path: Path) -> None:
    """The table: sums by folder, file and function, and the slowest tests."""
    by: dict[str, Counter[str]] = {"folder": Counter(), "file": Counter(), "function": Counter(), "test": Counter()}
    for row in map(json.loads, path.read_text().splitlines()):
        file, _, name = row["test"].partition("::")
        keys = (file.rpartition("/")[0] or file, file, f"{file}::{name.partition('[')[0]}", row["test"])
        for sums, key in zip(by.values(), keys, strict=True):
            sums[key] += row["seconds"]
    for kind, sums in by.items():
        print(f"\nCPU seconds by {kind}: {sums.total():.0f} in all")
        for key, seconds in sums.most_common(SHOWN):
            print(f"{seconds:9.1f}  {key}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
