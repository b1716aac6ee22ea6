"""Experiments as documents and as tables: on prompts and on live traffic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from outrider.cli import tables, terminal
from outrider.evaluate.workloads import told

METRICS = {"speed": "speed over base", "acceptance": "tokens per call over base"}


def document_of(e: Any, state: Any, data: Mapping[str, Any] | None) -> dict[str, Any]:
    """A state as plain data; unbounded intervals become null. data: what is said of the prompts; none of experiments of older
    releases."""
    from dataclasses import asdict

    comparisons = []
    for c in state.comparisons:
        quality = None if c.quality is None else {k: finite(v) for k, v in asdict(c.quality).items()}
        comparisons.append(
            {
                "arm": c.arm,
                "decision": c.decision,
                "speedup": ratio_of(c.speed),
                "quality": quality,
                "vetoes": list(c.vetoes),
                "reduction": None if c.reduction is None else reduction_of(c.reduction),
            }
        )
    head = {"experiment": e.name, "metric": e.metric, "groups": state.groups, "total": state.total, "lossy": e.lossy}
    return head | ({"data": dict(data)} if data else {}) | {"comparisons": comparisons}


def ratio_of(log: Any) -> dict[str, float | None]:
    """The interval of a log ratio as one of the ratio."""
    return {
        "value": finite(math.exp(log.mean)),
        "low": None if log.low == -math.inf else math.exp(log.low),
        "high": None if log.high == math.inf else math.exp(min(log.high, 700)),
    }


def reduction_of(found: Any) -> dict[str, Any]:
    """What replay has done for a comparison."""
    gap = {"mean": finite(found.gap.mean), "low": finite(found.gap.low), "high": finite(found.gap.high)}
    return {
        "without": ratio_of(found.without),
        "factor": finite(found.factor),
        "gap": gap,
        "agrees": found.agrees,
    }


def finite(x: float) -> float | None:
    """A number that JSON has; None for the others."""
    return x if math.isfinite(x) else None


def code_of(decisions: list[str]) -> int:
    """Exit code: 1 if an arm is vetoed, 3 if one is undecided, otherwise 0."""
    return 1 if "vetoed" in decisions else 3 if "undecided" in decisions or not decisions else 0


def show(document: dict[str, Any], json: bool) -> int:
    """Print a document; its exit code."""
    code = code_of([c["decision"] for c in document["comparisons"]])
    if json:
        terminal.print_json(document)
        return code
    table = Table(
        title=f"{document['experiment']}: {document['groups']} of {document['total']} prompt groups",
        title_justify="left",
    )
    from outrider.evaluate.experiments.report import mark_lossy

    replayed = any(c["reduction"] for c in document["comparisons"])
    sharper = ("without replay", "groups needed") if replayed else ()
    for column in ("arm", METRICS[document["metric"]], *sharper, "quality lost (nats/token)", "decision"):
        table.add_column(column, overflow="fold")
    for c in document["comparisons"]:
        s, q, r = c["speedup"], c["quality"], c["reduction"]
        cells = ["", ""] if r is None else [span(**r["without"]), _factor(r["factor"])]
        table.add_row(
            mark_lossy(c["arm"], document["lossy"]),
            span(**s),
            *(cells if replayed else ()),
            "" if q is None else span(q["mean"], q["low"], q["high"]),
            c["decision"] + "".join(f"\n{v}" for v in c["vetoes"]),
        )
    tables.show(table)
    if "data" in document:
        terminal.console().print(f"prompts: {told(document['data'])}")
    return code


def span(value: float | None, low: float | None, high: float | None) -> str:
    """A value with its interval."""
    show = lambda x: "open" if x is None else f"{x:.3f}"  # noqa: E731
    return f"{show(value)} ({show(low)} to {show(high)})"


def _factor(x: float | None) -> str:
    """Groups that give the same interval as one without replay, as a share of those it needs."""
    return "" if not x else f"{1 / x:.0%}"


def show_live(found: dict[str, Any], json: bool) -> int:
    """Print a document; its exit code, as for other experiments."""
    code = code_of([c["decision"] for c in found["comparisons"]])
    if json:
        terminal.print_json(found)
        return code
    from outrider.evaluate.experiments.report import mark_lossy

    lossy = [a["arm"] for a in found["arms"] if not a["lossless"]]
    table = Table(title=f"{found['experiment']}, on live traffic", title_justify="left")
    for column in ("arm", "requests", "users", "tokens/s", "rejections (predicted)", "speed over base", "decision"):
        table.add_column(column, overflow="fold")
    said = {c["arm"]: c for c in found["comparisons"]}
    for a in found["arms"]:
        c, rate, r = said.get(a["arm"]), a["tokens_per_second"], a["rejections"]
        decision = "base" if c is None else c["decision"] + "".join(f"\n{v}" for v in c["vetoes"])
        table.add_row(
            mark_lossy(a["arm"], lossy) + (", stopped" if a["stopped"] else ""),
            str(a["requests"]),
            str(a["units"]),
            "" if rate is None else f"{rate:.1f}",
            f"{r['observed']} ({r['predicted']:.1f})",
            "" if c is None else span(**c["speedup"]),
            decision,
        )
    tables.show(table)
    return code
