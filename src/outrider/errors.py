"""The errors for users, in four kinds. Every message says what is wrong, where, and how to fix it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class OutriderError(Exception):
    """Base of every error for users. The command line prints it in one line and exits with 2."""


class ConfigError(OutriderError):
    """An option, a file or a checkpoint is wrong; raised before anything is started."""


class CapabilityError(OutriderError):
    """Parts do not fit together (a tree drafter on a target without trees, two vocabularies); raised when an engine is built."""


class CapacityError(OutriderError):
    """Too little space: KV cache, context or memory."""


class RequestError(OutriderError):
    """One request cannot be served; others are not affected."""


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Untrusted text made safe to print: terminal commands, changes of text direction and incomplete characters are escaped."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for an unknown option, key or name, naming the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return f"unknown {kind} {name!r}; {hint}"
