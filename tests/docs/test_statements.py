"""What the pages say of the interface holds: names that can be imported, options that commands have, and Python that runs."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from outrider.cli.main import app
from tests.serve.harness import serving

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PAST = "log.md"
"""The page of experiments says what was, not what is."""
EXECUTED = {"README.md", "api.md", "images.md", "serve.md", "watch.md"}
"""Pages whose Python is run by a test: `test_examples`, `evaluate/test_images`, the last one here, and tests/watch."""


def names(page: Path) -> set[str]:
    """Dotted names below `outrider` that a page puts in backticks or imports."""
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(r"`(outrider(?:\.[A-Za-z_]\w*)+)", text))
    for module, what in re.findall(r"from (outrider[\w.]*) import ([\w, ]+)", text):
        found |= {f"{module}.{name.strip()}" for name in what.split(",") if name.strip()}
    return found


def resolve(name: str) -> object:
    """The object of a dotted name; raises AttributeError or ImportError."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != PAST], ids=lambda p: p.name)
def test_names_in_the_pages_are_there(page: Path) -> None:
    for name in names(page):
        resolve(name)


def lines(page: Path) -> Iterator[list[str]]:
    """The words of every line of a page's blocks that calls `outrider`."""
    for block in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("outrider "):
                yield shlex.split(line, comments=True)[1:]


COMMAND = typer.main.get_command(app)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that a line names, and its other words."""
    found: Any = COMMAND
    while hasattr(found, "commands") and words and not words[0].startswith("-"):
        assert words[0] in found.commands, words
        found, words = found.commands[words[0]], words[1:]
    return found, words


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != PAST], ids=lambda p: p.name)
def test_options_in_the_pages_are_there(page: Path) -> None:
    for words in lines(page):
        words = words[: next((i for i, w in enumerate(words) if w in ("&&", "|", ";", ">")), len(words))]
        found, rest = command_of(words)
        known = {o for p in found.params for o in (*p.opts, *p.secondary_opts)} | {"-h", "--help", "--version"}
        for word in rest:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in known, f"{page.name}: {' '.join(words)}: {word}"


def test_every_page_with_python_is_run() -> None:
    having = {p.name for p in PAGES if "```python" in p.read_text(encoding="utf-8")}
    assert having == EXECUTED


def test_the_python_of_the_page_on_serving_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "serve.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert block is not None
    space: dict[str, Any] = {}
    with serving() as server:
        exec(compile(block.group(1).replace("http://127.0.0.1:8000", server.url), "docs/serve.md", "exec"), space)
        space["client"].close()  # as the end of a program does
    assert len(capsys.readouterr().out.splitlines()) >= 2
