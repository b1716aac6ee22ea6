"""Running the application: uvicorn with a graceful shutdown."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from outrider.errors import ConfigError
from outrider.serve.address import BACKLOG
from outrider.serve.bridge import Bridge
from outrider.serve.connection import guarded
from outrider.serve.settings import Settings
from outrider.serve.sse import STALL_SECONDS
from outrider.serve.supervisor import CLOSED, LOST, SERVING, Heartbeat

Say = Callable[[bool], object]
Beside = Callable[[], Coroutine[Any, Any, None]]
BLINK = 0.05
"""Seconds between two checks for a signal while the engine loads."""
SEND_BUFFER = 65536
"""Bytes of a reply that the kernel may buffer for a reader that has stopped reading (its bookkeeping takes as much again); the
default would be megabytes. asyncio buffers as much, and the engine's text waits as tokens."""


def silent(serving: bool) -> None:
    """Report nothing."""


class Server(uvicorn.Server):
    """uvicorn that drains on the first signal: no new requests; running ones have `grace` seconds, then end with an error.

    line: the socket to the supervisor that started this process, if there is one; it gets heartbeats with the server's state.
    beside: run once, beside the first requests.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: Starlette,
        grace: float,
        line: socket.socket | None = None,
        say: Say = silent,
        beside: Beside | None = None,
    ) -> None:
        super().__init__(config)
        self._beside = beside
        self.aside: asyncio.Task[None] | None = None  # what runs beside the first requests
        self.bridge: Bridge = app.state.bridge
        self.grace, self.line, self.say = grace, line, say
        self._life = app.router.lifespan_context(app)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving, then report it. Raises exceptions of the engine's construction, and KeyboardInterrupt for a signal."""
        await self._begin()
        try:
            await super().startup(sockets)
        except OSError as error:  # another process listens there now
            raise ConfigError(f"cannot listen here ({error.strerror or error}): choose another --port") from None
        self.say(True)
        for listener in (s for server in self.servers for s in server.sockets):
            bound(listener)
            queued(listener.fileno())
        gc.collect()
        gc.freeze()  # the server's own objects are never garbage, and scanning them would stop every stream for 0.1 s
        if self._beside is not None:
            self.aside = asyncio.create_task(self._beside())
        if self.line is not None and self.started:
            self._telling = asyncio.create_task(Heartbeat(self.line, self.state).run())

    def state(self) -> bytes:
        """The server's state as a heartbeat message."""
        if self.bridge.draining:
            return CLOSED
        return SERVING if self.bridge.alive else LOST

    async def _begin(self) -> None:
        """Start the application; cancelled if a signal arrives meanwhile, since nothing is served yet."""
        starting = asyncio.ensure_future(self._life.__aenter__())
        while not (await asyncio.wait([starting], timeout=BLINK))[0]:
            if self.should_exit:
                starting.cancel()
                raise KeyboardInterrupt
        await starting

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: the first drains, a second one ends at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.bridge.drain()
        if self.started:
            self.say(False)

    async def shutdown(self, sockets: list | None = None) -> None:
        """Finish the requests while uvicorn waits for their connections."""
        gc.unfreeze()
        if self.aside is not None:
            self.aside.cancel()
            await asyncio.gather(self.aside, return_exceptions=True)
        settled = asyncio.create_task(self.bridge.drain_requests(0.0 if self.force_exit else self.grace))
        await super().shutdown(sockets)
        settled.cancel()
        await asyncio.gather(settled, return_exceptions=True)
        if not self.force_exit:
            await self._life.__aexit__(None, None, None)


def server_for(
    app: Starlette,
    settings: Settings,
    host: str,
    port: int,
    line: socket.socket | None = None,
    say: Say = silent,
    beside: Beside | None = None,
) -> Server:
    """A server for `app`; start it with `run()` or, inside a loop, `await serve()`. line: to its supervisor, if it has one.

    say: called with True when requests are answered, and with False for the first and the second signal to end. beside: run once,
    when requests are answered.
    """
    config = guarded(
        app,
        host,
        port,
        connections=settings.connections,
        head_seconds=settings.head_seconds,
        lifespan="off",  # `Server` runs it itself, so that it can report its errors
        timeout_graceful_shutdown=int(settings.grace) + 3,
        h11_max_incomplete_event_size=16384,
    )
    return Server(config, app, settings.grace, line, say, beside)


def bound(listener: Any) -> None:
    """Limit the cost of a reader that has stopped reading; every connection inherits it. If the kernel supports it, it also closes
    such a connection, which otherwise stays open with its last bytes long after its stream was abandoned."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if hasattr(socket, "TCP_USER_TIMEOUT") and listener.family in (socket.AF_INET, socket.AF_INET6):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * STALL_SECONDS))


def queued(descriptor: int) -> None:
    """Let the kernel queue up to BACKLOG new connections: asyncio asks it for no more than it accepts at a time."""
    with socket.socket(fileno=os.dup(descriptor)) as listener:
        listener.listen(BACKLOG)
