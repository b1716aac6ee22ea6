"""The `outrider` command: errors become one sentence and exit code 2, Ctrl-C leaves the terminal clean."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from outrider.threads import set_threads

set_threads()  # before anything imports torch: an OpenMP runtime reads it once, when it is loaded

import typer  # noqa: E402

from outrider.cli import ab, audit, bench, chat, demo, doctor, generate, plan, predict, runs, serve, train, tree  # noqa: E402
from outrider.cli import options as opt  # noqa: E402
from outrider.cli.dashboards import dashboards_app  # noqa: E402
from outrider.cli.theory import theory_app  # noqa: E402
from outrider.errors import OutriderError  # noqa: E402

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""

app = typer.Typer(
    name="outrider",
    help="Speculative decoding that is exact, says so, and measures itself against its own theory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("bench")(bench.bench)
app.command("predict")(predict.predict)
app.command("serve")(serve.serve)
app.command("audit")(audit.audit)
app.command("gate")(runs.gate)
app.add_typer(runs.runs_app, name="runs")
app.add_typer(ab.ab_app, name="ab")
app.command("plan")(plan.plan)
app.command("tree")(tree.tree)
app.command("doctor")(doctor.doctor)
app.command("train")(train.train)
app.add_typer(theory_app, name="theory")
app.add_typer(dashboards_app, name="dashboards")


def _version(value: bool | None) -> None:
    if value:
        from outrider import __version__

        typer.echo(f"outrider {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool | None = typer.Option(None, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Exit codes: 0 done or passed, 1 a gate failed, 2 wrong usage, 3 inconclusive."""


def _interrupted() -> NoReturn:
    opt.err.show_cursor()  # a progress bar that was interrupted while it was set up leaves it hidden
    print("\noutrider: interrupted", file=sys.stderr)
    raise SystemExit(INTERRUPTED) from None


def main() -> None:
    """Run the command line."""
    try:
        app()
    except OutriderError as error:
        print(f"outrider: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:  # typer turns Ctrl-C into its exit code and says nothing
        if end.code != INTERRUPTED:
            raise
        _interrupted()
    except BrokenPipeError:  # the reader of our output went away: not an error of ours, and nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()
