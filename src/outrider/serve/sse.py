"""Server-sent events that notice when nobody listens, and replies that stop when their reader is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
STALL_SECONDS = 30.0
"""A reader that takes nothing for so long is gone."""
BLOCK = 256
"""Bytes to a multiple of which padded frames are filled up."""
CADENCE = 0.05
"""Seconds between two frames of a padded stream."""
DONE = b"data: [DONE]\n\n"


def frame(document: object, pad: bool = False) -> bytes:
    """One event; padded with a comment to a multiple of BLOCK bytes, so that its size says little about its tokens."""
    data = b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    if not pad:
        return data
    missing = -(len(data) + 3) % BLOCK
    return b":" + b" " * missing + b"\n\n" + data


async def paced(frames: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    """The same frames, each at least `seconds` after the one before: bursts then tell nothing about acceptance."""
    async for data in frames:
        yield data
        await asyncio.sleep(seconds)


class EventStream:
    """An ASGI response that sends `frames` and calls `close` in the end, however it ends.

    It ends early when the client goes away, or has taken nothing for `stall` seconds.
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
            pass  # the reader stalled or went away: nothing more can be said to it
        finally:
            self._close()
            await _end(work, gone)

    async def _send(self, send: Send, gone: asyncio.Task[None]) -> None:
        headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in self._frames:
            async with asyncio.timeout(self._stall):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if gone.done():  # a send to a reader that is gone returns at once: what has come up meanwhile is not written
                return
        async with asyncio.timeout(self._stall):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, cancelled with ClientDisconnect as soon as the client goes away."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _end(task, gone)


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
