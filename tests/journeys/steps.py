"""What journeys are made of: a documented command, run as a user runs it, and what must hold of every command whatever it does.

Runs with the interpreter of an installed wheel, outside the checkout; needs Python's own library alone.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = CHECKOUT / "docs"
BOXES = re.compile(r"[\u2500-\u259f\x1b]")
"""Lines and blocks that draw tables, and escape sequences: for a terminal, never for a pipe."""
PATIENCE = float(os.environ.get("JOURNEY_PATIENCE", "900"))
"""Seconds after which a command is taken to hang. No speed is judged."""


signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # what a shell runs in its background ignores Ctrl-C, and so would its children


class Friction(AssertionError):
    """Something that a user would stumble over."""


def need(holds: object, why: str) -> None:
    if not holds:
        raise Friction(why)


def documented(page: str, beginning: str) -> str:
    """The command of a page that begins so, without its comment."""
    path = CHECKOUT / page if page == "README.md" else PAGES / page
    for block in re.findall(r"```\w*\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line.removeprefix("$ ").startswith(beginning):
                return shlex.join(shlex.split(line.removeprefix("$ "), comments=True))
    raise Friction(f"{page} has no command {beginning!r}")


def python_of(page: str) -> list[str]:
    """The Python blocks of a page."""
    path = CHECKOUT / page if page == "README.md" else PAGES / page
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    line: str
    code: int
    out: str
    err: str

    def says(self, pattern: str) -> Done:
        need(
            re.search(pattern, self.out + self.err), f"{self.line}: nothing like {pattern!r} in\n{self.out}\n{self.err}"
        )
        return self

    def json(self) -> dict[str, Any]:
        """The one document on stdout."""
        return json.loads(self.out)


def words(line: str, more: str = "") -> list[str]:
    """A command's words: with sizes of its own where `more` names them again, and by this environment's program."""
    argv = shlex.split(f"{line} {more}")
    return [sys.executable, *argv[1:]] if argv[0] == "python" else argv


def run(line: str, more: str = "", *, code: int | tuple[int, ...] = 0, given: str = "", **variables: str) -> Done:
    """Run a command into pipes. more: smaller sizes, said besides. given: its standard input. variables: of its environment."""
    print(f"$ {line} {more}".rstrip(), flush=True)
    began = time.monotonic()
    done = subprocess.run(
        words(line, more),
        input=given,
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=PATIENCE,
    )
    print(f"  [{done.returncode}, {time.monotonic() - began:.1f} s]", flush=True)
    ended = Done(line, done.returncode, done.stdout, done.stderr)
    wanted = (code,) if isinstance(code, int) else code
    need(done.returncode in wanted, f"{line}: exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}")
    need("Traceback" not in done.stdout + done.stderr, f"{line}: a traceback\n{done.stderr}")
    need(
        not BOXES.search(done.stdout + done.stderr),
        f"{line}: writes boxes or colours into a pipe\n{done.stdout}\n{done.stderr}",
    )
    need(done.returncode != 2 or one_sentence(done), f"{line}: not one sentence\n{done.stdout}\n{done.stderr}")
    return ended


def one_sentence(done: Any) -> bool:
    """Whether a refusal is one line on stderr, or wrong usage as the parser says it, and nothing on stdout."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return not done.stdout and (
        (len(lines) == 1 and lines[0].startswith("outrider: ")) or lines[0].startswith("Usage: ")
    )


def refused(line: str, pattern: str, **variables: str) -> Done:
    """A command that must be refused in one sentence, before PyTorch is imported."""
    done = run(line, code=2, **variables).says(pattern)
    argv = words(line)
    program = [sys.executable, "-X", "importtime", "-m", "outrider", *argv[1:]]
    loaded = subprocess.run(
        program, capture_output=True, text=True, env={**os.environ, **variables}, timeout=PATIENCE
    ).stderr
    need(not re.search(r"\| +torch$", loaded, flags=re.MULTILINE), f"{line}: refused only after torch was imported")
    return done


def terminal(line: str, more: str = "", columns: int = 80, code: tuple[int, ...] = (0,)) -> str:
    """Run a command on a terminal of so many columns; no line may be longer, and no word of a heading be cut."""
    print(f"$ {line} {more}   (on a terminal of {columns} columns)", flush=True)
    main, side = pty.openpty()
    env = {**os.environ, "COLUMNS": str(columns), "LINES": "40", "TERM": "xterm-256color"}
    child = subprocess.Popen(words(line, more), stdin=side, stdout=side, stderr=side, env=env)
    os.close(side)
    seen, end = b"", time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if select.select([main], [], [], 1.0)[0]:
            try:
                part = os.read(main, 65536)
            except OSError:  # the other side is closed
                break
            seen += part
            if not part:
                break
    need(child.wait(timeout=30) in code, f"{line}: exit code {child.returncode}\n{seen.decode(errors='replace')}")
    os.close(main)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\].*?\x07", "", seen.decode("utf-8", "replace"))
    for shown in re.split(r"[\r\n]+", text):
        need(len(shown.rstrip()) <= columns, f"{line}: a line of {len(shown)} characters: {shown!r}")
    return text


def get(url: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """Status and body of a request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@contextmanager
def served(line: str, more: str = "", **variables: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server that says where it is: its address answers from then on. It is ended by Ctrl-C if it still runs."""
    print(f"$ {line} {more} &", flush=True)
    child = subprocess.Popen(
        words(line, more), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, **variables}
    )
    try:
        assert child.stderr is not None
        said = ""
        for text in child.stderr:
            said += text
            if found := re.search(r"http://[\w.:\[\]]+", text):
                yield found.group().rstrip("."), child
                break
        else:
            raise Friction(f"{line}: it ended before it said where it is\n{said}")
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
        try:
            child.wait(timeout=120)
        except subprocess.TimeoutExpired:
            child.kill()
        child.stderr.close()  # type: ignore[union-attr]


def journey(name: str, *stages: Callable[[], None]) -> None:
    """Walk the stages, or those that the command line names."""
    need(not Path.cwd().is_relative_to(CHECKOUT), "a journey starts outside the checkout")
    known = {stage.__name__: stage for stage in stages}
    for wanted in sys.argv[1:] or known:
        print(f"-- {name}: {wanted}", flush=True)
        known[wanted]()
    print(f"{name}: walked with Python {sys.version.split()[0]}")
