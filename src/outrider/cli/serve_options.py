"""The options of `outrider serve` besides those of its engine, and the settings that they make."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli import paths
from outrider.cli.options import AlertWebhook, RayAddress
from outrider.errors import ConfigError
from outrider.files import read_text

if TYPE_CHECKING:
    from outrider.options import EngineOptions
    from outrider.serve.settings import Settings

LEVELS = ("ERROR", "WARNING", "INFO", "DEBUG")
KEY = "OUTRIDER_API_KEY"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """As on the command line. kept: descriptors and a count that a supervisor hands to its child."""

    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on; other machines can reach any but a loopback address."),
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8000
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key", help=f"A key clients must send (repeatable). Better: the variable {KEY}.", show_default=False
        ),
    ] = None
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="A file with one key per line.", show_default=False)
    ] = None
    allow_open: Annotated[bool, typer.Option("--allow-open", help="Allow a public address without a key.")] = False
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="Host name that is answered without a key (repeatable; '*': any).",
            show_default=False,
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        typer.Option(
            "--served-model-name", help="Model name that clients use. Default: the target's.", show_default=False
        ),
    ] = None
    queue: Annotated[
        int, typer.Option("--queue", min=0, max=65536, help="Sequences that may wait; beyond that: status 429.")
    ] = 64
    per_key: Annotated[
        int | None,
        typer.Option(
            "--per-key",
            min=1,
            help="Sequences that one API key may have running or waiting. Default: half of all if there are several keys.",
            show_default=False,
        ),
    ] = None
    queue_timeout: Annotated[float, typer.Option("--queue-timeout", min=0.1, help="Seconds to wait for a slot.")] = 30.0
    request_timeout: Annotated[
        float, typer.Option("--request-timeout", min=0.1, help="Seconds for a whole request.")
    ] = 600.0
    hang_timeout: Annotated[
        float, typer.Option("--hang-timeout", min=0.5, help="Seconds without a step after which it is unhealthy.")
    ] = 10.0
    connections: Annotated[
        int,
        typer.Option(
            "--connections",
            min=1,
            max=65536,
            help="Connections at the same time; fewer where the system allows fewer descriptors.",
        ),
    ] = 1024
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that running requests have to finish on shutdown.")
    ] = 30.0
    restarts: Annotated[
        int,
        typer.Option(
            "--restarts",
            min=0,
            help="Serve from a child process, and restart it when it dies or hangs, at most this often in a row.",
        ),
    ] = 0
    replicas: Annotated[
        int | None,
        typer.Option(
            "--replicas",
            min=1,
            max=4096,
            help="Serve from this many replicas behind one address; a conversation stays with its replica.",
            show_default=False,
        ),
    ] = None
    max_replicas: Annotated[
        int | None,
        typer.Option(
            "--max-replicas",
            min=1,
            max=4096,
            help="With --on ray: start up to this many replicas while requests queue.",
            show_default=False,
        ),
    ] = None
    on: Annotated[
        str, typer.Option("--on", help="With --replicas: local (processes of this machine) or ray (Ray Serve).")
    ] = "local"
    address: RayAddress = None
    replica_threads: Annotated[
        int | None,
        typer.Option(
            "--replica-threads",
            min=1,
            max=1024,
            help="Threads of a replica; its CPUs in Ray. Default: the cores divided by the replicas.",
            show_default=False,
        ),
    ] = None
    replica: Annotated[bool, typer.Option("--replica", hidden=True)] = False
    kept: Annotated[tuple[int, int, int] | None, typer.Option("--kept", hidden=True, show_default=False)] = None
    fixed_length: Annotated[
        bool, typer.Option("--fixed-length", help="Always draft --length tokens, whatever the load: --lengths fixed.")
    ] = False
    pad_streams: Annotated[
        bool,
        typer.Option(
            "--pad-streams", help="Pad and pace streams, so that packet sizes do not reveal which tokens were accepted."
        ),
    ] = False
    tool_format: Annotated[
        str | None,
        typer.Option(
            "--tool-format",
            help="Notation of the model's tool calls (hermes, llama3, mistral ...). Default: as its chat template shows it.",
            show_default=False,
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            help="Origin whose pages may call this server from a browser (http://localhost:3000; repeatable; '*': any).",
            show_default=False,
        ),
    ] = None
    log_level: Annotated[
        str,
        typer.Option("--log-level", help="error, warning, info (every request, statistics every 10 s) or debug."),
    ] = "warning"
    details: Annotated[
        bool,
        typer.Option("--request-metrics/--no-request-metrics", help="Report a request's acceptance in its reply."),
    ] = True
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour", min=0, help="Price of this machine in dollars per hour: shows cost.", show_default=False
        ),
    ] = None
    alert_webhook: AlertWebhook = None
    store: Annotated[
        Path | None,
        typer.Option("--store", help="Store whose runs and experiments the page shows.", show_default=False),
    ] = None
    experiment: Annotated[
        Path | None,
        typer.Option(
            "--experiment",
            callback=paths.file,
            help="Assign requests to the arms of this experiment (YAML; see `outrider ab`); its records go to --store.",
            show_default=False,
        ),
    ] = None

    def keys(self) -> list[str]:
        """API keys of the command line, a file, and the environment. ConfigError for an empty or short one."""
        keys = list(self.api_key or [])
        if (file := self.api_key_file) is not None:
            keys += [line.strip() for line in read_text(file, 1 << 20).splitlines() if line.strip()]
        if KEY in os.environ:
            keys.append(os.environ[KEY])
        if any(len(key) < 8 for key in keys):
            raise ConfigError("an API key needs at least 8 characters; leave it out to ask for none")
        return keys

    def lengths(self, options: EngineOptions) -> EngineOptions:
        """The engine's options, with what sets draft lengths in a server where none is named."""
        if self.fixed_length and options.follows not in ("auto", "fixed"):
            raise ConfigError(f"--fixed-length and --lengths {options.lengths} exclude each other: leave one out")
        auto = "fixed" if self.fixed_length else "adaptive"
        return options.changed(lengths=auto) if options.follows == "auto" else options

    def settings(self, target: str | None, keys: list[str], slots: int) -> Settings:
        """What the server is told: of a target and API keys, with `slots` sequences at the same time."""
        from outrider.serve.reading import check_tool_format
        from outrider.serve.settings import LOCAL_NAMES, Settings, digest, model_name
        from outrider.serve.tickets import Limits
        from outrider.serve.webhook import check_url

        share = share_of(self.per_key, len(keys), slots + self.queue)
        return Settings(
            self.served_model_name or model_name(target),
            tuple(digest(key) for key in keys),
            (*LOCAL_NAMES, self.host, *(self.allowed_host or ()), *(("*",) if self.allow_open else ())),
            pad=self.pad_streams,
            details=self.details,
            limits=Limits(self.queue, share, self.queue_timeout, self.request_timeout, self.hang_timeout),
            connections=self.connections,
            grace=self.grace,
            price=self.price_per_hour,
            webhook=None if self.alert_webhook is None else check_url(self.alert_webhook),
            tool_format=check_tool_format(self.tool_format),
            cors=tuple(self.cors_origin or ()),
        )

    def log(self) -> None:
        """Let the server say on stderr what `log_level` names. ConfigError for an unknown level."""
        level = self.log_level.upper()
        if level not in LEVELS:
            raise ConfigError(f"no log level {self.log_level!r}: choose one of {', '.join(map(str.lower, LEVELS))}")
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
        logging.getLogger("outrider").setLevel(level)


def share_of(asked: int | None, keys: int, room: int) -> int | None:
    """Sequences one key may hold: what was asked for, else half of the room if there are several keys; None: all of it."""
    return asked if asked is not None or keys < 2 else max(1, room // 2)
