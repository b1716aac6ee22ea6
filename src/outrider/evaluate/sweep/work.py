"""A cell where it is performed: the worker checks that it has the driver's code and data, and says on which machine it ran."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from outrider.errors import OutriderError
from outrider.evaluate.sweep.cells import Kind, Mismatch, code_version, data_of


def perform(job: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The answer to a job as plain data: the record, and beside it where and how long.

    Raises Mismatch where code or data differ from the driver's, ConfigError for a cell that cannot be measured.
    """
    import torch

    if os.path.isdir(job["folder"]):
        os.chdir(job["folder"])
    torch.set_num_threads(job["threads"])
    if job["code"] != (mine := code_version()):
        raise Mismatch(
            f"this worker has outrider {mine} and the driver {job['code']}: install the same on every machine"
        )
    kind = kinds[job["fields"]["kind"]]
    fields = kind.fields.model_validate(job["fields"])
    if job["data"] != data_of(kind.reads(fields)):
        raise Mismatch("the models or prompts differ from the driver's: give every machine the same files")
    load, began = load_average(), perf_counter()
    answer = kind.perform(fields)
    record = {"cell": job["fields"], "result": answer.result, "counts": answer.counts}
    where = {"machine": machine_block(), "seconds": perf_counter() - began, "load": load, "pid": os.getpid()}
    return {"record": record, "measured": answer.measured, "where": where}


def refusal(error: Exception) -> dict[str, Any]:
    """An exception of `perform` as plain data. again: whether another try, perhaps elsewhere, may succeed."""
    if isinstance(error, OutriderError):
        return {"error": str(error), "again": isinstance(error, Mismatch)}
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "again": True}


def machine_block() -> dict[str, Any]:
    """What seconds belong to. `block` is equal for two runs whose seconds may be compared: one machine, as many threads."""
    from outrider.evaluate.measure import machine

    about = {**machine(), "node": platform.node()}
    import torch

    about["threads"] = torch.get_num_threads()
    named = "\0".join(str(about[k]) for k in ("node", "cpu", "threads", "system"))
    return {**about, "block": hashlib.sha256(named.encode()).hexdigest()[:12]}


def load_average() -> float | None:
    """Of the last minute, before the cell began: what others did to its seconds; None where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
