"""Prompts of an editor: a function, an instruction to write it again with a change, and the beginning of the answer.

    python benchmarks/editing.py edits.jsonl                                 # one prompt a line
    outrider bench --preset untrained --prompts edits.jsonl --max-tokens 96  # how drafts that copy do on them

The functions come from files of Python's standard library that the shipped pair never saw: those held out by its recipe.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from outrider.train import data

SIZES = (400, 1400)
"""Characters of a function that is edited: longer than a draft, and twice of it fits into the shipped target's context."""


def functions(text: str) -> Iterator[ast.FunctionDef]:
    """Functions at the top of a file, and methods of its classes."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in tree.body:
        yield from (
            f for f in (node.body if isinstance(node, ast.ClassDef) else (node,)) if isinstance(f, ast.FunctionDef)
        )


def task(text: str, function: ast.FunctionDef) -> str | None:
    """The prompt for a function: its first argument is to be renamed. None if it is too short, too long, takes nothing,
    or has a head of several lines."""
    source = ast.get_source_segment(text, function)
    arguments = [a.arg for a in function.args.args if a.arg not in ("self", "cls")]
    if (
        source is None
        or not arguments
        or not source.splitlines()[0].endswith(":")
        or not SIZES[0] <= len(source) <= SIZES[1]
    ):
        return None
    old, new = arguments[0], f"{arguments[0]}_value"
    head = re.sub(rf"\b{re.escape(old)}\b", new, source.splitlines()[0])
    return f"{source}\n\n\n# The same function; its argument {old} is now called {new}.\n{head}\n"


def tasks(source: Path) -> list[str]:
    """At most three tasks of each held-out file, in the files' order."""
    _, held_out = data.split(data.deduplicate(data.find_documents(source)))
    return [
        prompt for d in held_out for prompt in islice(filter(None, (task(d.text, f) for f in functions(d.text))), 3)
    ]


def main() -> None:
    """Write the prompts."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("out", type=Path, help="JSON lines to write")
    ask.add_argument(
        "--source", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of Python files"
    )
    given = ask.parse_args()
    prompts = tasks(given.source)
    given.out.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
    print(f"{len(prompts)} tasks in {given.out}")


if __name__ == "__main__":
    main()
