"""`outrider watch`: a page, alerts and an audit for any server, from outside."""

from __future__ import annotations

import json as json_module
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import paths, terminal
from outrider.cli.options import AlertWebhook, Json
from outrider.cli.takes import takes
from outrider.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """As on the command line."""

    once: Annotated[bool, typer.Option("--once", help="Read once, print the figures and end.")] = False
    every: Annotated[float, typer.Option("--every", min=0.2, max=3600, help="Seconds between two readings.")] = 2.0
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, max=60, help="Seconds for one whole answer.")] = 5.0
    host: Annotated[str, typer.Option("--host", help="Loopback address at which the page is shown.")] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port of the page; 0: any free one.")] = 8100
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="OUTRIDER_API_KEY", help="Key for the watched server.", show_default=False),
    ] = None
    store: Annotated[
        str | None,
        typer.Option(
            "--store", help="Keep a record of every minute in this file or postgresql:// URL.", show_default=False
        ),
    ] = None
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the run in the store. Default: the server's address.", show_default=False),
    ] = None
    alert_webhook: AlertWebhook = None
    budget: Annotated[
        int,
        typer.Option(
            "--budget",
            min=0,
            help="Tokens that requests of the watch may generate in all, for the prediction and the audit; 0: it sends none.",
        ),
    ] = 0
    rate: Annotated[float, typer.Option("--rate", min=1, help="Tokens that these requests may generate a minute.")] = (
        600.0
    )
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            callback=paths.file,
            help="Their prompts: JSONL or text, like those that are served. Default: those of the shipped pair.",
            show_default=False,
        ),
    ] = None
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of each of these requests.")] = 64
    model: Annotated[
        str | None, typer.Option("--model", help="Name of the model there. Default: its first.", show_default=False)
    ] = None
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            callback=paths.model,
            help="The served model as a folder or a Hub name: it is loaded here, and the texts are audited against it.",
            show_default=False,
        ),
    ] = None
    draft: Annotated[
        str,
        typer.Option(
            "--draft", "-d", callback=paths.drafter, help="Its draft model: the audit then sees more mistakes."
        ),
    ] = "none"
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", help="Total variation per token that the engine's other kernels may cause."),
    ] = 0.001

    def check(self) -> None:
        """ConfigError for options that would do nothing."""
        from outrider.integrations.watch import ANSWERS

        if self.once and (self.store or self.budget or self.alert_webhook):
            raise ConfigError("--once reads once: leave out --store, --budget and --alert-webhook")
        if self.target is not None and not self.budget:
            raise ConfigError("--target is for the audit, which needs tokens: add --budget, such as 20000")
        if self.draft != "none" and self.target is None:
            raise ConfigError("--draft helps the audit, which needs the served model: add --target")
        if not self.budget and (self.prompts is not None or self.model is not None):
            raise ConfigError(
                "--prompts and --model are for requests of the watch, which need tokens: add --budget, such as 20000"
            )
        if 0 < self.budget < ANSWERS * self.max_tokens:
            raise ConfigError(
                f"--budget {self.budget} does not pay for one prompt, which gets {ANSWERS} answers of up to --max-tokens "
                f"{self.max_tokens}"
            )
        if self.name is not None and self.store is None:
            raise ConfigError("--name is of the run in the store: add --store FILE")


@takes(WatchOptions, "asked")
def watch(
    url: Annotated[str, typer.Argument(help="Address of the server, such as http://127.0.0.1:8000.")],
    asked: WatchOptions,
    json: Json = False,
) -> None:
    """Watch a running server from outside: Outrider, vLLM, SGLang or llama.cpp, told apart by what it answers.

    Shows the page at http://127.0.0.1:8100. Without --once, --json prints every reading as a line.

    Example: outrider watch http://127.0.0.1:8000 --once
    """
    paths.needs("watch", ("prometheus_client",) if asked.once else ("starlette", "uvicorn", "prometheus_client"))
    from outrider.integrations.watch.watcher import Watch

    asked.check()
    seen = Watch(url, asked.api_key, seconds=asked.timeout)
    if asked.once:
        seen.once()
        document = seen.reading()
        terminal.print_json(document) if json else print_reading(document)
        return
    seen.say = terminal.say
    go_on(seen, asked, json)


def go_on(seen: Any, asked: WatchOptions, json: bool) -> None:
    """Watch, and show the page, until told to end."""
    from outrider.integrations.watch.app import Watching, create_app, server_for
    from outrider.integrations.watch.log import Log
    from outrider.serve.address import reserve
    from outrider.serve.webhook import Webhook, check_url

    requests = requests_of(seen, asked) if asked.budget else None
    watching = Watching(seen, asked.every, say=terminal.say)
    if requests is not None:
        watching.step, watching.asked = requests.step, requests.document
        seen.accused, seen.audited = requests.accused, asked.target is not None
    if asked.store is not None:
        watching.log = partial(Log, asked.store, asked.name or seen.url.partition("://")[2], seen)
    if asked.alert_webhook is not None:
        watching.webhook = Webhook(check_url(asked.alert_webhook), seen.url)
    listener = reserve(asked.host, asked.port)
    server = server_for(create_app(watching), asked.host, asked.port)
    if json:
        seen.heard = partial(print_line, server)
    watching.open()
    if asked.store is not None and "://" not in asked.store:
        from outrider.cli.serve import past_of

        watching.past = past_of(Path(asked.store))
    terminal.err.print(
        f"outrider: watching {seen.url}; page on http://{asked.host}:{listener.getsockname()[1]} (Ctrl-C ends it)"
    )
    server.run([listener])
    if watching.busy:  # a server that hangs: ending the usual way would wait for it
        sys.stdout.flush()
        os._exit(0)


def print_line(server: Any, reading: dict[str, Any]) -> None:
    """A reading as a line; when nobody reads any more, the watch ends."""
    try:
        print(json_module.dumps(reading), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        server.should_exit = True


def requests_of(seen: Any, asked: WatchOptions) -> Any:
    """The requests of the watch, which begin when the server has answered; with --target their texts are audited."""
    from outrider.evaluate.workloads import load_rows
    from outrider.integrations.watch.asking import Budget, Later, asking
    from outrider.params import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=asked.max_tokens)
    rows = load_rows(asked.prompts, 10_000)
    auditor, prompts = None, list[Any](row.text for row in rows)
    if asked.target is not None:
        auditor, prompts = auditor_of(asked, params, rows)
    budget = Budget(asked.budget, asked.rate)
    make = partial(asking, seen, prompts, params, budget, auditor, model=asked.model, say=terminal.say)
    return Later(seen, make)


def auditor_of(asked: WatchOptions, params: Any, rows: list[Any]) -> tuple[Any, list[list[int]]]:
    """The auditor, and the tokens of the prompts as its target takes them; which they are is said."""
    from outrider.cli.engine_options import load_engine
    from outrider.evaluate.audit.audit import Auditor
    from outrider.evaluate.audit.findings import AuditOptions
    from outrider.evaluate.workloads import ready, told
    from outrider.options import EngineOptions

    engine: Any = load_engine(EngineOptions(target=asked.target, draft=asked.draft, slots=1))
    models = list(engine.loaded.models.values())
    options = AuditOptions(params, tolerance=asked.tolerance)
    auditor = Auditor(engine.parts.target, models[0][0] if models else None, options, tuple(engine.eos))
    found = ready(engine, asked.prompts, rows)
    terminal.say(f"prompts: {told(found.data)}")
    return auditor, found.ids


def print_reading(d: dict[str, Any]) -> None:
    """A reading for people."""
    console, whole, drafted = terminal.console(), d["since_start"], d["since_start"]["drafted"]
    name = " ".join(str(x) for x in (d["engine"], d["version"]) if x)
    console.print(f"[bold]{d['model'] or d['url']}[/bold] on {name} at {d['url']}")
    console.print(
        f"tokens per pass      {_number(whole['tokens_per_pass'], 3)}   ({_number(whole['tokens'])} generated tokens in "
        f"{_number(whole['passes'])} passes of the target, since it began)"
    )
    if drafted["passes"]:
        console.print(
            f"where it drafted     {_number(drafted['tokens_per_drafted_pass'], 3)}   (in {_number(drafted['passes'])} "
            f"passes, {_share(drafted['share_of_passes'])} of all)"
        )
        console.print(
            f"draft tokens         {_number(drafted['proposed'])} proposed, {_number(drafted['accepted'])} accepted "
            f"({_share(drafted['acceptance_rate'])})"
        )
    if whole["rejections"] is not None:
        predicted = whole["predicted_rejections"]
        more = "" if predicted is None else f", {predicted:.1f} predicted"
        console.print(
            f"rejections           {_range(whole['rejections'])}{more}; "
            f"{_range(whole['rejection_probability'], 3)} per judged token"
        )
    if drafted["judged_by_position"]:
        pairs = zip(drafted["accepted_by_position"], drafted["judged_by_position"], strict=False)
        by = ", ".join(_share(a / j) if j else "-" for a, j in pairs)
        console.print(f"by position          {by}")
    if drafted["by_length"]:
        by = ", ".join(f"{x:.2f}" for x in drafted["by_length"])
        console.print(f"by draft length      {by} tokens per drafted pass, from 1 on")
    now = d["now"]
    console.print(f"now                  {_number(now['running'])} running, {_number(now['waiting'])} waiting")
    first = whole["first_token_seconds"]
    if first["median"] is not None:
        console.print(
            f"first token          median {1e3 * first['median']:.0f} ms, 95th percentile {1e3 * first['high']:.0f} ms"
        )
    for words in d["cannot_tell"]:
        console.print(f"it does not tell     {words}")
    for words in d["problems"]:
        console.print(f"note                 {words}")


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _range(value: list[float] | None, digits: int = 0) -> str:
    if value is None:
        return "-"
    low, high = (f"{x:,.{digits}f}" for x in value)
    return low if low == high else f"{low} to {high}"
