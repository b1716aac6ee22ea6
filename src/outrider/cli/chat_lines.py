"""What a user types into `outrider chat`: lines and blocks, those typed before, and commands."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from outrider.cli import terminal
from outrider.errors import OutriderError

BLOCK = '"""'
"""Begins and ends a text of several lines."""
KEPT = 1000
"""Lines of the history that are kept."""
CONTINUED = "... "
"""Before the further lines of a text."""
T = TypeVar("T", int, float)


def history_file() -> Path:
    """Where lines typed before are kept: below XDG_STATE_HOME, else ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "outrider" / "chat_history"


@contextmanager
def edited_lines(path: Path) -> Iterator[None]:
    """Arrow keys, and the lines typed before, kept in a file that only its owner may read: in a terminal, where Python was built
    with readline. A file that cannot be read or written costs the history alone."""
    try:
        import readline
    except ImportError:
        readline = None
    if readline is None or not sys.stdin.isatty():
        yield
        return
    readline.set_history_length(KEPT)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


class _Dropped(Exception):
    """Ctrl-C ended a line in which something was typed."""


def read_text() -> str | None:
    """What the user says, None at the end of input: a line; lines that end in a backslash, and the one behind them; or a block
    between two BLOCKs. Ctrl-C drops what was typed; where nothing was, KeyboardInterrupt is raised when it is pressed again."""
    asked = False
    while True:
        try:
            return _text()
        except _Dropped:
            asked = False
            terminal.err.print()
        except KeyboardInterrupt:
            if asked or not sys.stdin.isatty():
                raise
            asked = True
            terminal.err.print("\n[dim](Ctrl-C again ends, as do Ctrl-D and /quit)[/dim]")


def _text() -> str | None:
    line = _line("> ")
    if line is None:
        return None
    if line.lstrip().startswith(BLOCK):
        return _block(line.lstrip()[len(BLOCK) :])
    while line.endswith("\\") and (more := _line(CONTINUED)) is not None:
        line = f"{line[:-1]}\n{more}"
    return line


def _block(first: str) -> str:
    lines, line = [], first
    while not line.rstrip().endswith(BLOCK):
        lines.append(line)
        if (more := _line(CONTINUED)) is None:
            return "\n".join(lines)
        line = more
    return "\n".join([*lines, line.rstrip()[: -len(BLOCK)]]).strip("\n")


def _line(prompt: str) -> str | None:
    try:
        return input(prompt if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        readline = sys.modules.get("readline")  # which still has what the interrupted line was
        if sys.stdin.isatty() and (prompt == CONTINUED or (readline is not None and readline.get_line_buffer())):
            raise _Dropped from None
        raise


@runtime_checkable
class Talk(Protocol):
    """What commands show and change of a conversation, see `cli.chat.Conversation`."""

    system: str | None
    params: Any
    images: list[Path]

    def clear(self) -> None:
        """Start over."""
        ...

    def instruct(self, system: str | None) -> None:
        """Another system message."""
        ...

    def show(self, images: Sequence[Path]) -> None:
        """Show these with the next message."""
        ...

    def stats(self) -> str:
        """Figures so far."""
        ...


@dataclass(frozen=True, slots=True)
class Command:
    """run: gets what stands behind the name, and returns what to say. None: ends the conversation."""

    usage: str
    help: str
    run: Callable[[Talk, str], str] | None


def _clear(talk: Talk, _: str) -> str:
    talk.clear()
    return "the conversation starts over"


def _system(talk: Talk, text: str) -> str:
    if text:
        talk.instruct(None if text == "-" else text)
    return f"system message: {talk.system or 'none'}"


def _temperature(talk: Talk, text: str) -> str:
    if text:
        value = _number(float, text, "a temperature is a number, as in /temperature 0.7")
        talk.params = replace(talk.params, temperature=value)
    return f"temperature {talk.params.temperature:g}"


def _draft(talk: Talk, text: str) -> str:
    if text:
        words, otherwise = (
            {"on": None, "off": 0},
            "say /draft on, /draft off, or the most tokens of a draft, as in /draft 2",
        )
        length = words[text] if text in words else _number(int, text, otherwise)
        talk.params = replace(talk.params, draft_length=length)
    most = talk.params.draft_length
    return "drafts are on" if most is None else f"drafts of at most {most} tokens" if most else "drafts are off"


def _image(talk: Talk, text: str) -> str:
    if not text:
        raise OutriderError("name the file of a picture, as in /image photo.png")
    talk.show([Path(text)])
    return f"the next message shows {', '.join(str(path) for path in talk.images)}"


def _stats(talk: Talk, _: str) -> str:
    return talk.stats()


def _help(talk: Talk, _: str) -> str:
    width = max(len(c.usage) for c in COMMANDS.values())
    lines = [f"  {c.usage:{width}}  {c.help}" for c in COMMANDS.values()]
    more = f"{BLOCK} begins and ends a text of several lines; a line that ends in \\ goes on"
    return "\n".join(["commands:", *lines, f"  {more}", "  // begins a text that begins with /"])


def _number(kind: Callable[[str], T], text: str, otherwise: str) -> T:
    try:
        return kind(text)
    except ValueError:
        raise OutriderError(otherwise) from None


COMMANDS: Mapping[str, Command] = {
    "/help": Command("/help", "these lines", _help),
    "/system": Command("/system [TEXT]", "set the system message (- for none), or show it", _system),
    "/temperature": Command("/temperature [T]", "set the temperature, or show it", _temperature),
    "/draft": Command("/draft [on|off|N]", "drafts of at most N tokens, or show it", _draft),
    "/image": Command("/image FILE", "a picture for the next message, if the target reads them", _image),
    "/stats": Command("/stats", "speed, acceptance and context of the conversation so far", _stats),
    "/clear": Command("/clear", "start over", _clear),
    "/quit": Command("/quit", "end, as /exit and Ctrl-D", None),
}
"""By the first word of a line."""
ENDS = ("/quit", "/exit")


def obey(talk: Talk, line: str) -> str | None:
    """What a command answers; None where the line is none. A name that is not there is said, not sent to the model."""
    name, _, rest = line.strip().partition(" ")
    if not name.startswith("/") or name.startswith("//") or "/" in name[1:]:  # a path is a text
        return None
    found = COMMANDS.get(name)
    if found is None or found.run is None:
        near = get_close_matches(name, COMMANDS, n=1)
        return f"there is no command {name[:40]!r}" + (f", did you mean {near[0]}?" if near else "; /help lists them")
    try:
        return found.run(talk, rest.strip())
    except OutriderError as error:
        return str(error)
