"""The `outrider` command: errors become one sentence and exit code 2, Ctrl-C leaves the terminal clean."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from typing import NoReturn

from outrider.threads import set_threads

set_threads()  # before anything imports torch: an OpenMP runtime reads it once, when it is loaded

import typer  # noqa: E402

from outrider.cli import (  # noqa: E402
    ab,
    audit,
    bench,
    chat,
    convert,
    demo,
    doctor,
    generate,
    image,
    plan,
    predict,
    runs,
    serve,
    sweep,
    terminal,
    train,
    tree,
    watch,
)
from outrider.cli.dashboards import dashboards_app  # noqa: E402
from outrider.cli.ending import INTERRUPTED  # noqa: E402
from outrider.cli.interrupts import keep_interrupts  # noqa: E402
from outrider.cli.theory import theory_app  # noqa: E402
from outrider.errors import OutriderError, printable  # noqa: E402

app = typer.Typer(
    name="outrider",
    help="Speculative decoding with the target's own distribution, measured against its theory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's panels cut words at 80 columns, and a pipe wants none
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("demo", short_help="The shipped pair, plain and speculative side by side.")(demo.demo)
app.command("generate", short_help="Continue a prompt.")(generate.generate)
app.command("image", short_help="Draw pictures with a model of image tokens.")(image.image)
app.command("chat", short_help="Talk to a model.")(chat.chat)
app.command("bench", short_help="Compare draft lengths, or the arms of a preset.")(bench.bench)
app.command("predict", short_help="What a draft is worth, without running it.")(predict.predict)
app.command("serve", short_help="Serve OpenAI's HTTP interface, and a page.")(serve.serve)
app.command("watch", short_help="Watch any server: vLLM, SGLang, llama.cpp, ours.")(watch.watch)
app.command("audit", short_help="Is a generator's text distributed as the target's?")(audit.audit)
app.command("gate", short_help="Compare a run with a baseline.")(runs.gate)
app.add_typer(runs.runs_app, name="runs")
app.add_typer(ab.ab_app, name="ab")
app.command("sweep", short_help="Many measurements from a plan, each recorded once.")(sweep.sweep)
app.command("plan", short_help="Which drafter, length and batch to use here.")(plan.plan)
app.command("tree", short_help="The draft tree with the most tokens per second.")(tree.tree)
app.command("doctor", short_help="Can these checkpoints be run, and together?")(doctor.doctor)
app.command("convert", short_help="Write a model as a GGUF file.")(convert.convert)
app.command("train", short_help="Train a drafter for a target.")(train.train)
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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # pressed once more, it ends at once, whatever is still being put away
    terminal.err.show_cursor()  # a progress bar that was interrupted while it was set up leaves it hidden
    print("\noutrider: interrupted", file=sys.stderr)
    raise SystemExit(INTERRUPTED) from None


def _wrong(sentence: object) -> NoReturn:
    print(f"outrider: {printable(str(sentence))}", file=sys.stderr)
    raise SystemExit(2) from None


def _unread() -> NoReturn:
    """The reader of our output went away: not an error of ours, and nothing more to say to it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0) from None


def _end(end: SystemExit) -> NoReturn:
    """typer turns Ctrl-C and a closed pipe into exit codes and says nothing."""
    if end.code == INTERRUPTED:
        _interrupted()
    if isinstance(end.__context__, BrokenPipeError):
        _unread()
    sys.stdout.flush()
    raise end


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short: Python's, or what PyTorch makes of it, which has no class of its own."""
    said = str(error).lower()
    short = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "unable to mmap")
    return isinstance(error, MemoryError) or any(words in said for words in short)


@cache
def command() -> Callable[..., object]:
    """What `app` builds of all commands and their options; calling `app` itself builds it anew for every line."""
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line. What transformers says to programmers is not shown, unless its own variable asks for it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported, which no command has done yet
    terminal.show_waiting()
    keep_interrupts()
    try:
        try:
            command()(prog_name="outrider")
        except SystemExit as end:
            _end(end)
    except OutriderError as error:
        _wrong(error)
    except KeyboardInterrupt:
        _interrupted()
    except BrokenPipeError:
        _unread()
    except (MemoryError, OSError, RuntimeError) as error:
        if out_of_memory(error):
            _wrong("out of memory: take a smaller model, fewer --slots or a shorter --max-length, or free memory")
        if not isinstance(error, OSError) or error.strerror is None:
            raise
        _wrong(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)


if __name__ == "__main__":
    main()
