"""JSON schemas of users, before grammars are made of them: what a grammar cannot hold, and a schema does not need."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

FORMATS = frozenset({
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown",
})  # fmt: skip
"""Formats of texts that llguidance holds; it refuses a schema with another one."""
_DATA = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose values are data, in which nothing is a keyword."""
_AROUND = re.compile(r"\(\?<?[=!]|\\[1-9]")
"""What no automaton can follow in a pattern: looking around, and what was matched before."""


def without_other_formats(schema: Any) -> Any:
    """A schema without the formats that are not known, which JSON Schema takes for notes (2020-12, validation, 7.2.1): such as
    `path` and `password`, which libraries write for their types."""
    return _without(schema, lambda key, value: key == "format" and isinstance(value, str) and value not in FORMATS)


def without_looking_around(schema: Any) -> Any:
    """A schema without the patterns that look around, such as those that libraries write for addresses."""
    return _without(schema, lambda key, value: key == "pattern" and isinstance(value, str) and bool(_AROUND.search(value)))


def _without(schema: Any, left_out: Callable[[str, Any], bool]) -> Any:
    if isinstance(schema, list):
        return [_without(part, left_out) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "patternProperties" and isinstance(value, dict):
            value = {name: part for name, part in value.items() if not left_out("pattern", name)}
        if not left_out(key, value):
            out[key] = value if key in _DATA else _without(value, left_out)
    return out
