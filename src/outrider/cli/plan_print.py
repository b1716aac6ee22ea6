"""The document of `outrider plan` for people, and as Markdown."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from outrider.cli import tables, terminal
from outrider.evaluate.workloads import told


def markdown(d: dict[str, Any]) -> str:
    """The check's table, or the ranking where nothing was checked."""
    lines = []
    if "check" not in d:
        lines += ["| configuration | tokens/s | tokens per call | ms per step | bottleneck |", "|---|---|---|---|---|"]
        for c in d["choices"]:
            rate = f"{c['tokens_per_second']:.1f} ({c['low']:.1f} to {c['high']:.1f})"
            step = 1e3 * sum(c["seconds"].values())
            lines.append(f"| {c['name']} | {rate} | {c['tokens_per_call']:.2f} | {step:.2f} | {c['bottleneck']} |")
        return "\n".join(lines) + "\n"
    lines += [
        "| configuration | predicted tokens/s | measured tokens/s (95%) | error | tokens per call: predicted, measured | "
        "ms per step: predicted, measured |",
        "|---|---|---|---|---|---|",
    ]
    for r in d["check"]["rows"]:
        lines.append("| " + " | ".join(cells(r)) + " |")
    return "\n".join(lines) + "\n"


def cells(r: dict[str, Any]) -> list[str]:
    """One row of the check."""
    return [
        r["name"],
        f"{r['predicted']:.1f}",
        f"{r['measured']:.1f} ({r['low']:.1f} to {r['high']:.1f})",
        f"{100 * r['error']:+.1f}%",
        f"{r['tokens_per_call']:.2f}, {r['measured_tokens_per_call']:.2f}",
        f"{1e3 * r['step']:.2f}, {1e3 * r['measured_step']:.2f}",
    ]


def print_document(d: dict[str, Any]) -> None:
    """The document for people."""
    console = terminal.console()
    if "data" in d:
        console.print(f"prompts: {told(d['data'])}")
    table = Table()
    priced = d["choices"][0]["cost_per_million_tokens"] is not None
    for column in (
        "configuration",
        "tokens/s (95%)",
        "tokens per call",
        "ms per step",
        "bottleneck",
        "break-even",
        *(["per million tokens"] if priced else []),
    ):
        table.add_column(column, overflow="fold")
    for c in d["choices"]:
        row = [
            c["name"],
            f"{c['tokens_per_second']:.1f} ({c['low']:.1f} to {c['high']:.1f})",
            f"{c['tokens_per_call']:.2f}",
            f"{1e3 * sum(c['seconds'].values()):.1f}",
            c["bottleneck"],
            ""
            if c["break_even"] is None
            else "none is enough"
            if c["break_even"] == float("inf")
            else f"{c['break_even']:.2f}",
        ]
        table.add_row(*row, *([f"{c['cost_per_million_tokens']:.2f}"] if priced else []))
    tables.show(table, console)
    for batch, a in d["advice"].items():
        gain = "" if a["speedup"] is None or not a["speculate"] else f", {a['speedup']:.2f} times plain decoding"
        tied = f"; within its interval: {', '.join(a['tied'])}" if a["tied"] else ""
        console.print(f"[bold]batch {batch}: {a['choice']}{gain}[/bold]{tied}")
        console.print(f"  {a['what_would_change_it']}")
        console.print(f"  outrider generate {' '.join(a['options'])} PROMPT")
        if a["vllm"]:
            console.print(f"  vllm serve TARGET --speculative-config '{a['vllm']}'", soft_wrap=True)
    if "launch" in d:
        print_launch(console, d["launch"])
    if "check" in d:
        print_check(console, d["check"])


def print_check(console: Any, d: dict[str, Any]) -> None:
    """Predicted beside measured."""
    table = Table(title=f"{d['held']} of {len(d['rows'])} within {d['within']:.0%}", title_justify="left")
    for column in (
        "configuration", "predicted tokens/s", "measured (95%)", "error", "tokens per call: predicted, measured",
        "ms per step: predicted, measured",
    ):  # fmt: skip
        table.add_column(column, overflow="fold")
    for r in d["rows"]:
        table.add_row(*cells(r))
    tables.show(table, console)
    for f in d["first_choice"]:
        x = f["ratio"]
        beside = f" {f['best']} ({x['value']:.3f} of its speed, {x['low']:.3f} to {x['high']:.3f})"
        console.print(
            f"batch {f['batch']}: first choice {f['choice']} is {f['verdict']}"
            + ("" if f["choice"] == f["best"] else f":{beside}")
        )


def print_launch(console: Any, d: dict[str, Any]) -> None:
    """The command for vLLM and the file for Ray, as they are: nothing is wrapped or coloured."""
    if d["note"]:
        console.print(d["note"], soft_wrap=True, markup=False)
    console.print(d["command"], soft_wrap=True, markup=False, highlight=False)
    if "ray" in d:
        console.print(d["ray"], soft_wrap=True, markup=False, highlight=False, end="")
