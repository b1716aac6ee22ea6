"""`outrider sweep`: many measurements from a plan file, on this machine or on a Ray cluster, each recorded once."""

from __future__ import annotations

from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer
from rich.table import Table

from outrider.cli import paths, tables, terminal
from outrider.cli.options import STORE, Json, RayAddress, StorePath
from outrider.cli.sweep_kinds import WORK, kinds
from outrider.cli.takes import takes
from outrider.errors import ConfigError

SAY_EVERY = 15.0
"""Seconds between two lines of progress where no bar can be drawn."""


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """Where and how a plan is run. As on the command line."""

    on: Annotated[str, typer.Option("--on", help="local: processes of this machine; ray: a Ray cluster.")] = "local"
    address: RayAddress = None
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, max=1024, help="With --on local: cells at the same time. Default: the cores."),
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and whether each is done, and stop.")] = (
        False
    )
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try cells again that are recorded as failed.")
    ] = False
    stall: Annotated[
        float, typer.Option("--stall", min=1, help="Seconds after which a cell that no machine can take is reported.")
    ] = 45.0
    html: Annotated[
        Path | None,
        typer.Option("--html", callback=paths.out_file, help="Write a self-contained report.", show_default=False),
    ] = None

    def executor(self) -> Any:
        """The executor that was asked for. Raises ConfigError for one there is not, and for options that it does not have."""
        from outrider.threads import usable_cores

        if self.on == "local":
            if self.address is not None:
                raise ConfigError("--address names a Ray cluster: add --on ray")
            from outrider.evaluate.sweep.executor import ProcessExecutor

            return ProcessExecutor(WORK, self.workers or usable_cores(), usable_cores())
        if self.on != "ray":
            raise ConfigError(f"--on is local or ray, got {self.on!r}")
        if self.workers is not None:
            raise ConfigError("--workers is for --on local: with Ray the cluster's CPUs decide")
        from outrider.integrations.ray.executor import RayExecutor

        return RayExecutor(WORK, self.address)


@takes(SweepOptions, "asked")
def sweep(
    file: Annotated[Path, typer.Argument(callback=paths.file, metavar="PLAN", help="Plan file (YAML).")],
    asked: SweepOptions,
    store: StorePath = STORE,
    json: Json = False,
) -> None:
    """Run a plan of bench, predict, audit, A/B and feature cells. Interrupted or killed, the same command goes on where it was.

    Exit code 0: every cell has its record. 1: some have failed. 3: some have no machine that can take them.

    Example: outrider sweep plan.yaml --dry-run
    """
    from outrider.evaluate.sweep.book import Book
    from outrider.evaluate.sweep.plan import read_plan
    from outrider.evaluate.sweep.summary import summarise

    table = kinds()
    plan = read_plan(file, table)
    if asked.dry_run:
        list_cells(plan, store, json)
        return
    with Book(store, plan.name, plan.cells) as book:
        progress = drive(plan, asked, book)
        document = {"plan": plan.name, **summarise(plan.cells, book, table), "duplicates": book.duplicates}
        document |= {"unplaced": [{"cell": n, "reason": why} for n, why in sorted(progress.unplaced.items())]}
        for said in finished(plan, book, table):
            terminal.say(said)
        book.finish(document, whole=not progress.unplaced)
    if asked.html is not None:
        from outrider.evaluate.sweep.report import write_sweep

        write_sweep(asked.html, plan.name, document)
    terminal.print_json(document) if json else show(document)
    raise typer.Exit(3 if document["unplaced"] else 1 if document["failed"] else 0)


def finished(plan: Any, book: Any, table: dict[str, Any]) -> list[str]:
    """What kinds do once the parts of a whole are there."""
    out = []
    for kind in table.values():
        mine = [c for c in plan.cells if c.fields["kind"] == kind.name and book.has(c, retry=True)]
        out += kind.finish([kind.fields.model_validate(c.fields) for c in mine])
    return out


def drive(plan: Any, asked: SweepOptions, book: Any) -> Any:
    """Perform what the store does not have; the workers end with it, however it ends."""
    from outrider.evaluate.sweep.driver import Driver, Progress, Rules

    if all(book.has(cell, asked.retry_failed) for cell in plan.cells):
        terminal.say(f"{plan.name}: all {len(plan.cells)} cells are in {book.store.name}")
        return Progress(len(plan.cells), len(plan.cells))
    rules = Rules(plan.attempts, plan.limit, asked.stall)
    with closing(asked.executor()) as executor, telling(plan) as look:
        driver = Driver(plan.cells, executor, book, rules, retry=asked.retry_failed, say=terminal.say, look=look)
        try:
            return driver.run()
        except KeyboardInterrupt:
            terminal.say(f"what is done is kept in {book.store.name}: the same command goes on from there")
            raise


@contextmanager
def telling(plan: Any) -> Any:
    """A bar, or a line from time to time."""
    began = last = monotonic()
    with terminal.loading(f"{plan.name}: {len(plan.cells)} cells") as bar:

        def look(p: Any) -> None:
            nonlocal last
            finished = p.done + p.failed
            bar((p.known + finished) / max(1, p.total))
            if terminal.plain(terminal.err) and monotonic() - last > SAY_EVERY:
                last = monotonic()
                rest = "" if not finished else f", about {(last - began) / finished * p.left / 60:.0f} min left"
                said = f"{p.known + finished}/{p.total} cells, {p.running} running, {p.failed} failed, {p.lost} attempts lost"
                terminal.say(said + rest)

        yield look


def list_cells(plan: Any, store: str, json: bool) -> None:
    """The cells of a plan, with their identities, and what the store has of them. Nothing is written."""
    done = done_in(store, plan)
    cells = [
        {
            "cell": c.number,
            "label": c.label,
            "identity": c.identity,
            "alone": c.alone,
            "state": done.get(c.identity, "to do"),
        }
        | {"fields": c.fields}
        for c in plan.cells
    ]
    if json:
        terminal.print_json({"plan": plan.name, "cells": cells})
        return
    table = Table(title=f"{plan.name}: {len(cells)} cells", title_justify="left")
    for column in ("cell", "identity", "machine", "state", "measurement"):
        table.add_column(column)
    for c in cells:
        table.add_row(str(c["cell"]), c["identity"][:12], "alone" if c["alone"] else "any", c["state"], c["label"])
    tables.show(table, terminal.console())


def done_in(store: str, plan: Any) -> dict[str, str]:
    """Identity -> done or failed, of the cells that a store has."""
    from outrider.evaluate.store.database import URLS
    from outrider.evaluate.store.store import Store
    from outrider.evaluate.sweep.book import KIND, RECORD

    if not store.startswith(URLS) and not Path(store).exists():
        return {}
    with Store(store, read_only=True) as db:
        runs = [r.id for r in db.runs() if r.kind == KIND and r.name == plan.name]
        records = db.records(runs[-1]) if runs else {}
    return {t: "failed" if data.get("failed") else "done" for (t, _, part), data in records.items() if part == RECORD}


def show(document: dict[str, Any]) -> None:
    """The document for people."""
    from outrider.evaluate.sweep.report import COLUMNS, prompts_of, rows_of

    console = terminal.console()
    table = Table(title=f"{document['plan']}: {document['cells']} cells", title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows_of(document):
        table.add_row(*row)
    tables.show(table, console)
    for label, said in prompts_of(document):
        console.print(f"prompts ({label}): {said}")
    for m in document["machines"].values():
        console.print(f"{m['cells']} cells in {m['seconds']:.0f} s on {m['node']} ({m['cpu']}, {m['threads']} threads)")
    for f in document["failed"]:
        console.print(f"failed     cell {f['cell']} ({f['label']}): {f['reason']}")
    for u in document["unplaced"]:
        console.print(f"no place   cell {u['cell']}: {u['reason']}")
