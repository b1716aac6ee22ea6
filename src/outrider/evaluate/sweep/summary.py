"""What a sweep found: a row for every measurement, repeats with other seeds together, machines as blocks.

Seconds are compared within a machine only. A speed-up is a ratio of arms that ran interleaved in one cell, so it may be averaged
over machines; its interval then has a part for each of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from outrider.errors import ConfigError
from outrider.evaluate.statistics.ratios import Array, Ratio, influence, margin, paired_ratio, ratio_of_sums
from outrider.evaluate.sweep.book import Book
from outrider.evaluate.sweep.cells import Cell, Kind
from outrider.evaluate.sweep.plan import same_but_seed
from outrider.records import Counts
from outrider.telemetry.ledger import ledger

SEED = re.compile(r"(,|:) seed \S+$")
Rows = Sequence[Mapping[str, Any]]


def summarise(cells: Sequence[Cell], book: Book, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The document of a sweep: cells, what their repeats say together, failures."""
    groups = []
    for group in same_but_seed(cells):
        found = [book.known[c.identity] for c in group]
        done = [(c, k) for c, k in zip(group, found, strict=True) if k.record is not None and not k.failed]
        row: dict[str, Any] = {
            "label": SEED.sub("", group[0].label),
            "kind": group[0].fields["kind"],
            "cells": len(group),
        }
        row |= {"done": len(done), "failed": sum(bool(k.failed) for k in found)}
        said = next((k.record["result"]["data"] for _, k in done if k.record and "data" in k.record["result"]), None)
        row |= {} if said is None else {"data": said}
        if done and row["kind"] == "bench":
            records = [k.record["result"]["rows"] for _, k in done if k.record is not None]
            row["acceptance"] = acceptance(records)
            if group[0].fields["metric"] == "speed":
                timed = [(k.beside["where"]["machine"]["block"], k.beside["measured"]["rows"]) for _, k in done]
                cells_of = [(block, r, seconds) for (block, seconds), r in zip(timed, records, strict=True)]
                row["speed"] = speed(cells_of, group[0].fields["base"])
        elif done:
            row["says"] = [kinds[row["kind"]].headline(sight(k.record, k.beside)) for _, k in done]
        groups.append(row)
    failures = [
        {"cell": c.number, "label": c.label, "reason": k.failed} for c in cells if (k := book.known[c.identity]).failed
    ]
    return {"cells": len(cells), "groups": groups, "failed": failures, "machines": machines(cells, book)}


def sight(record: Mapping[str, Any] | None, beside: Mapping[str, Any]) -> dict[str, Any]:
    """A record together with what was measured beside it."""
    return {**(record or {}), "measured": beside.get("measured")}


def machines(cells: Sequence[Cell], book: Book) -> dict[str, Any]:
    """Block -> the machine, and how many cells it performed in how many seconds."""
    out: dict[str, Any] = {}
    for cell in cells:
        where = book.known[cell.identity].beside.get("where")
        if where is not None:
            m = where["machine"]
            row = out.setdefault(
                m["block"], {k: m[k] for k in ("node", "cpu", "threads")} | {"cells": 0, "seconds": 0.0}
            )
            row["cells"] += 1
            row["seconds"] += where["seconds"]
    return out


# ----------------------------------------------------------------- acceptance
def acceptance(records: Sequence[Rows]) -> list[dict[str, Any]]:
    """Of every arm: tokens per step with its interval over prompts, and the ledger. records: rows of cells that differ in seed."""
    rows = [row for record in records for row in record]
    out = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [r for r in rows if r["arm"] == arm]
        good = [r for r in mine if not r["failed"]]
        if not sum(r["steps"] for r in good):
            out.append({"arm": arm, "tokens_per_step": None, "failed": sum(r["failed"] for r in mine)})
            continue
        ratio = ratio_of_sums(by_group(good, "tokens"), by_group(good, "steps"))
        sums: dict[str, Any] = {k: sum(r[k] for r in good) for k in ("judged", "rejected", "risk", "spread", "bias")}
        counts = Counts(**sums)
        book = ledger(counts)
        out.append(
            {
                "arm": arm,
                "tokens": sum(r["emitted"] for r in good),
                "tokens_per_step": {"value": ratio.value, "low": ratio.low, "high": ratio.high},
                "rejections": {"predicted": book.predicted, "observed": book.observed, "agrees": book.agrees},
                "total_variation": counts.bias,
                "failed": sum(r["failed"] for r in mine),
            }
        )
    return out


def by_group(rows: Rows, name: str) -> Array:
    """[prompt groups] sums of a field: repeats and seeds of a prompt are one observation."""
    sums: dict[int, float] = {}
    for row in rows:
        sums[row["group"]] = sums.get(row["group"], 0.0) + row[name]
    return np.array([sums[g] for g in sorted(sums)], dtype=float)


# ----------------------------------------------------------------- seconds
Timed = tuple[str, Rows, Rows]
"""Of one cell: the machine's block, its rows, and the rows of its seconds, in the same order."""


def tokens_per_second(cells: Sequence[Timed], arm: str) -> float:
    """Of an arm over cells of one machine. Raises ConfigError for several: their seconds are not comparable."""
    if len({block for block, *_ in cells}) > 1:
        raise ConfigError("seconds of different machines cannot be added or compared: compare ratios within a machine")
    joined = [row for cell in cells for row in joint(cell) if row["arm"] == arm and not row["failed"]]
    return sum(r["emitted"] for r in joined) / sum(r["seconds"] for r in joined)


def joint(cell: Timed) -> list[dict[str, Any]]:
    """Rows with their seconds, without groups in which any arm failed."""
    _, rows, seconds = cell
    bad = {(r["group"], r["repeat"]) for r in rows if r["failed"]}
    paired = [dict(r) | {"seconds": s["seconds"]} for r, s in zip(rows, seconds, strict=True)]
    return [r for r in paired if (r["group"], r["repeat"]) not in bad]


def speed(cells: Sequence[Timed], base: str) -> list[dict[str, Any]]:
    """Of every arm but the base: the speed-up on each machine, over all of them, and tokens per second of a single machine."""
    blocks = list(dict.fromkeys(block for block, *_ in cells))
    per = {block: [row for cell in cells if cell[0] == block for row in joint(cell)] for block in blocks}
    out = []
    for arm in sorted({row["arm"] for _, rows, _ in cells for row in rows} - {base}):
        pairs = [columns(per[b], arm, base) for b in blocks]
        by_machine = {b: plain(paired_ratio(*pair)) for b, pair in zip(blocks, pairs, strict=True)}
        row = {"arm": arm, "base": base, "speedup": plain(over_machines(pairs)), "by_machine": by_machine}
        if len(blocks) == 1:
            row["tokens_per_second"] = {name: tokens_per_second(cells, name) for name in (arm, base)}
        out.append(row)
    return out


def columns(rows: Rows, arm: str, base: str) -> tuple[Array, Array, Array, Array]:
    """What `paired_ratio` reads."""
    mine, theirs = ([r for r in rows if r["arm"] == a] for a in (arm, base))
    return (
        by_group(mine, "emitted"),
        by_group(mine, "seconds"),
        by_group(theirs, "emitted"),
        by_group(theirs, "seconds"),
    )


def over_machines(pairs: Sequence[tuple[Array, Array, Array, Array]]) -> Ratio:
    """The geometric mean of the machines' speed-ups: each counts alike, and each has its own prompts' share of the interval."""
    if len(pairs) == 1:
        return paired_ratio(*pairs[0])
    value = math.exp(sum(math.log(paired_ratio(*p).value) for p in pairs) / len(pairs))
    parts = [(influence(t, s) - influence(bt, bs)) / len(pairs) for t, s, bt, bs in pairs]
    wide = margin(parts)
    return Ratio(value, value * math.exp(-wide), value * math.exp(wide))


def plain(ratio: Ratio) -> dict[str, Any]:
    """A ratio as data."""
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high, "verdict": ratio.verdict}
