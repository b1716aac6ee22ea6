"""`outrider runs` and `outrider gate`: what is in a store, and whether a run holds its baseline."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from outrider.cli import paths, tables, terminal
from outrider.cli.bench_print import print_table
from outrider.cli.options import STORE, Json, StorePath
from outrider.errors import ConfigError
from outrider.files import write_whole

runs_app = typer.Typer(help="Runs kept in a store.", no_args_is_help=True)


@runs_app.command("list")
def list_runs(store: StorePath = STORE, json: Json = False) -> None:
    """List all runs of a store, oldest first.

    Example: outrider runs list --store outrider.db
    """
    from outrider.evaluate.store.store import Store

    with Store(store, read_only=True) as db:
        found = [(r, len(db.records(r.id)), lossy(r, db.ledgers(r.id))) for r in db.runs()]
    if json:
        terminal.print_json({"runs": [{**asdict(r), "records": n, "lossy": bent} for r, n, bent in found]})
        return
    table = Table()
    for column in ("id", "kind", "name", "state", "records", "started", "exact"):
        table.add_column(column)
    for run, records, bent in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created))
        table.add_row(run.id, run.kind, run.name, run.state, str(records), when, "LOSSY" if bent else "")
    tables.show(table)


def lossy(run: Any, ledgers: dict[str, dict[str, float]]) -> bool:
    """Whether texts of a run were not distributed as the target's: by what its rules spent, or by what it says of them."""
    said = run.summary or {}
    return any(sums["bias"] for sums in ledgers.values()) or said.get("lossless") is False or bool(said.get("lossy"))


@runs_app.command("show")
def show_run(
    run: Annotated[str, typer.Argument(help="Id or name of a run.")], store: StorePath = STORE, json: Json = False
) -> None:
    """Show one run: its configuration, summary and ledgers.

    Example: outrider runs show monday --json
    """
    from outrider.evaluate.store.store import Store

    with Store(store, read_only=True) as db:
        found = db.run(run)
        document = {**asdict(found), "ledgers": db.ledgers(found.id), "records": len(db.records(found.id))}
    if json:
        terminal.print_json(document)
        return
    console = terminal.console()
    console.print(f"{found.kind} {found.name} ({found.id}): {found.state}, {document['records']} records")
    if found.kind == "bench" and found.summary:
        print_table(found.summary)
    else:
        console.print_json(data=found.summary or found.config)


@runs_app.command("export", short_help="A run as JSON lines, CSV or Parquet.")
def export_run(
    run: Annotated[str, typer.Argument(help="Id or name of a run.")],
    store: StorePath = STORE,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", callback=paths.out_file, help="File to write. Default: standard output.", show_default=False
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--format", help="jsonl, csv or parquet. Default: by the name of --out.", show_default=False),
    ] = None,
) -> None:
    """Write a run as canonical JSON lines (first the run, then one record per line), or its records as a CSV or Parquet table.

    Example: outrider runs export monday --out monday.csv
    """
    from outrider.evaluate.store import tables
    from outrider.evaluate.store.store import Store

    wanted = tables.format_of(out, kind)
    if wanted == "parquet" and out is None:
        raise ConfigError("a Parquet file is not text: name it with --out")
    with Store(store, read_only=True) as db:
        if wanted == "jsonl":
            content = db.export(run).encode()
        else:
            rows = tables.table(db, run)
            content = tables.as_csv(rows) if wanted == "csv" else tables.as_parquet(rows)
    if out is None:
        typer.echo(content.decode(), nl=False)
    else:
        write_whole(out, content)
        terminal.err.print(f"outrider: wrote {out}")


@runs_app.command("import", short_help="Read another tool's results into a store.")
def import_results(
    file: Annotated[
        Path, typer.Argument(callback=paths.file, help="Result file of vLLM's bench serve, AIPerf or guidellm.")
    ],
    store: StorePath = STORE,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run. Default: the file's.", show_default=False)
    ] = None,
    kind: Annotated[str, typer.Option("--format", help="auto, vllm, aiperf or guidellm.")] = "auto",
    json: Json = False,
) -> None:
    """Read another tool's results into a store, one record per request; `runs show`, `compare` and `export` accept them.

    Example: outrider runs import vllm.json --name vllm
    """
    from outrider.evaluate.store.importers import import_run
    from outrider.evaluate.store.store import Store

    with Store(store) as db:
        run, found = import_run(db, file, name or file.stem, kind)
    document = {"run": run, "name": name or file.stem, "records": len(found.records), **found.summary()}
    if json:
        terminal.print_json(document)
        return
    console = terminal.console()
    console.print(f"{found.kind}: {len(found.records)} requests as run {document['name']} ({run})")
    if found.note:
        console.print(found.note)


@runs_app.command("compare", short_help="Two runs beside each other.")
def compare_runs(
    run: Annotated[str, typer.Argument(help="Id or name of a run, or a file that bench --out wrote.")],
    baseline: Annotated[str, typer.Argument(help="The run that it is compared with: likewise.")],
    store: StorePath = STORE,
    json: Json = False,
) -> None:
    """Compare two bench runs by every check of `outrider gate`, without its exit code, or two imported runs by their latencies.

    Example: outrider runs compare tuesday monday
    """
    if not imported(run, baseline, store):
        _gate(run, baseline, store, json, absolute=False)
        return
    from outrider.evaluate.bench.latencies import differences
    from outrider.evaluate.records import Record
    from outrider.evaluate.store.store import Store

    with Store(store, read_only=True) as db:
        ours, theirs = ([Record.from_dict(d) for d in db.records(db.run(r).id).values()] for r in (run, baseline))
    found = differences(ours, theirs)
    if not found:
        raise ConfigError(
            "the runs hold no latencies of at least two requests each: import them with one record per request"
        )
    if json:
        terminal.print_json({"run": run, "baseline": baseline, "latency": [asdict(d) for d in found]})
        return
    table = Table(title=f"{run} over {baseline}: medians over requests (95%)", title_justify="left")
    for column in ("latency", "ratio"):
        table.add_column(column)
    for d in found:
        table.add_row(d.what, f"{d.value:.3f} ({d.low:.3f} to {d.high:.3f})")
    tables.show(table)


def imported(run: str, baseline: str, store: str) -> bool:
    """Whether one of two runs came from another tool's file."""
    from outrider.evaluate.store.store import Store

    if any(Path(r).suffix == ".json" and Path(r).is_file() for r in (run, baseline)):
        return False
    with Store(store, read_only=True) as db:
        return any(db.run(r).kind == "import" for r in (run, baseline))


def gate(
    run: Annotated[str, typer.Argument(help="Id or name of a run, or a file that bench --out wrote.")],
    baseline: Annotated[str, typer.Argument(help="The run that it is compared with: likewise.")],
    store: StorePath = STORE,
    speed: Annotated[float, typer.Option("--speed", min=0, help="Largest share of speed that may be lost.")] = 0.05,
    acceptance: Annotated[
        float, typer.Option("--acceptance", min=0, help="Largest loss of the acceptance rate.")
    ] = 0.02,
    quality: Annotated[
        float, typer.Option("--quality", min=0, help="Largest loss of quality, in nats per token.")
    ] = 0.02,
    absolute: Annotated[
        bool,
        typer.Option(
            "--absolute", help="Compare tokens per second instead of speed-ups: only for runs on the same machine."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Compare a run with a baseline. Exit code 0: passed, 1: failed, 3: inconclusive.

    Example: outrider gate tuesday monday --speed 0.1
    """
    raise typer.Exit(_gate(run, baseline, store, json, absolute, speed, acceptance, quality))


def _gate(run: str, baseline: str, store: str, json: bool, absolute: bool, *margins: float) -> int:
    from outrider.evaluate.bench.gate import Margins, comparable, load_run, overall, same_draws
    from outrider.evaluate.bench.gate import gate as check

    (ours_config, ours), (base_config, theirs) = load_run(run, store), load_run(baseline, store)
    comparable(ours_config, base_config)
    checks = check(ours, theirs, Margins(*margins), relative=not absolute)
    answer, code = overall(checks)
    said = same_draws(ours, theirs)
    if json:
        note = {"same_draws": said is not None, "note": said}
        terminal.print_json({"outcome": answer, "checks": [asdict(c) for c in checks], **note})
        return code
    table = Table(title=f"{run} against {baseline}: {answer}", title_justify="left")
    for column in ("arm", "check", "outcome", "value (95%)", "margin", "note"):
        table.add_column(column, overflow="fold")
    for c in checks:
        table.add_row(c.arm, c.what, c.outcome, _interval(c), "" if c.margin is None else f"{c.margin:.3g}", c.note)
    tables.show(table)
    if said is not None:
        terminal.console().print(f"note: {said}")
    return code


def _interval(c: Any) -> str:
    return "" if c.value is None else f"{c.value:.3f} ({c.low:.3f} to {c.high:.3f})"
