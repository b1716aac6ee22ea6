"""Connections: how many there may be, and how long one may owe a request.

A connection that has not sent a whole request owes one: it is ended after some seconds, however its bytes trickle, and the oldest
of them makes room when the server is full. So newcomers get in whatever others hold open. A connection whose request is being
answered is watched to the end: bytes behind the request are dropped, not kept (they would hide that the client has gone).
"""

from __future__ import annotations

import os
from asyncio import TimerHandle, Transport
from contextlib import suppress
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn import Config
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

RESERVED = 8
"""Connections beyond those when nobody owes anything: they are told how the server is, and nothing else."""
SPARE = 40
"""Descriptors kept for everything else: files, helper processes, the store."""
FEWEST = 4
PIECES, TINY = 2000, 64
"""So many pieces of a body may be of any size; those of a longer one have so many bytes on average."""
BURST = 8
"""Connections that are taken from the queue at a time, before others' bytes are looked at."""
OPEN_TO_ALL = frozenset({"/health", "/ready", "/metrics"})


class Door:
    """The connections of one server. most: at once. heads: seconds until a head must be whole, from when
    the connection began or its last reply ended. owing: those that owe a request, oldest first."""

    def __init__(self, most: int, heads: float) -> None:
        self.most, self.heads = most, heads
        self.owing: dict[Connection, None] = {}

    def make_room(self, taken: int) -> bool:
        """Whether one more is welcome; when full, the oldest that owes a request goes."""
        if taken <= self.most:
            return True
        if self.owing:
            next(iter(self.owing)).cut()
            return True
        return False


class Crumbs(h11.Connection):
    """The parser of one connection. It refuses a body that comes in thousands of tiny chunks: each costs as much as a large one."""

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


class Connection(H11Protocol):
    """One connection. door: of its server (see `at`)."""

    door: Door

    def __init__(self, config: Config, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.conn = Crumbs(h11.SERVER, config.h11_max_incomplete_event_size or 16384)

    @classmethod
    def at(cls, door: Door) -> type[Connection]:
        """The class for the connections of one server."""
        return type("Connection", (cls,), {"door": door})

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer: TimerHandle | None = None
        if not self.door.make_room(len(self.connections)):
            if len(self.connections) > self.door.most + RESERVED:
                transport.abort()
                return
            self.app = crowded(self.app)
        self._owe()

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.answering:
            self._alone()
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.cycle.more_body:
                self._settle()
                if self.conn.trailing_data[0]:
                    self._alone()
            elif self._timer is not None:  # its head is there: a body has a time of its own
                self._timer.cancel()
                self._timer = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self.answering:
            self._owe()

    @property
    def answering(self) -> bool:
        """A whole request is there and its reply is not."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def cut(self) -> None:
        """End it now: it owes a request and another needs its place."""
        self._settle()
        self.transport.abort()

    def _owe(self) -> None:
        """A request is owed from now on."""
        self._settle()
        self.door.owing[self] = None
        self._timer = self.loop.call_later(self.door.heads, self.cut)

    def _settle(self) -> None:
        """Nothing is owed any more."""
        self.door.owing.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _alone(self) -> None:
        """More came behind a request that is being answered: it is dropped, and the reply says that it is the last."""
        self.cycle.keep_alive = False
        if CLOSE_HEADER not in self.scope["headers"]:
            self.scope["headers"].append(CLOSE_HEADER)  # type: ignore[attr-defined]
        self.flow.resume_reading()


def crowded(app: Any) -> Any:
    """An application for connections beyond the limit: how the server is, and 503 to everything else."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        message = "too many connections are open: try again in some seconds"
        error = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
        refusal = JSONResponse(error, 503, {"retry-after": "5", "connection": "close"})
        await (app if scope["path"] in OPEN_TO_ALL else refusal)(scope, receive, send)

    return answer


def room(asked: int) -> int:
    """Connections that this process can hold: `asked`, or what its descriptors allow. The soft limit is raised if that helps."""
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
