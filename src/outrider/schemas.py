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
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"})
"""Keywords whose values are schemas by the names of a user: a property called "enum" is a name there, and no keyword."""
_AROUND = re.compile(r"\(\?<?[=!]|\\[1-9]")
"""What no automaton can follow in a pattern: looking around, and what was matched before."""


def without_other_formats(schema: Any) -> Any:
    """A schema without the formats that are not known, which JSON Schema takes for notes (2020-12, validation, 7.2.1): such as
    `path` and `password`, which libraries write for their types."""
    return _without(schema, lambda key, value: key == "format" and isinstance(value, str) and value not in FORMATS)


def without_looking_around(schema: Any) -> Any:
    """A schema without the patterns that look around, such as those that libraries write for addresses."""
    return _without(
        schema, lambda key, value: key == "pattern" and isinstance(value, str) and bool(_AROUND.search(value))
    )


def _without(schema: Any, left_out: Callable[[str, Any], bool]) -> Any:
    """A schema, or a list of some, without the keywords that `left_out` says of (keyword, value)."""
    if isinstance(schema, list):
        return [_without(part, left_out) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _value(key, value, left_out) for key, value in schema.items() if not left_out(key, value)}


def _value(key: str, value: Any, left_out: Callable[[str, Any], bool]) -> Any:
    """The value of a keyword, in which the same is left out where it holds schemas."""
    if key in _DATA:
        return value
    if key in _NAMED and isinstance(value, dict):
        lost = {name for name in value if key == "patternProperties" and left_out("pattern", name)}
        return {name: _without(part, left_out) for name, part in value.items() if name not in lost}
    return _without(value, left_out)
