"""A reply of an application in this process, in parts: for replicas that others' servers reach by calls, not by HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import ASGIApp, Message

from outrider.serve.replicas.calls import Call, Part

AHEAD = 64
"""Parts that may wait for a reader before the application does."""


async def answer(app: ASGIApp, call: Call) -> AsyncIterator[Part]:
    """The application's reply to a call; closing the iterator tells the application that its client has left."""
    parts: asyncio.Queue[Part | None] = asyncio.Queue(AHEAD)
    left = asyncio.Event()
    body = [call.body]

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            await parts.put(Part(message["status"], tuple((bytes(k), bytes(v)) for k, v in message.get("headers", ()))))
        elif message.get("body"):
            await parts.put(Part(body=message["body"]))

    async def run() -> None:
        try:
            await app(scope_of(call), receive, send)
        finally:
            if not left.is_set():  # nobody reads any more then, and a full queue would keep this task for ever
                await parts.put(None)

    running = asyncio.create_task(run())
    try:
        while (part := await parts.get()) is not None:
            yield part
        await running
    finally:
        left.set()
        if not running.done():
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def scope_of(call: Call) -> dict[str, Any]:
    """An ASGI scope."""
    length = ((b"content-length", str(len(call.body)).encode()),) if call.method == "POST" else ()
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": call.method, "scheme": "http",
        "path": call.path, "raw_path": call.path.encode(), "root_path": "", "query_string": call.query,
        "client": ("127.0.0.1", 1), "server": ("localhost", 80), "headers": [(b"host", b"localhost"), *length, *call.headers],
    }  # fmt: skip
