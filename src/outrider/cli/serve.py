"""`outrider serve`: an OpenAI-compatible server with a page that shows what speculation does."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from outrider.cli import paths, terminal
from outrider.cli.ending import Told, end_now
from outrider.cli.engine_options import ENGINE, SpeculativeConfig, configured, load_engine
from outrider.cli.options import STORE
from outrider.cli.serve_options import ServeOptions
from outrider.cli.takes import takes
from outrider.errors import ConfigError
from outrider.options import EngineOptions

if TYPE_CHECKING:
    from outrider.serve.server import Beside
    from outrider.serve.settings import Settings

PAST = 50
"""Runs and experiments of a store that the page shows."""


@takes(ENGINE, "engine")
@takes(ServeOptions, "asked")
def serve(
    context: typer.Context,
    engine: EngineOptions,
    asked: ServeOptions,
    speculative_config: SpeculativeConfig = None,
) -> None:
    """Serve a target with a drafter over OpenAI's HTTP interface. Without options: the shipped pair on http://127.0.0.1:8000.

    Example: outrider serve --port 8080 --slots 4 --length 4
    """
    from outrider.serve.address import check_address, reserve
    from outrider.serve.supervisor import die_with_parent

    paths.needs("serve", ("starlette", "uvicorn", "prometheus_client"))
    keys = asked.keys()
    check_address(asked.host, keys, asked.allow_open)
    if asked.kept is not None or asked.replica:
        die_with_parent()
    elif asked.replicas is not None:
        from outrider.cli.serve_replicas import serve_replicas

        serve_replicas(context, asked.lengths(configured(engine, speculative_config)), asked, keys, run)
        return
    elif asked.restarts:
        raise typer.Exit(keep(asked))
    if asked.on != "local" or any(x is not None for x in (asked.address, asked.max_replicas, asked.replica_threads)):
        raise ConfigError("--on, --address, --max-replicas and --replica-threads are about replicas: add --replicas N")
    listener = reserve(asked.host, asked.port) if asked.kept is None else socket.socket(fileno=asked.kept[0])
    context.call_on_close(listener.close)  # also where something below is refused
    asked.log()
    options = asked.lengths(configured(engine, speculative_config))
    settings = asked.settings(options.target, keys, options.slots)
    served = application(options, asked, settings)
    run(served, asked, settings, listener, served.state.bridge.warm)


def application(options: EngineOptions, asked: ServeOptions, settings: Settings) -> Any:
    """The server's application, which loads its engine when it starts; with the experiment and the store that were asked for."""
    from outrider.serve.app import create_app

    trial, store = None, asked.store
    if asked.experiment is not None:
        from outrider.evaluate.experiments.live import trial_of
        from outrider.evaluate.experiments.placer import placer_of

        store = store or Path(STORE)
        if asked.replica:
            trial = placer_of(asked.experiment, options, fixed=options.follows == "fixed")
        else:
            trial = trial_of(asked.experiment, store, options, fixed=options.follows == "fixed")
    past = None if store is None else past_of(store)
    return create_app(partial(load_engine, options, texts=False), settings, adaptive=False, past=past, trial=trial)


def run(
    app: Any, asked: ServeOptions, settings: Settings, listener: socket.socket, beside: Beside | None = None
) -> None:
    """Serve until it is told to end. beside: see `serve.server.Server`."""
    from outrider.serve.server import server_for, silent

    line, port = None, listener.getsockname()[1]
    if asked.kept is not None:
        line, again = socket.socket(fileno=asked.kept[1]), float(asked.kept[2])
        app.state.bridge.metrics.counters["restarts"] = ("Times the keeper has started it again.", lambda: again)
    where = f"{settings.model} on http://{asked.host}:{port} (Ctrl-C ends it)"
    told = Told(where + (", key needed" if settings.keys else ""), asked.grace)
    told.open = lambda: len(app.state.bridge.tickets)
    try:
        say = silent if asked.replica else told
        server_for(app, settings, asked.host, port, line, say, beside).run([listener])
    except KeyboardInterrupt:  # while it loaded
        end_now()


def keep(asked: ServeOptions) -> int:
    """Serve from a child with the same command line and the socket that is opened here; returns the exit code."""
    from outrider.serve.address import listen
    from outrider.serve.supervisor import Supervisor

    if os.name != "posix":
        raise ConfigError(
            "--restarts needs descriptors that a child can inherit, and this system has none: leave it out"
        )

    def command(*kept: int) -> list[str]:
        return [sys.executable, "-m", "outrider.cli.main", *sys.argv[1:], "--kept", *map(str, kept)]

    tell = lambda text: terminal.err.print(f"outrider: {text}")  # noqa: E731
    return Supervisor(listen(asked.host, asked.port), command, asked.restarts, asked.hang_timeout, tell).run()


def past_of(file: Path) -> Callable[[], dict[str, Any]]:
    """A function that reads the newest runs and experiments of a store: none where there is no such file yet, which is said.

    ConfigError at once if the file is none of a store, or could not be written where it is.
    """
    from outrider.evaluate.store.store import Store

    if not file.exists():
        paths.out_file(file)
        terminal.say(f"{file} is not there yet: the page shows its runs once there are some (bench --store {file})")

    def read() -> dict[str, Any]:
        if not file.exists():
            return {"runs": [], "experiments": []}
        with Store(file, read_only=True) as kept:
            latest = kept.runs()[: -PAST - 1 : -1]
            shown = [asdict(r) | {"ledger": kept.ledgers(r.id)} for r in latest]
            done = {"ab": lambda r: r.summary is not None, "online": lambda r: True}
            named = dict.fromkeys(r.name for r in latest if r.kind in done and done[r.kind](r))
            experiments = [{"name": name, "state": kept.experiment(name)[2]} for name in named]
        keys = ("id", "kind", "name", "state", "created", "updated", "summary", "ledger")
        return {"runs": [{k: r[k] for k in keys} for r in shown], "experiments": experiments}

    read()
    return read
