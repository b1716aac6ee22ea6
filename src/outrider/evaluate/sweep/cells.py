"""A cell of a sweep: what is measured, as plain data, and the name under which its result is known for ever.

The identity of a cell is the SHA-256 of its fields, of the code that measures it, and of the data that it reads. So a result that a
store has is never measured again, and one of other code or other data is never mistaken for it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import outrider
from outrider.errors import ConfigError
from outrider.evaluate.store.store import canonical
from outrider.files import sha256_of

CONTENT = ("*.safetensors", "*.gguf", "*.json", "*.jsonl", "*.model", "*.jinja", "*.txt")
"""Files of a folder that results depend on."""


class Mismatch(ConfigError):
    """A worker has other code or other data than the driver that sent it the cell."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a cell found. result: the same wherever and whenever it is performed; counts: its share of the ledger, in `result`'s
    sense; measured: seconds and whatever depends on them, None where nothing does."""

    result: dict[str, Any]
    counts: dict[str, Any]
    measured: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of cell. fields: its schema. alone: whether it must have its machine to itself. reads: files and folders that
    decide its result. perform: does it. headline: a sentence about its record. finish: called in the driver with the fields of
    every cell that is done, at the end of a run: what is left to do when all parts are there; returns sentences."""

    name: str
    fields: type[BaseModel]
    alone: Callable[[Any], bool]
    reads: Callable[[Any], Iterable[Path]]
    perform: Callable[[Any], Answer]
    headline: Callable[[Mapping[str, Any]], str]
    finish: Callable[[list[Any]], list[str]] = lambda done: []


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a plan. number: its place there. fields: as checked, defaults filled in, `kind` among them. threads: that it
    computes with; None: all of a machine's."""

    number: int
    label: str
    fields: dict[str, Any]
    alone: bool
    threads: int | None
    code: str
    data: str

    @property
    def identity(self) -> str:
        """[64 hex digits]"""
        return identity(self.fields, self.code, self.data)

    def job(self, folder: Path, threads: int) -> dict[str, Any]:
        """What a worker is sent. folder: where relative paths begin."""
        return {"fields": self.fields, "code": self.code, "data": self.data, "folder": str(folder), "threads": threads}


def identity(fields: Mapping[str, Any], code: str, data: str) -> str:
    """The SHA-256 of the canonical JSON of a cell, its code and its data."""
    return hashlib.sha256(canonical({"cell": fields, "code": code, "data": data}).encode()).hexdigest()


@cache
def code_version() -> str:
    """The release, and a digest of the sources that are installed: two machines of one release may still differ."""
    root = Path(outrider.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for kind in ("*.py", "*.cpp", "*.h") for p in root.rglob(kind)):
        digest.update(f"{path.relative_to(root).as_posix()} {sha256_of(path)};".encode())
    return f"{outrider.__version__}+{digest.hexdigest()[:16]}"


def data_of(paths: Iterable[Path]) -> str:
    """A digest of what files and folders hold, whatever they are called. Raises ConfigError for one that is not there."""
    return hashlib.sha256("".join(_digest(path) for path in paths).encode()).hexdigest()


def _digest(path: Path) -> str:
    if path.is_file():
        return _known(path, path.stat().st_size, path.stat().st_mtime_ns)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a pipe, and every cell reads it anew: write it to a file, and name that")
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder; paths of a plan begin where the command is run")
    files = sorted(p for kind in CONTENT for p in path.rglob(kind) if p.is_file())
    parts = [f"{p.relative_to(path).as_posix()} {_digest(p)};" for p in files]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@cache
def _known(path: Path, size: int, changed: int) -> str:
    """The digest of a file, read again only when its size or its time has changed."""
    return sha256_of(path)


_WORDS = re.compile(r"[\w,.=-]+:")


def folders_in(spec: str) -> list[Path]:
    """The folders that a --draft names, as in "ngram+dynamic:16:eagle:models/eagle"; companions lie in the target's folder."""
    found = []
    for part in spec.split("+"):
        while not Path(part).expanduser().is_dir() and (word := _WORDS.match(part)):
            part = part[word.end() :]
        if part and Path(part).expanduser().is_dir():
            found.append(Path(part).expanduser())
    return found
