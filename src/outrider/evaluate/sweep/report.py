"""The page of a sweep, and the rows of its table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outrider.evaluate.html import escaped, intervals, page, table, write_page
from outrider.evaluate.workloads import told

COLUMNS = ("measurement", "cells", "arm", "tokens per step", "speed-up", "the ledger")


def rows_of(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for every arm of every measurement, as text."""
    out: list[tuple[str, ...]] = []
    for g in document["groups"]:
        head = (g["label"], f"{g['done']}/{g['cells']}" + (f", {g['failed']} failed" if g["failed"] else ""))
        faster = {s["arm"]: s for s in g.get("speed", ())}
        for a in g.get("acceptance", ()):
            length, said = a["tokens_per_step"], faster.get(a["arm"])
            name = "" if a["arm"] == "arm" else a["arm"]
            per_step = "" if length is None else with_interval(length)
            out.append((*head, name, per_step, "" if said is None else with_interval(said["speedup"]), book_of(a)))
        out += [(*head, "", said, "", "") for said in g.get("says", ())]
        if not g["done"]:
            out.append((*head, "", "", "", ""))
    return out


def prompts_of(document: dict[str, Any]) -> list[tuple[str, str]]:
    """The measurements, and on which prompts they were made and how those were taken; those on the same ones together."""
    labels: dict[str, list[str]] = {}
    for g in document["groups"]:
        if "data" in g:
            labels.setdefault(told(g["data"]), []).append(g["label"])
    alone = len(labels) == 1 and len(document["groups"]) == sum(map(len, labels.values()))
    return [("all" if alone else ", ".join(names), said) for said, names in labels.items()]


def with_interval(found: dict[str, Any]) -> str:
    """ "2.71 [2.60, 2.82]"."""
    if any(found[k] is None or math.isnan(found[k]) for k in ("low", "high")):
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def book_of(a: dict[str, Any]) -> str:
    """What the ledger of an arm says; a lossy arm says first that it is one."""
    if "rejections" not in a:
        return f"{a['failed']} requests failed"
    book = a["rejections"]
    if not book["predicted"] and not book["observed"]:
        return ""
    said = f"{book['predicted']:.1f} predicted, {book['observed']} seen" + ("" if book["agrees"] else ": DISAGREE")
    return f"LOSSY ({a['total_variation']:.2f} total variation), {said}" if a["total_variation"] else said


def write_sweep(path: Path, name: str, document: dict[str, Any]) -> None:
    """A self-contained page. Raises ConfigError when it cannot be written."""
    lengths, speeds = [], []
    for g in document["groups"]:
        lengths += [
            (short(g["label"], a["arm"]), a["tokens_per_step"]) for a in g.get("acceptance", ()) if a["tokens_per_step"]
        ]
        speeds += [(short(g["label"], s["arm"]), s["speedup"]) for s in g.get("speed", ())]
    body = [f"<p>{document['cells']} cells, {len(document['failed'])} failed.</p>"]
    body += _drawn("Tokens per step", lengths, "tokens per step, 1 = plain decoding", 1.0)
    body += _drawn("Speed-up over the base arm", speeds, "speed-up, 1 = the base; interleaved within a cell", 1.0)
    body += ["<h2>Numbers</h2><p>95% intervals over prompts.</p>", table(COLUMNS, rows_of(document))]
    body += ["<h2>Prompts</h2>", table(("measurement", "prompts"), said)] if (said := prompts_of(document)) else []
    if document["failed"]:
        body += ["<h2>Failed</h2>", table(("cell", "reason"), [(f["label"], f["reason"]) for f in document["failed"]])]
    machines = [
        (m["node"], m["cpu"], m["threads"], m["cells"], f"{m['seconds']:.0f}") for m in document["machines"].values()
    ]
    body += ["<h2>Machines</h2><p>Seconds are compared within a machine only.</p>"]
    body.append(table(("node", "processor", "threads", "cells", "seconds"), machines))
    write_page(path, page(f"Sweep {escaped(name)}", body))


def short(label: str, arm: str) -> str:
    """The name of a row in a picture."""
    return (label if arm == "arm" else f"{label}: {arm}")[-26:]


def _drawn(title: str, found: Sequence[tuple[str, dict[str, Any]]], unit: str, mark: float) -> list[str]:
    ends = [{k: math.nan if f[k] is None else f[k] for k in ("low", "high")} for _, f in found]
    rows = [(name, f["value"], e["low"], e["high"]) for (name, f), e in zip(found, ends, strict=True)]
    return [f"<h2>{title}</h2>", intervals(title, rows, unit, mark)] if rows else []
