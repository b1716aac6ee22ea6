"""Cells for tests of sweeps that measure nothing: their result is a function of their fields, and some of them misbehave."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a worker that imports this starts at once
    from outrider.evaluate.sweep.cells import Cell

WORK = "tests.evaluate.sweep_work:perform"
MACHINE = {"block": "b", "node": "n", "cpu": "c", "threads": 1}


def cells(count: int, alone: bool = False, threads: int | None = None, **fields: Any) -> list[Cell]:
    """`count` cells that differ in their number; a field that is a dict names the cells that have it: {number: value}."""
    from outrider.evaluate.sweep.cells import Cell

    out = []
    for n in range(count):
        mine = {k: v.get(n) if isinstance(v, dict) else v for k, v in fields.items()}
        mine = {"kind": "toy", "n": n, **{k: v for k, v in mine.items() if v is not None}}
        out.append(Cell(n, f"toy: n {n}", mine, alone, threads, "code", "data"))
    return out


def found(fields: dict[str, Any]) -> dict[str, Any]:
    """What a cell finds, wherever it is performed."""
    digest = hashlib.sha256(str(sorted(fields.items())).encode()).hexdigest()
    return {
        "cell": fields,
        "result": {"digest": digest, "value": int(digest[:8], 16) / 2**32},
        "counts": counted(fields["n"]),
    }


def counted(n: int) -> dict[str, Any]:
    """Its share of the ledger."""
    return {"judged": n, "rejected": n // 2, "risk": n / 4, "spread": n / 8, "bias": 0.0}


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Do as the fields say: pause, die (always, or the first time a mark file is missing), raise, refuse."""
    fields = job["fields"]
    time.sleep(fields.get("pause", float(os.environ.get("SWEEP_PAUSE", "0"))))
    if fields.get("die") or (fields.get("mark") and first(Path(fields["mark"]))):
        os.kill(os.getpid(), signal.SIGKILL)
    if fields.get("raise"):
        raise ValueError("a bug")
    if fields.get("refuse"):
        from outrider.errors import ConfigError

        raise ConfigError("the cell is wrong")
    if fields.get("elsewhere"):
        from outrider.evaluate.sweep.cells import Mismatch

        raise Mismatch("other code")
    where = {
        "machine": MACHINE,
        "seconds": 0.0,
        "load": None,
        "pid": os.getpid(),
        "threads": os.environ["OMP_NUM_THREADS"],
    }
    return {"record": found(fields), "measured": None, "where": where}


def first(mark: Path) -> bool:
    """Whether nobody was here before."""
    try:
        mark.touch(exist_ok=False)
        return True
    except FileExistsError:
        return False
