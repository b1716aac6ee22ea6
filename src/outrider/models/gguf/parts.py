"""Which files make one GGUF model: a single one, or the parts of a split set. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.config_keys import whole
from outrider.errors import ConfigError
from outrider.models.gguf.reader import Header, read_header

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MOST_PARTS = 1024


@dataclass(frozen=True, slots=True)
class Parts:
    """The headers of a model's files, in order; keys of the model are in the first."""

    headers: tuple[Header, ...]

    @property
    def path(self) -> Path:
        return self.headers[0].path

    @property
    def values(self) -> Mapping[str, Any]:
        return self.headers[0].values


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def only_file(folder: Path) -> Path | None:
    """The GGUF model of a folder that has no config.json, if it holds just one; the first part of a split set."""
    files = sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("mmproj"))
    if (folder / "config.json").is_file() or not files:
        return None
    firsts = {first_part(path) for path in files}
    if len(firsts) > 1:
        names = ", ".join(sorted(path.name for path in firsts)[:8])
        raise ConfigError(f"{folder} holds {len(firsts)} GGUF models ({names}): name one of the files")
    return firsts.pop()


def first_part(path: Path) -> Path:
    """The first file of the split set that a file belongs to, or the file itself."""
    named = _PART.fullmatch(path.name)
    return path if named is None else path.with_name(f"{named['stem']}-00001-of-{named['count']}{SUFFIX}")


def all_parts(path: Path) -> tuple[Path, ...]:
    """Every file of the model that `path` belongs to, by their names."""
    named = _PART.fullmatch(path.name)
    if named is None:
        return (path,)
    count = int(named["count"])
    if not 1 <= count <= MOST_PARTS:
        raise ConfigError(f"{path} names {count} parts, 1 to {MOST_PARTS} are possible: rename the files as they were")
    return tuple(path.with_name(f"{named['stem']}-{i:05}-of-{count:05}{SUFFIX}") for i in range(1, count + 1))


def read_parts(path: Path) -> Parts:
    """The headers of all files of the model that `path` belongs to. Raises ConfigError for a damaged or incomplete one."""
    paths = all_parts(path)
    for part in paths:
        if not part.is_file():
            raise ConfigError(f"{part} is missing, one of the {len(paths)} files of this model: download it too")
    headers = tuple(read_header(part) for part in paths)
    keys = headers[0].values
    count = whole(keys, "split.count", paths[0], default=1, least=0, most=1 << 16)
    if max(count, 1) != len(paths):
        raise ConfigError(
            f"{paths[0]} says that the model has {count} files, its name says {len(paths)}: name the files as they were, "
            "NAME-00001-of-0000N.gguf"
        )
    for number, header in enumerate(headers if len(paths) > 1 else ()):
        said = whole(header.values, "split.no", header.path, least=0, most=1 << 16)
        of = whole(header.values, "split.count", header.path, most=1 << 16)
        if (said, of) != (number, len(paths)):
            raise ConfigError(
                f"{header.path} is part {said + 1} of {of} and lies at place {number + 1} of {len(paths)}: "
                "these files do not belong together, download them again"
            )
    total = sum(len(header.tensors) for header in headers)
    expected = whole(keys, "split.tensors.count", headers[0].path, default=total, least=0)
    if len(paths) > 1 and expected != total:
        raise ConfigError(f"{paths[0]} and its parts hold {total} tensors of {expected}: download them again")
    return Parts(headers)
