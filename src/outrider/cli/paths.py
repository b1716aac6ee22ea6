"""Options that name files and models, looked at before anything heavy is imported: a mistyped path is said at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError, unknown_name
from outrider.options import DRAFTERS, EXACT_RULES, LOSSY_RULES, PART

_HOW = re.compile(r"(?:[\w,]+:)*")
"""Words before a path, each with a colon behind it: how drafts grow, and what kind of drafter the path holds."""
_LOCAL = (".", "/", "~")
"""How a path begins that can be nothing but a path."""


def model(name: str | None) -> str | None:
    """A folder that is there, or what may be a Hub name. Raises ConfigError for a path that leads nowhere."""
    if name is not None:
        from outrider.models.folder import require_config, resolve_folder

        require_config(resolve_folder(name))
    return name


def drafter(spec: Any) -> Any:
    """A drafter, or several, whose paths lead somewhere. What is no path is looked at when it is loaded."""
    from difflib import get_close_matches

    for one in [spec] if isinstance(spec, str) else spec or ():
        rest = one
        while head := PART.match(rest):
            rest = rest[head.end() :]
        path = _HOW.sub("", rest, count=1)
        if path.startswith(_LOCAL) and not Path(path).expanduser().exists():
            raise ConfigError(f"--draft: there is no {path}: give a folder, a Hub name, or none, ngram or auto")
        if path not in DRAFTERS and get_close_matches(path, DRAFTERS, cutoff=0.7) and not Path(path).exists():
            raise ConfigError(unknown_name("drafter", path, DRAFTERS))
    return spec


def rule(spec: Any) -> Any:
    """A verification rule that there is. What stands behind its name is looked at when it is loaded."""
    known, name = ("auto", *EXACT_RULES, *LOSSY_RULES), str(spec).partition(":")[0]
    if name not in known:
        raise ConfigError(unknown_name("rule", name, known))
    return spec


def readable(given: Any) -> Any:
    """Files (or folders) that are there and may be read. Raises ConfigError for the first that is not."""
    for path in [given] if isinstance(given, str | Path) else given or ():
        if not Path(path).exists():
            raise ConfigError(f"{path}: no such file; check the path")
        if not os.access(path, os.R_OK):
            raise ConfigError(f"{path} may not be read: change its permissions, or name another")
    return given


def file(given: Path | None) -> Path | None:
    """A file that is there, is no folder and may be read."""
    if given is not None and given.is_dir():
        raise ConfigError(f"{given} is a folder: name a file in it")
    return readable(given)


def writable(given: Path | None) -> Path | None:
    """A file or folder that can be written once the work is done: nobody should learn at the end that it cannot."""
    if given is None:
        return None
    place = next((p for p in (given, *given.absolute().parents) if p.exists()), Path("/"))
    if place != given and not place.is_dir():
        raise ConfigError(f"{given} cannot be written: {place} is a file, not a folder")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"{given} cannot be written: you may not write to {place}; name another place")
    return given


def out_folder(given: Path | None) -> Path | None:
    """A folder that can be written; it need not be there."""
    if given is not None and given.exists() and not given.is_dir():
        raise ConfigError(f"{given} is a file: name a folder")
    return writable(given)


def out_file(given: Path | None) -> Path | None:
    """A file that can be written."""
    if given is not None and given.is_dir():
        raise ConfigError(f"{given} is a folder: name a file in it")
    return writable(given)


def needs(extra: str, modules: Iterable[str]) -> None:
    """ConfigError unless all of an extra's packages are installed; nothing is imported."""
    from importlib.util import find_spec

    absent = [name for name in modules if find_spec(name) is None]
    if absent:
        raise ConfigError(f"this needs {', '.join(absent)}: pip install 'outrider[{extra}]'")
