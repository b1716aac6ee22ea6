"""What can go wrong for a user, in four kinds. Every message says what, where, and what to do about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class OutriderError(Exception):
    """Base of every error that is meant for a user. The command line prints it in one line and exits with 2."""


class ConfigError(OutriderError):
    """An option, a file or a checkpoint is wrong: nothing has been started."""


class CapabilityError(OutriderError):
    """Parts that do not fit together (a tree drafter on a target without trees, two vocabularies): said when an engine is built."""


class CapacityError(OutriderError):
    """Too little room: KV cache, context or memory."""


class RequestError(OutriderError):
    """One request cannot be served; its neighbours are not disturbed."""


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Others' text as it may be shown: commands to a terminal, turns of the direction and half characters are spelt out."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for an unknown option, key or name, naming the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return f"unknown {kind} {name!r}; {hint}"
