"""Load with bad clients: nothing leaks, the books balance, overload is refused politely, stalled readers cost others nothing.

Larger sizes of some are in `test_nightly.py`. The engine decodes a toy target, so that the server and not a model is the load.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections import Counter
from typing import Any

import pytest

from outrider.serve.tickets import Limits
from outrider.telemetry.resources import memory_bytes
from tests.serve.harness import serving, until
from tests.serve.toyserver import BODY, toy

SLOTS = 4


def request(body: Any) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    )
    return head + b"Content-Length: %d\r\n\r\n" % len(data) + data


async def bad_client(port: int, draw: random.Random) -> str:
    """One client: most are good; others leave while sending, waiting or reading, by RST, FIN or half of one, or send nonsense."""
    body = {**BODY, "max_tokens": draw.randrange(1, 80), "n": draw.choice((1, 1, 1, 2)), "stream": draw.random() < 0.7}
    sent, manner = request(body), draw.random()
    if manner < 0.05:
        sent = request(bytes(draw.randrange(256) for _ in range(50)))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if manner < 0.15 and manner >= 0.05:
            writer.write(sent[: draw.randrange(len(sent))])
        else:
            writer.write(sent)
        if 0.05 <= manner < 0.4:
            if manner > 0.25:
                await reader.read(draw.randrange(1, 600))
            await asyncio.sleep(draw.random() * 0.03)
            how = draw.random()
            if how < 0.4:
                writer.transport.abort()
            elif how < 0.6:
                writer.write_eof()
                await reader.read()
            return "left"
        answer = await reader.read()
        return answer.split(b" ", 2)[1].decode()
    except (ConnectionError, IndexError):
        return "cut"
    finally:
        writer.close()


async def chaos(port: int, count: int, at_once: int, seed: int) -> list[str]:
    draw, gate = random.Random(seed), asyncio.Semaphore(at_once)

    async def one() -> str:
        async with gate:
            return await bad_client(port, draw)

    return await asyncio.gather(*(one() for _ in range(count)))


@pytest.mark.parametrize("count", [250, pytest.param(5000, marks=pytest.mark.slow)])
def test_nothing_leaks_and_the_books_balance(count: int) -> None:
    with serving(engine=toy(SLOTS), fixed=True, limits=Limits(queue=24)) as running:
        seen = Counter(asyncio.run(chaos(running.port, count, 20, seed=count)))
        bridge, metrics = running.bridge, running.bridge.metrics
        worker, scheduler = (
            bridge.worker,
            bridge.engine.scheduler,
        )  # a slot is free a moment before its last event is handed out
        until(lambda: not bridge.tickets and scheduler.free == SLOTS and not worker.routes and not worker.queued)
        assert bridge.held == 0 and not bridge.engine.busy
        assert sum(bridge.engine.parts.kv.length) == 0  # every block is back
        assert set(seen) <= {"200", "400", "429", "left", "cut"}, set(seen)
        assert seen["200"] > 0.4 * count and seen["left"] > 0.2 * count
        started = sum(metrics.outcomes.values())
        assert metrics.outcomes["error"] == 0 and seen["200"] <= started == bridge.begun <= count
        c = metrics.counts
        assert c.judged == c.accepted + c.dropped + c.rejected <= c.proposed + c.judged and c.emitted == c.tokens
        assert running.call("POST", "/v1/completions", {**BODY, "stream": False})[0] == 200
        print(
            f"\nT11: {count} requests, clients saw {dict(seen)}, server {dict(metrics.outcomes)}; 0 of {SLOTS} slots held"
        )


def test_a_closed_socket_frees_its_slot_at_once() -> None:
    """None is decoded to its end, which takes 10 s and more; `test_nightly.py` has the percentiles of the time it takes."""
    with serving(engine=toy(SLOTS, pause=0.02), fixed=True) as running:
        scheduler, outcomes = running.bridge.engine.scheduler, running.bridge.metrics.outcomes
        for _ in range(20):
            running.stream({**BODY, "max_tokens": 900}).close()
            until(lambda: scheduler.free == SLOTS)
        until(lambda: sum(outcomes.values()) == 20)
        assert outcomes["abort"] == 20, outcomes


async def flood(port: int, count: int) -> list[tuple[int, dict[str, str]]]:
    """Status and headers of so many replies, all asked for at once."""

    async def one() -> tuple[int, dict[str, str]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(BODY))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        await reader.read()
        writer.close()
        return int(head[0].split()[1]), dict(x.split(": ", 1) for x in head[1:] if ": " in x)

    return await asyncio.gather(*(one() for _ in range(count)))


def test_overload_is_refused_politely() -> None:
    """The one slot and the whole queue are taken: everyone else gets a 429 with Retry-After, and none waits behind the work, of
    which there are 30 s and more."""
    with serving(engine=toy(1, pause=0.05), fixed=True, limits=Limits(queue=3, queue_seconds=600)) as running:
        first = [running.stream({**BODY, "max_tokens": 900})]
        for _ in range(3):
            sock = socket.create_connection(("127.0.0.1", running.port), timeout=30)
            sock.sendall(request({**BODY, "max_tokens": 900}))
            first.append(sock)
        until(lambda: running.bridge.held == 4)
        replies = asyncio.run(flood(running.port, 100))
        assert Counter(status for status, _ in replies) == {429: 100}
        assert all(int(headers["retry-after"]) >= 1 for _, headers in replies)
        assert running.bridge.held == 4, "those who came first go on"
        for sock in first:
            sock.close()
        until(lambda: running.bridge.held == 0)
        assert running.call("GET", "/ready")[0] == running.call("POST", "/v1/completions", BODY)[0] == 200


def test_stalled_readers_cost_little_and_delay_nobody() -> None:
    readers = 24
    with serving(engine=toy(readers + 2), fixed=True) as running:
        one = {**BODY, "stream": False, "max_tokens": 20}
        assert running.call("POST", "/v1/completions", one)[0] == 200
        before, socks = memory_bytes(), list[socket.socket]()
        try:
            for _ in range(readers):
                socks.append(running.stream({**BODY, "max_tokens": 400}))
            until(lambda: running.bridge.engine.scheduler.free == readers + 2, 60)  # the engine waits for no socket
            assert running.call("POST", "/v1/completions", one)[0] == 200
            assert memory_bytes() - before < readers * 256 * 1024 + 32e6
        finally:
            for sock in socks:
                sock.close()
        until(lambda: not running.bridge.tickets)
