"""Values in the text of a call: the extent of a JSON value that is still being written, raw text typed by a schema, and the
notations of Python and of Gemma."""

from __future__ import annotations

import ast
import json
import math
import re
from typing import Any

DEPTH = 64
"""Deepest nesting that is read."""
_HALVES = re.compile(r"\\u[dD][89a-fA-F]")
"""What may be half a surrogate pair, in JSON."""


class Extent:
    """Follows a JSON value, character by character, to its end."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = self._escaped = self._begun = False
        self.done = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the value. `done`: it has ended there."""
        for i, char in enumerate(text):
            if self._string:
                self._in_string(char)
                if self.done:
                    return i + 1
            elif char == '"':
                self._string = self._begun = True
            elif char in "{[":
                self._depth, self._begun = self._depth + 1, True
            elif char in "}]":
                if not self._depth:
                    self.done = True  # it ends a bare value's surroundings
                    return i
                self._depth -= 1
                if not self._depth:
                    self.done = True
                    return i + 1
            elif not self._depth and self._begun and char in ", \t\r\n":
                self.done = True
                return i
            elif not char.isspace():
                self._begun = True
        return len(text)

    def _in_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._string = False
            self.done = not self._depth


def types_of(schema: Any) -> tuple[str, ...]:
    """The JSON types that a schema names, in its order; none if it does not say."""
    if not isinstance(schema, dict):
        return ()
    named = schema.get("type")
    out = (
        [named]
        if isinstance(named, str)
        else [t for t in named if isinstance(t, str)]
        if isinstance(named, list)
        else []
    )
    for union in ("anyOf", "oneOf"):
        for branch in schema.get(union) or () if isinstance(schema.get(union), list) else ():
            out += types_of(branch)
    return tuple(dict.fromkeys(out))


_PYTHON = {"boolean": bool, "array": list, "object": dict, "null": type(None)}


def typed(raw: str, schema: Any) -> Any:
    """A parameter written as raw text, as its schema types it: the text itself unless another type fits."""
    types = types_of(schema)
    if "string" in types and not (set(types) - {"string", "null"}):
        return None if "null" in types and raw.strip() == "null" else raw
    try:
        value = said(raw)
    except (ValueError, RecursionError):
        lowered = raw.strip().lower()
        if "boolean" in types and lowered in ("true", "false"):
            return lowered == "true"
        return None if "null" in types and lowered in ("null", "none") else raw
    if not types:
        return value
    return value if any(_fits(value, name) for name in types) else raw


def said(raw: str) -> Any:
    """A JSON value that a model or a client has written, so that it can be written again: a number that no float holds (1e400)
    stands as its text, half a surrogate pair as U+FFFD. Raises ValueError or RecursionError for other text."""
    value = json.loads(raw, parse_constant=str, parse_float=_held)
    if not _HALVES.search(raw):
        return value
    return json.loads(
        json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )


def arguments(text: str | None) -> dict[str, Any]:
    """The arguments of a call; none where the text is no JSON object, as that of a call that was cut."""
    try:
        found = said(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _held(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text


def _fits(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (name == "number" or isinstance(value, int) or value.is_integer())
    return isinstance(value, str) if name == "string" else isinstance(value, _PYTHON.get(name, object))


def python_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Calls written as a Python list, `[f(a=1), g()]`: literals only, nothing is evaluated. Raises ValueError for other text."""
    try:
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError:  # some templates write line breaks into strings as they are
            tree = ast.parse(text.strip().replace("\n", "\\n"), mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        out = []
        for node in nodes:
            if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
                raise ValueError("not a call with named arguments")
            out.append((ast.unparse(node.func), {str(k.arg): _literal(k.value) for k in node.keywords}))
        return out
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:  # TypeError: a key that cannot be one
        raise ValueError(str(error)) from None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return json.loads(node.id)
    value = ast.literal_eval(node)
    if not _is_json(value):
        raise ValueError("not a JSON value")
    return said(json.dumps(value))


def _is_json(value: Any, depth: int = 0) -> bool:
    if depth > DEPTH or (isinstance(value, float) and not math.isfinite(value)):
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return all(_is_json(v, depth + 1) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


class Bare:
    """Reads Gemma's notation: bare keys, and strings between `quote` marks: `{k:<|"|>v<|"|>,n:2}`."""

    def __init__(self, text: str, quote: str) -> None:
        self._text, self._quote, self._at = text, quote, 0

    def read(self) -> dict[str, Any]:
        """The object that is the whole text. Raises ValueError for other text."""
        out = self._value(0)
        if self._text[self._at :].strip() or not isinstance(out, dict):
            raise ValueError("not an object")
        return out

    def _value(self, depth: int) -> Any:
        if depth > DEPTH:
            raise ValueError("too deep")
        if self._take(self._quote):
            end = self._text.find(self._quote, self._at)
            if end < 0:
                raise ValueError("a text without its end")
            found, self._at = self._text[self._at : end], end + len(self._quote)
            return found
        if self._take("{"):
            return dict(self._pairs(depth))
        if self._take("["):
            return self._items(depth)
        end = self._at
        while end < len(self._text) and self._text[end] not in ",]}":
            end += 1
        raw, self._at = self._text[self._at : end].strip(), end
        return said(raw)

    def _pairs(self, depth: int) -> list[tuple[str, Any]]:
        out: list[tuple[str, Any]] = []
        while not self._take("}"):
            if out and not self._take(","):
                raise ValueError("a comma is missing")
            if self._take(self._quote):
                end = self._text.find(self._quote, self._at)
                key, self._at = self._text[self._at : end], end + len(self._quote)
                if end < 0 or not self._take(":"):
                    raise ValueError("a key without its value")
            else:
                end = self._text.find(":", self._at)
                if end < 0:
                    raise ValueError("a key without its value")
                key, self._at = self._text[self._at : end].strip(), end + 1
            out.append((key, self._value(depth + 1)))
        return out

    def _items(self, depth: int) -> list[Any]:
        out: list[Any] = []
        while not self._take("]"):
            if out and not self._take(","):
                raise ValueError("a comma is missing")
            out.append(self._value(depth + 1))
        return out

    def _take(self, mark: str) -> bool:
        if self._text.startswith(mark, self._at):
            self._at += len(mark)
            return True
        return False
