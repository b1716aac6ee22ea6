"""Clients that hang up while their request is read: whatever the moment, the place in the server is given back."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import socket
import struct
import time
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from outrider.serve.connection import Parting
from outrider.serve.sse import while_connected
from tests.serve.harness import serving, until

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "def f(x):", "max_tokens": 8},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8},
    "/v1/responses": {"input": "x", "max_output_tokens": 16},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8},
    "/outrider/play": {"prompt": "def f(x):", "max_tokens": 8},
}


class Asked:
    """As much of a request as `while_connected` reads: its client leaves when `left` is set."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.left.wait()
        return {"type": "http.disconnect"}


@pytest.mark.parametrize("stubborn", [False, True])
def test_work_that_ends_in_spite_of_its_cancellation_is_undone(stubborn: bool) -> None:
    taken: list[int] = []

    async def work(request: Asked) -> int:
        request.left.set()
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            if not stubborn:
                raise
        taken.append(1)
        return 1

    async def play() -> None:
        request = Asked()
        with pytest.raises(ClientDisconnect):
            await while_connected(request, work(request), taken.remove)  # type: ignore[arg-type]

    asyncio.run(play())
    assert taken == []


def test_the_result_is_not_undone_if_the_client_gets_it() -> None:
    async def play() -> int:
        return await while_connected(Asked(), asyncio.sleep(0, 5), lambda result: pytest.fail("undone"))  # type: ignore[arg-type]

    assert asyncio.run(play()) == 5


def test_no_moment_of_hanging_up_keeps_a_place() -> None:
    """Before 3 in 100 kept theirs for ever, until the queue was full of nobody. The chance that 150 show none of them: 1%."""
    rng = random.Random(0)
    with serving() as server:
        for i in range(150):
            path, fields = rng.choice(list(ROUTES.items()))
            body = json.dumps({"model": "pycode", "stream": i % 2 == 0, **fields}).encode()
            lines = "Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(body)}"
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall("\r\n".join((f"POST {path} HTTP/1.1", *lines, "", "")).encode() + body)
                time.sleep(0.02 * rng.random())
                if i % 3:  # a reset instead of an end
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: not server.bridge.tickets, 30)
        assert server.bridge.held == 0 and not any(server.bridge.owned.values())
        until(lambda: not server.bridge.engine.scheduler.running)


def test_a_connection_that_the_other_side_has_reset_is_closed_all_the_same() -> None:
    """Its socket refuses to end one direction, in the middle of a server's shutdown."""
    told = list[str]()

    class Gone(asyncio.Transport):
        def is_closing(self) -> bool:
            return bool(told)

        def can_write_eof(self) -> bool:
            return True

        def write_eof(self) -> None:
            raise OSError(errno.ENOTCONN, "not connected")

        def close(self) -> None:
            told.append("closed")

    parting = Parting(Gone(), None, lambda: True)
    parting.close()
    parting.close()
    assert told[0] == "closed" and parting.is_closing()
