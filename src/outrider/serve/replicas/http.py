"""A small HTTP/1.1 client for replicas on this machine: one request a connection, replies in parts as they come.

h11, which uvicorn brings, does the protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import h11

from outrider.serve.replicas.calls import Call, Lost, Part

CONNECT_SECONDS = 2.0
ENDED = "the replica that answered this request has ended: send it again"
OWN = frozenset({b"connection", b"transfer-encoding", b"content-length", b"keep-alive"})
"""Headers of a connection, which are the front's to its own client."""


class Unreachable(Exception):
    """Nothing listens there, so the request has reached nobody."""


async def request(port: int, call: Call, key: str) -> AsyncIterator[Part]:
    """The reply to a call. key: the API key of the replicas. Raises Unreachable, and Lost when the connection ends early."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except (OSError, TimeoutError):
        raise Unreachable from None
    try:
        async for part in _exchange(reader, writer, call, key):
            yield part
    except (OSError, h11.RemoteProtocolError):
        raise Lost(ENDED) from None
    finally:
        # a reply that was not read to its end is not wanted: the replica must see that at once
        writer.transport.abort()


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, call: Call, key: str
) -> AsyncIterator[Part]:
    connection = h11.Connection(h11.CLIENT)
    path = call.path + (f"?{call.query.decode('latin-1')}" if call.query else "")
    headers = [
        (b"host", b"127.0.0.1"),
        (b"connection", b"close"),
        (b"authorization", f"Bearer {key}".encode()),
        *call.headers,
    ]
    headers += [(b"content-length", str(len(call.body)).encode())] if call.method == "POST" else []
    writer.write(connection.send(h11.Request(method=call.method, target=path, headers=headers)) or b"")
    if call.body:
        writer.write(connection.send(h11.Data(data=call.body)) or b"")
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    await writer.drain()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response):
            kept = tuple((bytes(k).lower(), bytes(v)) for k, v in event.headers if bytes(k).lower() not in OWN)
            yield Part(event.status_code, kept)
        elif isinstance(event, h11.Data):
            yield Part(body=bytes(event.data))
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            return
