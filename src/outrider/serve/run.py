"""Running the application: uvicorn with our shutdown, on threads that leave the engine its cores."""

from __future__ import annotations

import asyncio
import gc
import socket
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from outrider.serve.bridge import Bridge
from outrider.serve.keeper import CLOSED, LOST, SERVING, Line
from outrider.serve.settings import Settings
from outrider.serve.sse import STALL_SECONDS

SEND_BUFFER = 65536
"""Bytes of a reply the kernel may hold for a reader that takes nothing (it keeps as much again for its books); by itself it would
hold megabytes. asyncio holds as much, and the engine's text waits as tokens."""


class Server(uvicorn.Server):
    """uvicorn that drains on the first signal: nothing new, what runs may finish for `grace` seconds, then ends with an error.

    line: to the keeper that has started this process, if one has; it is told how the server is.
    """

    def __init__(self, config: uvicorn.Config, bridge: Bridge, grace: float, line: socket.socket | None = None) -> None:
        super().__init__(config)
        self.bridge, self.grace, self.line = bridge, grace, line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to serve, and then say so."""
        await super().startup(sockets)
        for listener in (s for server in self.servers for s in server.sockets):
            bound(listener)
        gc.collect()
        gc.freeze()  # what a server is made of is never garbage: to look through all of it stops every stream for 0.1 s
        if self.line is not None and self.started:
            self._telling = asyncio.create_task(Line(self.line, self.state).run())

    def state(self) -> bytes:
        """How the server is, in a keeper's words."""
        if self.bridge.draining:
            return CLOSED
        return SERVING if self.bridge.alive else LOST

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first drains, a second one ends at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.bridge.drain()

    async def shutdown(self, sockets: list | None = None) -> None:
        """Settle the requests beside uvicorn's own wait for their connections."""
        gc.unfreeze()
        settled = asyncio.create_task(self.bridge.settle(0.0 if self.force_exit else self.grace))
        await super().shutdown(sockets)
        settled.cancel()
        await asyncio.gather(settled, return_exceptions=True)


def server_for(app: Starlette, settings: Settings, host: str, port: int, line: socket.socket | None = None) -> Server:
    """A server for `app`; serve it with `run()` or, inside a loop, `await serve()`. line: to its keeper, if it has one."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        lifespan="on",
        ws="none",
        backlog=2048,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(settings.grace) + 3,
        h11_max_incomplete_event_size=16384,
    )
    return Server(config, app.state.bridge, settings.grace, line)


def bound(listener: Any) -> None:
    """Limit what a reader that takes nothing costs; every connection inherits it. Where the kernel offers it, it also cuts such a
    connection, which otherwise stays open with its last bytes when the stream behind it has long been given up."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if hasattr(socket, "TCP_USER_TIMEOUT") and listener.family in (socket.AF_INET, socket.AF_INET6):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * STALL_SECONDS))
