"""Readers that are slow, stall, or are gone: what they hold, when they are dropped, and that nobody else waits for them."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from outrider.engine.sequence import Event
from outrider.serve.replies import Reply
from outrider.serve.requests import CompletionRequest
from outrider.serve.sse import PIECE, EventStream, pieces, written
from outrider.serve.tickets import Ticket
from tests.serve.harness import Running, until

LONG = {"model": "pycode", "prompt": "def f(", "max_tokens": 300, "ignore_eos": True}


def test_a_stalled_reader_is_dropped_and_its_slot_is_free() -> None:
    """The stream itself: a reader that takes nothing ends it after `stall` seconds, and its close is called once."""

    async def play() -> tuple[int, int, float]:
        closed, sent = 0, 0

        def close() -> None:
            nonlocal closed
            closed += 1

        async def frames() -> AsyncIterator[bytes]:
            while True:
                yield b"data: x\n\n"

        async def send(message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent > 3:
                await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        start = time.monotonic()
        await asyncio.wait_for(EventStream(frames(), close, stall=0.2)({"type": "http"}, receive, send), 60)
        return closed, sent, time.monotonic() - start

    closed, sent, seconds = asyncio.run(play())
    assert (closed, sent) == (1, 4) and seconds > 0.15


def test_a_reader_that_is_gone_is_written_nothing() -> None:
    """What has come up while a reader stalled is not rendered when it turns out to be gone: a send then returns at once."""

    async def play() -> int:
        rendered, sent, lost = 0, 0, asyncio.Event()

        async def frames() -> AsyncIterator[bytes]:
            nonlocal rendered
            for _ in range(100):
                rendered += 1
                yield b"data: x\n\n"

        async def send(message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent == 3:  # the head, one frame, and this one stalls
                await lost.wait()

        async def receive() -> Any:
            await lost.wait()
            return {"type": "http.disconnect"}

        stream = asyncio.create_task(EventStream(frames(), lambda: None)({"type": "http"}, receive, send))
        while sent < 3:
            await asyncio.sleep(0)
        lost.set()
        await stream
        return rendered

    assert asyncio.run(play()) == 2


def test_what_a_slow_reader_missed_comes_in_pieces() -> None:
    """One frame of a long text would stop everybody while it is written; together the pieces are the text."""
    request = CompletionRequest(model="pycode", prompt="x", return_token_ids=True)
    reply = Reply(request, Ticket(2), None, 3, True)
    batch = [(i % 2, Event("r", i % 2, (i,), ("sampled",), f"{i} ")) for i in range(5 * PIECE + 7)]
    found = [json.loads(frame[6:])["choices"][0] for frame in reply.rendered(batch, False)]
    assert max(len(c["token_ids"]) for c in found) <= PIECE and len(found) == 12
    for index in (0, 1):
        assert "".join(c["text"] for c in found if c["index"] == index) == "".join(
            event.text for i, event in batch if i == index
        )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)


@given(value=JSON, times=st.sampled_from((0, 1, PIECE, 2 * PIECE + 3)))
def test_the_pieces_of_a_document_are_its_json(value: Any, times: int) -> None:
    for document in (value, [value] * times, {"a": [value] * times, "b": {"c": value}}):
        right = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        assert "".join(pieces(document)) == right
        assert asyncio.run(written(document)) == right.encode()


def test_no_piece_of_a_long_reply_is_long() -> None:
    entry = {"token": "a", "logprob": -1.5, "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -2.5}] * 20}
    whole = {"choices": [{"logprobs": {"content": [entry] * 4096}} for _ in range(3)]}
    assert max(map(len, pieces(whole))) <= (PIECE + 1) * len(json.dumps(entry))


def test_a_slow_reader_holds_no_more_than_its_text(server: Running) -> None:
    """A reader that stops: the engine goes on, the request ends, and its slot is free long before it is read."""
    with server.stream(LONG) as sock:
        until(lambda: server.bridge.engine.scheduler.free == 8, 30)
        rest = b""
        sock.settimeout(10)
        while b"[DONE]" not in rest:
            rest += sock.recv(65536)
    until(lambda: not server.bridge.tickets)


def test_a_socket_that_takes_nothing_is_bounded(server: Running) -> None:
    """What the kernel holds for it, and how long (the night run waits for that); connections inherit it from their listener."""
    (listener,) = server.server.servers[0].sockets
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 65536
    assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
