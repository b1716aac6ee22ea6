"""The page of an experiment: every look, the decisions, and what the common continuations have saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outrider.evaluate.experiments.experiment import Experiment, State
from outrider.evaluate.html import escaped, lines, page, table, write_page
from outrider.evaluate.workloads import told

METRIC = {"speed": "speed over base", "acceptance": "tokens per target call over base"}


def write_experiment(path: Path, document: dict[str, Any], states: Sequence[State], e: Experiment) -> None:
    """The report of an experiment: every look, and the decisions."""
    series = {
        arm: [(float(s.groups), *next(c for c in s.comparisons if c.arm == arm).ratio) for s in states if s.comparisons]
        for arm in e.others
    }
    unit, lossy = METRIC[e.metric], e.lossy
    rows = [
        (
            mark_lossy(c["arm"], lossy),
            c["decision"],
            *(_number(c["speedup"][k]) for k in ("value", "low", "high")),
            "; ".join(c["vetoes"]),
        )
        for c in document["comparisons"]
    ]
    body = [
        f"<p>{document['groups']} of {document['total']} prompt groups; base arm {escaped(e.base)}; intervals hold at all looks "
        f"together with probability {1 - e.level:.0%}; smallest effect that matters {e.min_effect:.0%}.</p>",
        *prompts_of(document),
        table(["arm", "decision", unit, "low", "high", "vetoes"], rows),
        *replay_table(document["comparisons"]),
        f"<h2>As it went</h2><p>The {unit} with its interval after every prompt group. Dashed: no difference, and the "
        "smallest effects that matter. Wide intervals are cut off.</p>",
        lines(unit, series, "prompt groups", (1.0, 1 / (1 + e.min_effect), 1 + e.min_effect)),
        "<h2>Arms</h2>",
        table(["arm", "options", "exact"], [(n, o, "LOSSY" if n in lossy else "yes") for n, o in e.arms.items()]),
    ]
    write_page(path, page(f"Experiment {e.name}", body))


def prompts_of(document: dict[str, Any]) -> list[str]:
    """Which prompts, and how they were taken; nothing of experiments of older releases."""
    return [f"<p>Prompts: {escaped(told(document['data']))}.</p>"] if document.get("data") else []


def mark_lossy(arm: str, lossy: Sequence[str]) -> str:
    """The name of an arm, and that its rule is lossy where it is."""
    return f"{arm} (LOSSY)" if arm in lossy else arm


def replay_table(comparisons: Sequence[dict[str, Any]]) -> list[str]:
    """The intervals without the replayed continuations, and what those have saved; nothing where there are none."""
    rows = [
        (c["arm"], *(_number(r["without"][k]) for k in ("value", "low", "high")), _number(r["factor"]), _number(r["gap"]["mean"]))
        for c in comparisons
        if (r := c["reduction"])
    ]  # fmt: skip
    head = ["arm", "without", "low", "high", "groups saved (factor)", "calls per token beyond replay's"]
    title = "<h2>What the common continuations have saved</h2>"
    return [title, table(head, rows)] if rows else []


def _number(x: float | None) -> str:
    return "open" if x is None else f"{x:.3f}"
