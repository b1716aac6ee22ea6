"""The document of `outrider predict` for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from outrider.cli import tables, terminal
from outrider.evaluate.workloads import told

SHOWN = (1, 2, 3, 4, 5, 6, 8, 12, 16)


def print_document(d: dict[str, Any]) -> None:
    """What to expect, by length and by way of drafting; then the rest in a sentence each."""
    out = terminal.console()
    ways = d["drafting"]
    where = f", temperature {d['temperature']:g}" if "temperature" in d else ""
    out.print(
        f"predicted from {d['texts']} texts of {d['prompts']} prompts, {d['tokens']} tokens{where}; nothing was drafted"
    )
    if "data" in d:
        out.print(f"prompts: {told(d['data'])}")
    tables.show(lengths_table(d), out)
    costs = d["costs"]
    if costs is not None:
        tables.show(speedups_table(d), out)
        verify = ", ".join(f"{g + 1}: {v:.2f}" for g, v in enumerate(costs["verify"]) if g in (1, 3, 5, 8, 16))
        out.print(
            f"costs ({costs['source']})    draft {costs['draft']:.3f} of a target forward; forwards by rows {verify}; "
            "models only, without sampling and the engine's own work"
        )
        for name, way in ways.items():
            best = way["best"]
            words = (
                "do not speculate" if not best["length"] else f"length {best['length']}, speed-up {best['speedup']:.2f}"
            )
            out.print(f"best, {title(name):<18} {words}")
    for name, way in ways.items():
        if way["rejections"] is not None:
            out.print(
                f"rejections, {title(name):<12} {interval(way['rejections'], 2)} per text if drafts reach to its end; "
                f"acceptance rate of tested draft tokens {interval(way['acceptance'], 3)}"
            )
    print_domains(out, d["domains"])
    print_rest(out, d)
    for c in d.get("check", ()):
        word = "agree" if c["agrees"] else "[bold red]DISAGREE[/bold red]"
        out.print(
            f"check, {c['run']} (length {c['length']})   rejections predicted {c['predicted']:.1f}, observed {c['observed']:g}, "
            f"{c['level']:.0%} interval {c['low']:.1f} to {c['high']:.1f}: {word}"
        )


def title(way: str) -> str:
    return {"sampled": "sampled drafts", "greedy": "greedy drafts", "block": "block verification"}[way]


def lengths_table(d: dict[str, Any]) -> Table:
    """Acceptance length by draft length and way."""
    table = Table(title="tokens per target call (± half a 95% interval over prompts)", title_justify="left")
    table.add_column("length", justify="right")
    for name in d["drafting"]:
        table.add_column(title(name))
    table.add_column("rejections per text")
    for i, row in enumerate(d["drafting"]["sampled"]["lengths"]):
        if row["length"] in SHOWN:
            cells = [interval(way["lengths"][i]["acceptance_length"], 2) for way in d["drafting"].values()]
            table.add_row(str(row["length"]), *cells, interval(row["rejections"], 1))
    return table


def speedups_table(d: dict[str, Any]) -> Table:
    """Speed-up at the costs of the document."""
    table = Table(title="speed-up over plain decoding, models only", title_justify="left")
    table.add_column("length", justify="right")
    for name in d["drafting"]:
        table.add_column(title(name))
    for i, row in enumerate(d["drafting"]["sampled"]["lengths"]):
        if row["length"] in SHOWN:
            cells = [interval(way["lengths"][i]["speedup"], 2) for way in d["drafting"].values()]
            table.add_row(str(row["length"]), *cells)
    return table


def interval(e: dict[str, float], digits: int) -> str:
    if e["low"] != e["low"]:
        return f"{e['value']:.{digits}f}"
    return f"{e['value']:.{digits}f} ± {(e['high'] - e['low']) / 2:.{digits}f}"


def print_domains(out: Any, domains: dict[str, Any]) -> None:
    """Rejection probability by domain, most first, when there is more than one."""
    if len(domains) < 2:
        return
    table = Table(title="rejection probability by domain (sampled drafts)", title_justify="left")
    table.add_column("domain")
    table.add_column("rejection probability")
    ranked = sorted(domains.items(), key=lambda item: -item[1]["value"])
    for name, e in ranked[:12]:
        table.add_row(name or "(none)", interval(e, 3))
    tables.show(table, out)
    if len(ranked) > 12:
        out.print(f"[dim]{len(ranked) - 12} more domains in --json[/dim]")


def print_rest(out: Any, d: dict[str, Any]) -> None:
    """Block verification, several drafts, the lossy front, and where the time went."""
    length = min((int(k) for k in d["block_gain"]), key=lambda n: abs(n - 4))
    gain = next(v for k, v in d["block_gain"].items() if int(k) == length)
    out.print(f"block verification   {gain - 1:+.1%} tokens per call at length {length} (exact, from the same logs)")
    multi = d["multi_draft"]
    if multi is not None:
        one = multi["one_draft"]["value"]
        for k in (x for x in multi if x.isdigit()):
            found = {rule: e["value"] for rule, e in multi[k].items()}
            out.print(
                f"{k} drafts at the first position   accepted {found['recursive_rejection']:.3f} (recursive rejection), "
                f"{found['k_seq']:.3f} (K-SEQ), {found['optimal_transport']:.3f} (optimum); one draft {one:.3f}; "
                f"{multi['laws']} distributions"
            )
    if d["lossy"] is not None:
        words = ", ".join(f"{x['rejection']['value']:.3f} at {x['budget']:g}" for x in d["lossy"])
        out.print(
            f"lossy, at best       rejection probability {words} bias per token (exact text: {1 - _accepted(d):.3f})"
        )
    if "time" in d:
        t = d["time"]
        out.print(f"[dim]{t['seconds']:.1f} s, {t['share_in_models']:.0%} of it in the models[/dim]")


def _accepted(d: dict[str, Any]) -> float:
    return d["drafting"]["sampled"]["acceptance"]["value"]
