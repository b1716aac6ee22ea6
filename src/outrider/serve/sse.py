"""Server-sent events that end when the client has gone, work that stops when its client disconnects, and JSON in pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
STALL_SECONDS = 30.0
"""A reader that takes nothing for this long counts as gone."""
BLOCK = 256
"""Padded frames are filled up to a multiple of this many bytes."""
CADENCE = 0.05
"""Seconds between two frames of a padded stream."""
PIECE = 64
"""Entries of a list that are written at once, and steps of a text that one chunk may hold: writing JSON blocks every thread, for
57 ms with 4,096 tokens of 20 log-probabilities each."""
TURN = 1 << 14
"""Characters of JSON after which other tasks may run: some 0.4 ms."""
DONE = b"data: [DONE]\n\n"


def frame(document: object, pad: bool = False) -> bytes:
    """One event; padded with a comment to a multiple of BLOCK bytes, so that its size says little about its tokens."""
    data = b"data: " + _json(document).encode() + b"\n\n"
    if not pad:
        return data
    missing = -(len(data) + 3) % BLOCK
    return b":" + b" " * missing + b"\n\n" + data


def event_frame(kind: str, document: object, pad: bool = False) -> bytes:
    """One event that names its kind."""
    return f"event: {kind}\n".encode() + frame(document) if not pad else _named(kind, frame(document, True))


def _named(kind: str, framed: bytes) -> bytes:
    """A padded frame whose event has a name."""
    head, _, data = framed.rpartition(b"\n\ndata: ")
    return head + f"\n\nevent: {kind}\ndata: ".encode() + data


async def written(document: Any) -> bytes:
    """A document as JSON. Other tasks may run after about every TURN characters."""
    out: list[str] = []
    size = 0
    for piece in pieces(document):
        out.append(piece)
        size += len(piece)
        if size > TURN:
            size = 0
            await asyncio.sleep(0)
    return "".join(out).encode()


def pieces(value: Any) -> Iterator[str]:
    """The JSON of a document, in parts of at most PIECE entries of a list. Keys must be strings."""
    if isinstance(value, dict) and any(isinstance(x, list | dict) for x in value.values()):
        for i, (key, inner) in enumerate(value.items()):
            yield ("," if i else "{") + _json(key) + ":"
            yield from pieces(inner)
        yield "}"
    elif isinstance(value, list) and len(value) > PIECE:
        for i in range(0, len(value), PIECE):
            yield ("," if i else "[") + _json(value[i : i + PIECE])[1:-1]
        yield "]"
    elif isinstance(value, list) and any(isinstance(x, list | dict) for x in value):
        for i, inner in enumerate(value):
            yield "," if i else "["
            yield from pieces(inner)
        yield "]"
    else:
        yield _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


async def paced(frames: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    """The same frames, each at least `seconds` after the one before: bursts then reveal nothing about acceptance."""
    async for data in frames:
        yield data
        await asyncio.sleep(seconds)


class EventStream:
    """An ASGI response that sends `frames` and always calls `close` at the end.

    It ends early when the client disconnects, or has taken nothing for `stall` seconds.
    """

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        close: Callable[[], None],
        headers: dict[str, str] | None = None,
        stall: float = STALL_SECONDS,
    ) -> None:
        self._frames, self._close, self._stall = frames, close, stall
        self._headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"} | (
            headers or {}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_disconnected(receive))
        work = asyncio.create_task(self._send(send, gone))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except (TimeoutError, OSError):
            pass  # the reader stalled or disconnected: nothing more can be sent to it
        finally:
            self._close()
            await _end(work, gone)

    async def _send(self, send: Send, gone: asyncio.Task[None]) -> None:
        headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in self._frames:
            async with asyncio.timeout(self._stall):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if gone.done():  # sends would now return at once without effect
                return
        async with asyncio.timeout(self._stall):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(request: Request, work: Coroutine[Any, Any, T], undo: Callable[[T], None] | None = None) -> T:
    """The result of `work`; it is cancelled with ClientDisconnect as soon as the client disconnects.

    undo: called with a result that nobody gets, since work may end in spite of its cancellation (what it waited for had come in
    the same moment). What the work has taken is given back there.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    handed = False
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        handed = True
        return task.result()
    finally:
        await _end(task, gone)
        if undo is not None and not handed and not task.cancelled() and task.exception() is None:
            undo(task.result())


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
