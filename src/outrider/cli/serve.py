"""`outrider serve`: an OpenAI-compatible server with a page that shows what speculation does."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli import paths
from outrider.cli.ending import Told, end_now
from outrider.cli.runs import DEFAULT
from outrider.cli.trial import served_by, trial_of
from outrider.errors import ConfigError

KEY, WEBHOOK = "OUTRIDER_API_KEY", "OUTRIDER_ALERT_WEBHOOK"
PAST = 50
"""Runs and experiments of a store that the page shows."""


def serve(
    context: typer.Context,
    target: opt.Target = None,
    draft: opt.Draft = "auto",
    length: opt.Length = 3,
    rule: opt.Rule = "auto",
    allow_lossy: opt.AllowLossy = False,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others can reach anything but loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key", help=f"A key clients must send (repeatable). Better: the variable {KEY}.", show_default=False
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="A file with one key a line.", show_default=False)
    ] = None,
    allow_open: Annotated[bool, typer.Option("--allow-open", help="Listen on a public address without a key.")] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host", help="Host name to answer to without a key (repeatable; '*': any).", show_default=False
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option("--served-model-name", help="Name clients use. Default: of the target.", show_default=False),
    ] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, max=1024, help="Sequences decoded together.")] = 8,
    queue: Annotated[int, typer.Option("--queue", min=0, max=65536, help="Sequences that may wait; beyond: 429.")] = 64,
    per_key: Annotated[
        int | None,
        typer.Option(
            "--per-key",
            min=1,
            help="Sequences one API key may hold, waiting ones counted. Default: half of all if there are several keys.",
            show_default=False,
        ),
    ] = None,
    queue_timeout: Annotated[
        float, typer.Option("--queue-timeout", min=0.1, help="Seconds to wait for a slot.")
    ] = 30.0,
    request_timeout: Annotated[
        float, typer.Option("--request-timeout", min=0.1, help="Seconds for a whole request.")
    ] = 600.0,
    hang_timeout: Annotated[
        float, typer.Option("--hang-timeout", min=0.5, help="Seconds without a step: unhealthy.")
    ] = 10.0,
    connections: Annotated[
        int,
        typer.Option(
            "--connections",
            min=1,
            max=65536,
            help="Connections at once; fewer where the system allows fewer descriptors.",
        ),
    ] = 1024,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds running requests may take to finish on shutdown.")
    ] = 30.0,
    restarts: Annotated[
        int,
        typer.Option(
            "--restarts",
            min=0,
            help="Serve from a child process, and start it again when it dies or hangs, so often in a row at most.",
        ),
    ] = 0,
    kept: Annotated[tuple[int, int, int] | None, typer.Option("--kept", hidden=True, show_default=False)] = None,
    fixed_length: Annotated[
        bool, typer.Option("--fixed-length", help="Always draft --length tokens, whatever it costs under this load.")
    ] = False,
    pad_streams: Annotated[
        bool,
        typer.Option(
            "--pad-streams", help="Pad and pace streams, so that their packets do not tell what was accepted."
        ),
    ] = False,
    details: Annotated[
        bool, typer.Option("--request-metrics/--no-request-metrics", help="Acceptance of a request in its reply.")
    ] = True,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour", min=0, help="Dollars an hour of this machine: shows cost.", show_default=False
        ),
    ] = None,
    alert_webhook: Annotated[
        str | None,
        typer.Option(
            "--alert-webhook",
            envvar=WEBHOOK,
            help="URL that is told of alerts as they begin and end.",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="Store whose runs and experiments the page shows.", show_default=False),
    ] = None,
    experiment: Annotated[
        Path | None,
        typer.Option(
            "--experiment",
            callback=paths.file,
            help="Give requests to the arms of this experiment (YAML; see `outrider ab`); its records go to --store.",
            show_default=False,
        ),
    ] = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    quantize_draft: opt.Quantize = None,
    implementation: opt.Implementation = "auto",
    speculative_config: opt.SpeculativeConfig = None,
    max_length: opt.MaxLength = None,
) -> None:
    """Serve a target with a drafter over OpenAI's HTTP interface. With no options: the shipped pair on http://127.0.0.1:8000.

    Example: outrider serve --target path/to/model --draft path/to/draft
    """
    from outrider.serve.address import check_address, reserve
    from outrider.serve.supervisor import die_with_parent

    paths.needs("serve", ("starlette", "uvicorn", "prometheus_client"))
    keys = read_keys(api_key, api_key_file)
    check_address(host, keys, allow_open)
    if kept is not None:
        die_with_parent()
    elif restarts:
        raise typer.Exit(keep(host, port, restarts, hang_timeout))
    sockets = [reserve(host, port)] if kept is None else [socket.socket(fileno=kept[0])]
    context.call_on_close(sockets[0].close)  # also where something below is refused
    from outrider.serve.app import create_app
    from outrider.serve.server import server_for
    from outrider.serve.settings import LOCAL_NAMES, Settings, digest
    from outrider.serve.tickets import Limits
    from outrider.serve.webhook import check_url

    hashed = tuple(digest(key) for key in keys)
    settings = Settings(
        served_model_name or model_name(target),
        hashed,
        (*LOCAL_NAMES, host, *(allowed_host or ()), *(("*",) if allow_open else ())),
        pad=pad_streams,
        details=details,
        limits=Limits(queue, share_of(per_key, len(keys), slots + queue), queue_timeout, request_timeout, hang_timeout),
        connections=connections,
        grace=grace,
        price=price_per_hour,
        webhook=None if alert_webhook is None else check_url(alert_webhook),
    )

    def build(**wiring: Any) -> Any:
        from outrider.cli.setup import engine_from_options

        return engine_from_options(
            **wiring,
            target=target,
            draft=draft,
            length=length,
            rule=rule,
            allow_lossy=allow_lossy,
            dtype=dtype,
            device=device,
            draft_quantize=quantize_draft,
            implementation=implementation,
            speculative_config=speculative_config,
            max_length=max_length,
            slots=slots,
        )

    trial = None
    if experiment is not None:
        store = store or Path(DEFAULT)
        options = (draft, length, rule, allow_lossy, quantize_draft)
        trial = trial_of(experiment, store, served_by(*options, speculative_config, fixed=fixed_length))
    past = None if store is None else past_of(store)
    app = create_app(build, settings, adaptive=not fixed_length, past=past, trial=trial)
    line, port = None, sockets[0].getsockname()[1]
    if kept is not None:
        line, again = socket.socket(fileno=kept[1]), float(kept[2])
        app.state.bridge.metrics.counters["restarts"] = ("Times the keeper has started it again.", lambda: again)
    told = Told(f"{settings.model} on http://{host}:{port} (Ctrl-C ends it)" + (", key needed" if keys else ""), grace)
    told.open = lambda: len(app.state.bridge.tickets)
    try:
        server_for(app, settings, host, port, line, told).run(sockets)
    except KeyboardInterrupt:  # while it loaded
        end_now()


def keep(host: str, port: int, restarts: int, silence: float) -> int:
    """Serve from a child with the same command line and the socket that is opened here; returns the exit code."""
    from outrider.serve.address import listen
    from outrider.serve.supervisor import Keeper

    if os.name != "posix":
        raise ConfigError(
            "--restarts needs descriptors that a child can inherit, and this system has none: leave it out"
        )

    def command(*kept: int) -> list[str]:
        return [sys.executable, "-m", "outrider.cli.main", *sys.argv[1:], "--kept", *map(str, kept)]

    keeper = Keeper(listen(host, port), command, restarts, silence, lambda text: opt.err.print(f"outrider: {text}"))
    return keeper.run()


def share_of(asked: int | None, keys: int, room: int) -> int | None:
    """Sequences one key may hold: what was asked for, else half of the room if there are several keys; None: all of it."""
    return asked if asked is not None or keys < 2 else max(1, room // 2)


def past_of(file: Path) -> Callable[[], dict[str, Any]]:
    """A function that reads the newest runs and experiments of a store: none where there is no such file yet, which is said.

    ConfigError at once if the file is none of a store, or could not be written where it is.
    """
    from outrider.evaluate.store.store import Store

    if not file.exists():
        paths.out_file(file)
        opt.say(f"{file} is not there yet: the page shows its runs once there are some (bench --store {file})")

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


def read_keys(given: list[str] | None, file: Path | None) -> list[str]:
    """API keys of the command line, a file, and the environment. ConfigError for an empty or short one."""
    keys = list(given or [])
    if file is not None:
        try:
            keys += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"{file} cannot be read: give a text file with one key a line") from None
    if KEY in os.environ:
        keys.append(os.environ[KEY])
    if any(len(key) < 8 for key in keys):
        raise ConfigError("an API key needs at least 8 characters; leave it out to ask for none")
    return keys


def model_name(target: str | None) -> str:
    """Name of a target for clients: the last part of its path or Hub name; `pycode` is the shipped pair."""
    if target is None:
        return "pycode"
    path = Path(target).expanduser()
    return path.resolve().name if path.exists() else target
