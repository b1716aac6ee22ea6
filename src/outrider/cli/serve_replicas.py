"""`outrider serve --replicas N`: the same server several times behind one address, on this machine or on Ray."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from outrider.cli import terminal
from outrider.cli.options import STORE
from outrider.cli.serve_options import ServeOptions
from outrider.errors import ConfigError
from outrider.options import EngineOptions

FRONTS = {
    "--host": 1, "--port": 1, "--api-key": 1, "--api-key-file": 1, "--allow-open": 0, "--allowed-host": 1, "--replicas": 1,
    "--on": 1, "--replica-threads": 1, "--per-key": 1, "--grace": 1,
}  # fmt: skip
"""Options that are the front's, and how many values each has; the replicas get all others."""


Run = Callable[[Any, ServeOptions, Any, Any], None]
"""Runs an application, with its options and settings, on a socket that listens, until it is told to end."""


def serve_replicas(
    context: typer.Context, options: EngineOptions, asked: ServeOptions, keys: list[str], run: Run
) -> None:
    """Serve until it is told to end."""
    from outrider.threads import usable_cores

    if asked.restarts:
        raise ConfigError("replicas that die are started again anyway: leave --restarts out")
    asked.log()
    threads = asked.replica_threads or max(1, usable_cores() // (asked.replicas or 1))
    if asked.on == "local":
        if asked.address is not None or asked.max_replicas is not None:
            raise ConfigError("--address and --max-replicas are Ray's: add --on ray")
        on_this_machine(context, options, asked, keys, threads, run)
    elif asked.on == "ray":
        refuse_on_ray(asked)
        from outrider.integrations.ray.replicas import Deployment, serve_on_ray

        settings = asked.settings(options.target, keys, options.slots)
        file = None if asked.experiment is None else str(asked.experiment.absolute())
        store = str((asked.store or Path(STORE)).absolute())
        size = (asked.replicas or 1, asked.max_replicas, threads)
        deployed = Deployment(asked.host, asked.port, *size, asked.address, file, store)
        serve_on_ray(options, deployed, settings)
    else:
        raise ConfigError(f"--on is local or ray, got {asked.on!r}")


def refuse_on_ray(asked: ServeOptions) -> None:
    """ConfigError for options that would do nothing, or something else, behind Ray Serve."""
    if asked.max_replicas is not None and asked.max_replicas < (asked.replicas or 1):
        raise ConfigError(
            f"--max-replicas {asked.max_replicas} is below --replicas {asked.replicas}: raise it, or leave it out"
        )
    if asked.store is not None and asked.experiment is None:
        raise ConfigError("behind Ray Serve the page shows no runs: leave --store out, or name an --experiment for it")
    if asked.port == 0:
        raise ConfigError("with --on ray name the --port: Ray Serve does not tell which free one it took")


def on_this_machine(
    context: typer.Context, options: EngineOptions, asked: ServeOptions, keys: list[str], threads: int, run: Run
) -> None:
    """Replicas as child processes."""
    from outrider.serve.address import reserve
    from outrider.serve.replicas.front import create_front
    from outrider.serve.replicas.local import LocalReplicas, environment

    listener = reserve(asked.host, asked.port)
    context.call_on_close(listener.close)
    rest, key = without(sys.argv[1:], FRONTS), secrets.token_hex(16)

    def command(port: int) -> list[str]:
        own = ["--replica", "--port", str(port), "--grace", str(asked.grace)]
        return [sys.executable, "-m", "outrider.cli.main", *rest, *own]

    tell = lambda text: terminal.err.print(f"outrider: {text}")  # noqa: E731
    count = asked.replicas or 1
    replicas = LocalReplicas(count, command, environment(key, threads), key, options.slots, tell)
    settings = asked.settings(options.target, keys, options.slots)
    run(create_front(replicas, settings, keeper_of(options, asked)), asked, settings, listener)


def keeper_of(options: EngineOptions, asked: ServeOptions) -> Any:
    """Who keeps the records of an experiment: one process, whatever the number of replicas that place its requests."""
    if asked.experiment is None:
        return None
    from outrider.evaluate.experiments.live import trial_of

    return trial_of(asked.experiment, asked.store or Path(STORE), options, fixed=options.follows == "fixed")


def without(words: Sequence[str], options: dict[str, int]) -> list[str]:
    """A command line without some options: `--port 80`, `--port=80`."""
    out, skip = list[str](), 0
    for word in words:
        name, given, _ = word.partition("=")
        if skip:
            skip -= 1
        elif name in options:
            skip = 0 if given else options[name]
        else:
            out.append(word)
    return out
