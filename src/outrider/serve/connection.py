"""Connections: their number, and the time one may take to send a request.

A connection without a whole request is pending: it is closed after some seconds, even if bytes keep arriving, and the oldest
pending one makes room when the server is full. So idle connections never keep new ones out. While a request is being answered,
bytes after the request are dropped, not kept (they would hide that the client has gone).
"""

from __future__ import annotations

import os
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn import Config
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

RESERVED = 8
"""Connections beyond the limit when none is pending: they get the health endpoints, and 503 for everything else."""
SPARE = 40
"""Descriptors kept for other uses: files, helper processes, the store."""
FEWEST = 4
PIECES, TINY = 2000, 64
"""A body may have PIECES pieces of any size; with more, they must have at least TINY bytes on average."""
PART_BYTES, PART_SECONDS = 16 << 20, 5.0
"""What is still heard of a body that was refused before its end, so that its sender can read why."""
BURST = 8
"""Connections that are accepted at a time, before bytes of others are read."""
OPEN_TO_ALL = frozenset({"/health", "/ready", "/metrics"})


class Door:
    """The connections of one server. most: at once. heads: seconds until a request's head must be complete, from the start of the
    connection or the end of its last reply. owing: pending connections, oldest first."""

    def __init__(self, most: int, heads: float) -> None:
        self.most, self.heads = most, heads
        self.owing: dict[Connection, None] = {}

    def make_room(self, taken: int) -> bool:
        """Whether one more is accepted; if the server is full, the oldest pending connection is closed for it."""
        if taken <= self.most:
            return True
        if self.owing:
            next(iter(self.owing)).cut()
            return True
        return False


class Crumbs(h11.Connection):
    """The parser of one connection. It refuses a body in thousands of tiny chunks, since each costs as much as a large one."""

    pieces = size = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.pieces = self.size = 0
        elif isinstance(event, h11.Data):
            self.pieces, self.size = self.pieces + 1, self.size + len(event.data)
            few = self.size < TINY * self.pieces and self.our_state is h11.SEND_RESPONSE
            if self.pieces > PIECES and few:
                raise h11.RemoteProtocolError("the body comes in too many tiny chunks")
        return event


class Parting:
    """A transport that is closed when the other side has sent what it was sending, within bounds: a socket that is closed with
    bytes unread takes the reply with it, and a client whose body is refused would never read why. coming: whether more comes."""

    def __init__(self, transport: Any, loop: Any, coming: Callable[[], bool]) -> None:
        self._transport, self._loop, self._coming = transport, loop, coming
        self._left: int | None = None  # bytes that are still heard, once it is to be closed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    @property
    def hears(self) -> bool:
        """Whether it only hears what still comes."""
        return self._left is not None and not self._transport.is_closing()

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._left is not None or self._transport.is_closing()

    def close(self) -> None:
        """Send what is left, and close when the other side is done. A second time: now."""
        if self._left is not None or self._transport.is_closing() or not self._coming():
            self._transport.close()
            return
        self._left = PART_BYTES
        try:
            if self._transport.can_write_eof():
                self._transport.write_eof()
        except OSError:  # the other side is gone already
            self._transport.close()
            return
        self._transport.resume_reading()
        self._loop.call_later(PART_SECONDS, self._transport.close)

    def drops(self, data: bytes) -> bool:
        """Whether these bytes come too late for anybody."""
        if self._left is None:
            return False
        self._left -= len(data)
        if self._left < 0:
            self._transport.close()
        return True


class Connection(H11Protocol):
    """One connection. door: the connections of its server (see `at`)."""

    door: Door

    def __init__(self, config: Config, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.conn = Crumbs(h11.SERVER, config.h11_max_incomplete_event_size or 16384)

    @classmethod
    def at(cls, door: Door) -> type[Connection]:
        """The class for the connections of one server."""
        return type("Connection", (cls,), {"door": door})

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        self._parting = Parting(transport, self.loop, lambda: self.cycle is not None and self.cycle.more_body)
        super().connection_made(self._parting)  # type: ignore[arg-type]
        self._timer: TimerHandle | None = None
        if not self.door.make_room(len(self.connections)):
            if len(self.connections) > self.door.most + RESERVED:
                transport.abort()
                return
            self.app = crowded(self.app)
        self._owe()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: a client that asks for another protocol is answered in this one. uvicorn would write two lines, of which
        one tells the operator to install a library for web sockets."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._parting.drops(data):
            return
        if self.answering:
            self._alone()
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.cycle.more_body:
                self._settle()
                if self.conn.trailing_data[0]:
                    self._alone()
            elif self._timer is not None:  # its head is complete: the body has its own time limit
                self._timer.cancel()
                self._timer = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP. If a request has begun, its application must not answer too: to it the client has gone."""
        super().send_400_response(msg)
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._parting.hears:
            self.door.owing[self] = None  # its place is another's as soon as one is needed
        if not self.transport.is_closing() and not self.answering:
            self._owe()

    @property
    def answering(self) -> bool:
        """Whether a request is complete and its reply is not."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def cut(self) -> None:
        """Close it now: it is pending and another connection needs its place."""
        self._settle()
        self.transport.abort()

    def _owe(self) -> None:
        """Mark it as pending from now on."""
        self._settle()
        self.door.owing[self] = None
        self._timer = self.loop.call_later(self.door.heads, self.cut)

    def _settle(self) -> None:
        """Mark it as no longer pending."""
        self.door.owing.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _alone(self) -> None:
        """Bytes after a request that is being answered are dropped, and the reply closes the connection."""
        self.cycle.keep_alive = False
        if CLOSE_HEADER not in self.scope["headers"]:
            self.scope["headers"].append(CLOSE_HEADER)  # type: ignore[attr-defined]
        self.flow.resume_reading()


def crowded(app: Any) -> Any:
    """An application for connections beyond the limit: the health endpoints, and 503 for everything else."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        message = "too many connections are open: try again in some seconds"
        error = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
        refusal = JSONResponse(error, 503, {"retry-after": "5", "connection": "close"})
        await (app if scope["path"] in OPEN_TO_ALL else refusal)(scope, receive, send)

    return answer


def room(asked: int) -> int:
    """Connections that this process can hold: `asked`, or as many as its descriptors allow. Raises the soft limit if possible."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
        wanted = used + asked + RESERVED + BURST + SPARE
        if soft != resource.RLIM_INFINITY and soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            spare = min(SPARE, soft // 4)
            return max(FEWEST, min(asked, soft - used - RESERVED - BURST - spare))
    return asked


def guarded(app: Any, host: str, port: int, *, connections: int, head_seconds: float, **more: Any) -> Config:
    """uvicorn's configuration of every server of ours: bounded connections, and neither headers nor logs of uvicorn's own.

    more: further settings of uvicorn.
    """
    return Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        ws="none",
        backlog=BURST,
        http=Connection.at(Door(room(connections), head_seconds)),
        timeout_keep_alive=5,
        **more,
    )
