"""`outrider plan --contexts`: whether drafting over a view of the target's own cache pays at long context on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from outrider.cli import tables, terminal
from outrider.cli.plan_options import PlanOptions
from outrider.errors import ConfigError

MOST = 1 << 20
"""The longest context that is planned for."""


def parse_contexts(text: str) -> list[int]:
    """ "2048,8192" as numbers. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 8 and 1 <= int(part) <= MOST for part in parts):
        raise ConfigError(f"contexts are numbers of tokens from 1 to {MOST}, as 2048,8192, got {text!r}")
    return sorted({int(part) for part in parts})


def view_of(drafts: list[str]) -> str:
    """The one sparse view among --draft, without "sparse:"; that of `auto` if none was given. Raises ConfigError for others."""
    from outrider.drafters.registry import AUTO_VIEW

    if drafts in ([], ["auto"]):
        return AUTO_VIEW
    kind, _, view = drafts[0].partition(":")
    if len(drafts) > 1 or kind != "sparse":
        raise ConfigError(
            f"--contexts is about one view of the target's own cache: give --draft sparse:window:16+496 or none, got {drafts}"
        )
    return view


def contexts_document(engine: Any, lengths: list[int], batches: list[int], asked: PlanOptions) -> dict[str, Any]:
    """Constants of this machine, the best length and its gain by context and batch, and from which context on there is one."""
    from outrider.drafters.sparse import parse_sparse
    from outrider.evaluate.measure import machine
    from outrider.evaluate.planning.contexts import choose, fit_contexts

    contexts = parse_contexts(asked.contexts or "")
    name = view_of(list(asked.draft or []))
    view = parse_sparse(name)
    with terminal.loading("timing passes"):
        times = fit_contexts(engine.parts.target, max(contexts), max(batches), rounds=asked.rounds)
    choices = choose(times, contexts, batches, view.size, asked.acceptance, lengths)
    return {
        "draft": f"sparse:{name}",
        "acceptance": asked.acceptance,
        "constants": asdict(times),
        "choices": [asdict(c) for c in choices],
        "crossing": {str(b): times.crossing(b, view.size, asked.acceptance) for b in batches},
        "machine": machine(),
    }


def print_contexts(d: dict[str, Any]) -> None:
    """The document for people."""
    out, table = terminal.console(), Table(title=f"{d['draft']} at an acceptance of {d['acceptance']:g}")
    for column in ("context", "sequences", "plain step", "draft length", "predicted gain"):
        table.add_column(column, justify="right")
    for c in d["choices"]:
        gain = f"{c['gain']:.2f}" if c["length"] else "plain decoding"
        table.add_row(str(c["context"]), str(c["batch"]), f"{1e3 * c['plain_seconds']:.2f} ms", str(c["length"]), gain)
    tables.show(table, out)
    for batch, at in d["crossing"].items():
        where = f"from {at} tokens of context on" if at is not None else "at no context"
        out.print(f"{batch} at a time: faster than plain decoding {where}")
