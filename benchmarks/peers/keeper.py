"""Ends a worker whose parent is gone: `python -m peers.keeper PID`.

A benchmark that is killed leaves its workers stopped (SIGSTOP), where they read no input and hold their memory for good. The keeper
reads its own input, which nobody writes: it ends with the benchmark, and then it kills the worker and all that it started.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """A process and everything it started, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            for parent in stat_of(int(entry.name))[1:2]:
                children.setdefault(int(parent), []).append(int(entry.name))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


def stat_of(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def keep(pid: int) -> None:
    """Wait for the end of the input, then stop the family, so that it starts nothing more, and kill it."""
    begun = stat_of(pid)[19:20]
    sys.stdin.buffer.read()
    if not begun or stat_of(pid)[19:20] != begun:  # gone already, or its number is another's by now
        return
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for member in descendants(pid):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(member, number)


if __name__ == "__main__":
    keep(int(sys.argv[1]))
