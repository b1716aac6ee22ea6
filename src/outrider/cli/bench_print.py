"""What `outrider bench` measured, for people."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table
from rich.text import Text

from outrider.cli import tables, terminal
from outrider.evaluate.workloads import told


def speedup_text(s: dict[str, Any]) -> str:
    """A speed-up with its interval, which one group of prompts does not have."""
    between = (
        f"{s['low']:.2f} to {s['high']:.2f}"
        if s["low"] is not None and math.isfinite(s["low"])
        else "one group: no interval"
    )
    return f"{s['value']:.2f} ({between}) {s['verdict']}"


def print_table(d: dict[str, Any]) -> None:
    """The document for people."""
    rule = d["rule"] if d.get("lossless", True) else f"{d['rule']} (LOSSY)"
    how = f"{d['drafter']} / {rule}, {d['dtype']}, temperature {d['temperature']:g}"
    title = f"{how}, batch {d['batch']}, {d['repeats']} repeat{'s' * (d['repeats'] != 1)}"
    table, console = Table(title=title, title_justify="left"), terminal.console()
    for column in (
        "arm",
        "tokens/s",
        "p10 to p90",
        "speed-up (95%)",
        "predicted",
        "tokens/step",
        "rejections: predicted, observed",
        "step's time",
    ):
        table.add_column(column, overflow="fold")
    for arm in d["arms"]:
        s, book = arm["speedup"], arm["ledger"]
        table.add_row(
            arm["name"],
            f"{arm['tokens_per_second']:.1f}",
            f"{arm['low']:.1f} to {arm['high']:.1f}",
            "base" if s is None else speedup_text(s),
            "" if s is None else f"{arm['predicted_speedup']:.2f}",
            "" if arm["acceptance_length"] is None else f"{arm['acceptance_length']:.2f}",
            "" if s is None else f"{book['predicted']:.1f}, {book['observed']} {arm_standing(arm)}",
            phase_bar(arm["phases"], 0 if terminal.plain(console) else 10),
        )
    tables.show(table, console)
    print_against(console, d["arms"])
    if "data" in d:
        console.print(f"prompts: {told(d['data'])}")
    print_costs(console, d)
    for arm, rows in d.get("spec_bench", {}).items():
        print_spec_bench(console, arm, rows)
    if d.get("chart"):
        print_chart(console, d["chart"])
    failed = sum(arm["failed"] for arm in d["arms"])
    if failed:
        console.print(f"[bold red]{failed} requests failed; their groups are part of no rate[/bold red]")
    looping = [f"{arm['name']}: {arm['loops']}" for arm in d["arms"] if arm["loops"]]
    if looping:
        console.print(f"texts that end in a loop (drafts guess those best): {', '.join(looping)}")


def arm_standing(arm: dict[str, Any]) -> str:
    """What the ledger of an arm says; arms of older documents do not say whether their rule was lossless, but what it spent."""
    from outrider.telemetry.ledger import standing

    return standing(arm["ledger"]["agrees"], arm["counts"]["bias"], arm["tokens"], lossless=arm.get("lossless", True))


def print_chart(console: Any, chart: dict[str, Any]) -> None:
    """Intervals of the measured bars, and where the pictures are."""
    table = Table(title="measured, 95% over prompts", title_justify="left")
    for column in ("arm", "tokens/s", "tokens per step", "draft ms per step", "acceptance by position"):
        table.add_column(column, overflow="fold")
    show = lambda r, d: f"{r['value']:.{d}f} ({r['low']:.{d}f} to {r['high']:.{d}f})"  # noqa: E731
    for row in chart["measured"]:
        by_position = " ".join(f"{a:.2f}" for a in row["acceptance"])
        speed, length = show(row["tokens_per_second"], 1), show(row["acceptance_length"], 2)
        table.add_row(row["name"], speed, length, f"{row['draft_ms']:.3f}", by_position)
    tables.show(table, console)
    console.print(f"charts: {', '.join(chart['files'])} (predicted bars are of {chart['predicted']['hardware']})")


def print_against(console: Any, arms: list[dict[str, Any]]) -> None:
    """Every arm over other arms than the base, where they were compared; documents of older releases have none."""
    others = dict.fromkeys(name for arm in arms for name in arm.get("against", {}))
    if not others:
        return
    table = Table(title="speed over other arms, 95% over prompts", title_justify="left")
    for column in ("arm", *(f"over {name}" for name in others)):
        table.add_column(column, overflow="fold")
    for arm in arms:
        found = arm.get("against", {})
        table.add_row(arm["name"], *(speedup_text(found[name]) if name in found else "" for name in others))
    tables.show(table, console)


def print_costs(console: Any, d: dict[str, Any]) -> None:
    """Cost and energy of every arm, where they were asked for and measured."""
    if d.get("price_per_hour") is not None:
        said = (f"{a['name']} {a['cost_per_million_tokens']:.3g}" for a in d["arms"] if a["cost_per_million_tokens"])
        console.print(f"cost per million tokens at {d['price_per_hour']:g} an hour: {', '.join(said)}")
        if d.get("energy_absent"):
            console.print(f"energy: {d['energy_absent']}")
    if any(a.get("joules_per_token") for a in d["arms"]):
        said = (f"{a['name']} {a['joules_per_token']:.3g}" for a in d["arms"] if a["joules_per_token"])
        console.print(f"joules per token, whole machine: {', '.join(said)}")


def print_spec_bench(console: Any, arm: str, rows: list[dict[str, Any]]) -> None:
    """One arm as Spec-Bench prints it."""
    table = Table(title=f"{arm}, as Spec-Bench counts", title_justify="left")
    for column in ("task", "questions", "mean accepted tokens", "tokens/s", "baseline", "speed-up ratio"):
        table.add_column(column)
    for r in rows:
        numbers = (r["mean_accepted_tokens"], r["tokens_per_second"], r["baseline_tokens_per_second"], r["speedup"])
        table.add_row(r["task"], str(r["questions"]), *(f"{x:.2f}" for x in numbers))
    tables.show(table, console)


def phase_bar(seconds: dict[str, float], width: int = 24) -> Text:
    """A bar of phases with their shares; a width of 0 leaves the bar out."""
    total = sum(seconds.values()) or 1.0
    styles = {"target": "blue", "draft": "green", "rule": "yellow", "host": "magenta"}
    bar, words = Text(), Text()
    for phase, value in seconds.items():
        share = value / total
        bar.append("█" * round(share * width), style=styles[phase])
        if share >= 0.005:
            words.append(f" {phase} {share:.0%}", style=styles[phase])
    return bar + words if width else Text(words.plain.strip())
