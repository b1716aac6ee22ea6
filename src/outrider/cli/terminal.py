"""What commands print: for people as text, never as markup or as commands to the terminal; for programs as one JSON document."""

from __future__ import annotations

import json
import logging
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console as RichConsole
from rich.text import Text

from outrider.errors import printable
from outrider.progress import bar

PIPE = 4096
"""Columns of a line that nobody looks at in a window: it is never broken."""
_TAG = re.compile(r"\[(/?)(dim|bold red|bold|green)\]")
"""The only tags that are read, and only in what this program prints itself: a name in square brackets is a name."""


class Console(RichConsole):
    """rich's console, whose tables hold any text: no tag but our own few is read, none in a cell, and none is an error."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"emoji": False, **options})

    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        """A string as it is shown. rich hands a highlighter along with what is printed, and none with what is in a table."""
        text = printable(text)
        if options.get("highlighter") is None:
            return super().render_str(text, *args, **{**options, "markup": False, "emoji": False})
        out, styles, at = Text(), list[str](), 0
        for tag in _TAG.finditer(text):
            out.append(text[at : tag.start()], " ".join(styles))
            at = tag.end()
            if not tag[1]:
                styles.append(tag[2])
            elif tag[2] in styles:
                styles.remove(tag[2])
        return out.append(text[at:], " ".join(styles))


def console(*, stderr: bool = False) -> Console:
    """Where people read: as wide as their terminal; into a pipe or a file neither colour nor line breaks of ours."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        return Console(stderr=stderr, highlight=False, width=PIPE, color_system=None, force_terminal=False)
    return console


def pair(name: str, text: str) -> None:
    """A name and what belongs to it, on stdout; what is too long for the terminal goes on below itself."""
    out, first = console(), f"{name:12} "
    out.print(textwrap.fill(text, out.width, initial_indent=first, subsequent_indent=" " * len(first),
                            break_long_words=False, break_on_hyphens=False), markup=False)  # fmt: skip


def plain(console: RichConsole) -> bool:
    """Whether what is written goes into a pipe or a file."""
    return not console.is_terminal


err = console(stderr=True)


def say(text: str) -> None:
    """One dim line on stderr."""
    err.print(f"outrider: {text}", style="dim", markup=False)


class _Saying(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def show_waiting() -> None:
    """Say from now on what takes long and is done once, such as compiling."""
    waiting = logging.getLogger("outrider.waiting")
    if not any(isinstance(one, _Saying) for one in waiting.handlers):
        waiting.addHandler(_Saying())
    waiting.setLevel(logging.INFO)
    waiting.propagate = False  # `serve --log-level info` would say it twice


_UNSEEN = re.compile(r"[\x7f-\x9f\ud800-\udfff]")
"""What JSON may hold as it is and a terminal or an encoding may not: written as JSON's escapes."""


def print_json(document: dict[str, Any]) -> None:
    """The one JSON document of a command; numbers that JSON does not have become null."""
    text = json.dumps(clean(document), indent=2, ensure_ascii=False)
    typer.echo(_UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def clean(value: Any) -> Any:
    """Plain data in which null stands for NaN and infinities, which JSON does not have and many readers refuse."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value


@contextmanager
def loading(text: str) -> Iterator[Any]:
    """A progress bar on stderr while something loads; yields `progress(fraction)`. Vanishes when done; a pipe gets none."""
    if plain(err):
        yield lambda fraction: None
        return
    with bar(text, err) as tell:
        yield tell


def counter(progress: Callable[[float], None], total: int) -> Callable[..., None]:
    """A function that moves a progress bar on by one of `total`, whatever it is told."""
    done = [0]

    def tick(_: object = None) -> None:
        done[0] += 1
        progress(done[0] / total)

    return tick
