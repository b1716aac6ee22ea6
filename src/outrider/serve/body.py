"""Request bodies: limits on their size, their time and the number of their values, checked before they are parsed."""

from __future__ import annotations

import asyncio
import json
import re
from math import isfinite
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from outrider.serve.parsing import BadField

DEPTH = 32
"""Deepest nesting of lists and objects in a body."""
CONTAINERS = 20_000
"""Most lists and objects in a body: parsing JSON blocks every thread, for seconds if a body has very many."""
KEYS = 4096
"""Most keys of an object."""
TOGETHER = 64 << 20
"""Bytes of bodies held at once, before their requests have a place; beyond this, bodies above SMALL are refused."""
SMALL = 1 << 16
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # an unclosed string extends to the end: linear time
_BRACKETS = re.compile(rb"[\[\]{}]")
_HALVES = re.compile(rb"\\u[dD][89a-fA-F]")
"""Escapes of halves of surrogate pairs: two of them are a character, and one alone is none."""


class Bodies:
    """The bodies that one server is reading. limit: bytes of one. seconds: time one may take. held: bytes of all of them."""

    def __init__(self, limit: int, seconds: float) -> None:
        self.limit, self.seconds, self.held = limit, seconds, 0

    async def read(self, request: Request, values: int, least: int = 0) -> Any:
        """The JSON body. Raises HTTPException for another content type, for a body above `limit` bytes (`least`, if more) or
        slower than `seconds`, and while too many others are held; BadField for bad JSON, or for more than `values` values in it.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "send the body as application/json")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "send the body without content-encoding")
        data, limit = bytearray(), max(self.limit, least)
        try:
            async with asyncio.timeout(self.seconds):
                async for part in request.stream():
                    data += part
                    self.held += len(part)
                    if len(data) > limit:
                        raise HTTPException(413, f"the body is larger than {limit} bytes: make the request smaller")
                    if self.held > TOGETHER and len(data) > SMALL:
                        raise HTTPException(503, "too many large requests at once: try again", {"retry-after": "5"})
        except TimeoutError:
            raise HTTPException(408, f"the body took longer than {self.seconds:g} seconds") from None
        finally:
            self.held -= len(data)
        if len(data) > self.limit and data.count(b'"') + data.count(b"\\") > self.limit:  # what strings take time for
            raise HTTPException(413, f"besides its images the body is larger than {self.limit} bytes: make it smaller")
        return parsed(bytes(data), values)


def parsed(data: bytes, values: int) -> Any:
    """The value of a body. Raises BadField for bad JSON, or for more than the allowed contents."""
    check(data, values)
    try:
        value = json.loads(
            data.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_once
        )
        if _HALVES.search(data):
            _check_characters(value)
        return value
    except UnicodeDecodeError:
        raise BadField("the body is not UTF-8") from None
    except RecursionError:
        raise BadField("the body is nested too deeply") from None
    except ValueError as error:
        raise BadField(f"the body is not valid JSON: {getattr(error, 'msg', str(error))[:100]}") from None


def check(data: bytes, values: int) -> None:
    """Raise BadField for a body with too deep nesting or too many values, by its brackets and commas, before it is parsed."""
    bare = _STRINGS.sub(b"", data)
    if bare.count(b",") > values:
        raise BadField(f"the body has more than {values} values: no prompt of this model is that long")
    if max(bare.count(b"[") + bare.count(b"{"), bare.count(b"]") + bare.count(b"}")) > CONTAINERS:
        raise BadField(f"the body has more than {CONTAINERS} lists and objects: make it simpler")
    depth = 0
    for bracket in _BRACKETS.findall(bare):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEPTH:
            raise BadField(f"the body is nested too deeply: at most {DEPTH} levels")


def _check_characters(value: Any) -> None:
    """Raise BadField where a text of a body, or a name in it, has half a surrogate pair: no tokenizer and no process takes it."""
    for name, part in value.items() if isinstance(value, dict) else [("", value)]:
        try:
            json.dumps({name: part}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            param = name.encode(errors="replace").decode()[:64] or None
            why = "half a surrogate pair (one of \\ud800 to \\udfff alone) is no character: leave it out"
            raise BadField(f"{param or 'the body'}: {why}", param) from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{text[:40]} is larger than any number that is held here")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without repeated keys: two programs that read the same bytes must not see two different requests."""
    if len(pairs) > KEYS:
        raise ValueError(f"an object has more than {KEYS} keys")
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key appears twice")
    return out
