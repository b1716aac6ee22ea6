"""`outrider runs` and `outrider gate`: what is in a store, and whether a run holds its baseline."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from outrider.cli import options as opt

StorePath = Annotated[Path, typer.Option("--store", help="The store file that bench --store wrote.")]
runs_app = typer.Typer(help="Runs kept in a store.", no_args_is_help=True)
DEFAULT = Path("outrider.db")


@runs_app.command("list")
def list_runs(store: StorePath = DEFAULT, json: opt.Json = False) -> None:
    """All runs of a store, oldest first."""
    from outrider.evaluate.store import Store

    with Store(store, read_only=True) as db:
        found = [(r, len(db.records(r.id))) for r in db.runs()]
    if json:
        opt.print_json({"runs": [{**asdict(r), "records": n} for r, n in found]})
        return
    table = Table()
    for column in ("id", "kind", "name", "state", "records", "started"):
        table.add_column(column)
    for run, records in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created))
        table.add_row(run.id, run.kind, run.name, run.state, str(records), when)
    opt.Console(highlight=False).print(table)


@runs_app.command("show")
def show_run(
    run: Annotated[str, typer.Argument(help="Id or name.")], store: StorePath = DEFAULT, json: opt.Json = False
) -> None:
    """One run: its configuration, summary and ledgers."""
    from outrider.evaluate.store import Store

    with Store(store, read_only=True) as db:
        found = db.run(run)
        document = {**asdict(found), "ledgers": db.ledgers(found.id), "records": len(db.records(found.id))}
    if json:
        opt.print_json(document)
        return
    from outrider.cli.bench import print_table

    console = opt.Console(highlight=False)
    console.print(f"{found.kind} {found.name} ({found.id}): {found.state}, {document['records']} records")
    if found.kind == "bench" and found.summary:
        print_table(found.summary)
    else:
        console.print_json(data=found.summary or found.config)


@runs_app.command("export")
def export_run(
    run: Annotated[str, typer.Argument(help="Id or name.")],
    store: StorePath = DEFAULT,
    out: Annotated[Path | None, typer.Option("--out", help="Default: standard output.", show_default=False)] = None,
) -> None:
    """A run as canonical JSON lines: the run first, then one record a line."""
    from outrider.evaluate.store import Store

    with Store(store, read_only=True) as db:
        text = db.export(run)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")


@runs_app.command("compare")
def compare_runs(
    run: Annotated[str, typer.Argument(help="Id or name, or a file of bench --out.")],
    baseline: Annotated[str, typer.Argument(help="The same.")],
    store: StorePath = DEFAULT,
    json: opt.Json = False,
) -> None:
    """Every check of `outrider gate`, without its exit code."""
    _gate(run, baseline, store, json, absolute=False)


def gate(
    run: Annotated[str, typer.Argument(help="Id or name in the store, or a file that bench --out wrote.")],
    baseline: Annotated[str, typer.Argument(help="The run to hold.")],
    store: StorePath = DEFAULT,
    speed: Annotated[float, typer.Option("--speed", min=0, help="Share of speed that may be lost.")] = 0.05,
    acceptance: Annotated[float, typer.Option("--acceptance", min=0, help="Acceptance that may be lost.")] = 0.02,
    quality: Annotated[float, typer.Option("--quality", min=0, help="Nats per token that may be lost.")] = 0.02,
    absolute: Annotated[
        bool, typer.Option("--absolute", help="Compare tokens per second, not speed-ups: for one and the same machine.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Compare a run with a baseline. Exit code 0 passed, 1 failed, 3 inconclusive."""
    raise typer.Exit(_gate(run, baseline, store, json, absolute, speed, acceptance, quality))


def _gate(run: str, baseline: str, store: Path, json: bool, absolute: bool, *margins: float) -> int:
    from outrider.evaluate.gate import Margins, load_run, overall
    from outrider.evaluate.gate import gate as check

    file = store if store.is_file() else None
    ours, theirs = load_run(run, file)[1], load_run(baseline, file)[1]
    checks = check(ours, theirs, Margins(*margins), relative=not absolute)
    answer, code = overall(checks)
    if json:
        opt.print_json({"outcome": answer, "checks": [asdict(c) for c in checks]})
        return code
    table = Table(title=f"{run} against {baseline}: {answer}", title_justify="left")
    for column in ("arm", "check", "outcome", "value (95%)", "margin", "note"):
        table.add_column(column, overflow="fold")
    for c in checks:
        table.add_row(c.arm, c.what, c.outcome, _interval(c), "" if c.margin is None else f"{c.margin:.3g}", c.note)
    opt.Console(highlight=False).print(table)
    return code


def _interval(c: Any) -> str:
    return "" if c.value is None else f"{c.value:.3f} ({c.low:.3f} to {c.high:.3f})"
