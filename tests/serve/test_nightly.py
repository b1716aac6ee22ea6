"""The server's targets at their nightly sizes, each with its figure printed (`-s`) beside what is promised."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.serve.harness import Running, a_port, p_of, serving, until
from tests.serve.test_load import request
from tests.serve.toyserver import BODY, Toy, toy, toy_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


# ---------------------------------------------------------------------- T12: a closed socket
MANNERS = ("decoding", "n = 3", "whole", "queued")


def leave(running: Running, manner: str, reset: bool) -> float:
    """Seconds from a close until nothing of the request is left in the engine."""
    engine, bridge = running.bridge.engine, running.bridge
    body = {**BODY, "max_tokens": 900, "n": 3 if manner == "n = 3" else 1, "stream": manner != "whole"}
    slots = engine.scheduler.slots
    filler = running.stream({**body, "n": slots}) if manner == "queued" else None
    base = len(bridge.tickets)
    sock = socket.create_connection(("127.0.0.1", running.port), timeout=30)
    sock.sendall(request(body))
    until(
        lambda: (
            len(bridge.tickets) > base
            and sum(map(len, engine.state.live.values())) == body["n"] + (slots if filler else 0)
        )
    )
    if manner in ("decoding", "n = 3"):
        assert sock.recv(4096)
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    start = time.perf_counter()
    sock.close()
    while len(bridge.tickets) > base or len(engine.state.live) > (slots if filler else 0):
        assert time.perf_counter() - start < 10
        time.sleep(0.0005)
    seconds = time.perf_counter() - start
    if filler:
        filler.close()
        until(lambda: not engine.busy)
    return seconds


def test_t12_a_closed_socket_frees_its_slot_within_a_step_and_100_ms() -> None:
    with serving(engine=toy(4, pause=0.01), fixed=True) as running:
        engine, steps = running.bridge.engine, list[float]()
        right = engine.step

        def timed(*deliver: Any) -> Any:
            start = time.perf_counter()
            events = right(*deliver)
            steps.append(time.perf_counter() - start)
            return events

        engine.step = timed  # type: ignore[method-assign]
        times = {m: [leave(running, m, reset=i % 2 == 0) for i in range(100)] for m in MANNERS}
        assert engine.scheduler.free == 4 and sum(engine.parts.kv.length) == 0
    every, step = [t for mine in times.values() for t in mine], p_of(steps, 0.99)
    for name, mine in {**times, "all": every}.items():
        print(
            f"\nT12 {name}: " + ", ".join(f"p{100 * q:g} {1e3 * p_of(mine, q):.1f} ms" for q in (0.5, 0.99, 1)), end=""
        )
    print(f"; a step: p50 {1e3 * p_of(steps, 0.5):.1f}, p99 {1e3 * step:.1f} ms")
    assert p_of(every, 0.99) <= step + 0.1


# ---------------------------------------------------------------------- T13: overload
@dataclass
class Seen:
    """One reply. head: seconds to its status; first, last: to its first and last chunk; tokens: received."""

    status: int = 0
    retry_after: int = 0
    head: float = 0.0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


async def ask(port: int, tokens: int = 40) -> Seen:
    seen, start = Seen(), time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request({**BODY, "max_tokens": tokens}))
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    seen.head, seen.status = time.perf_counter() - start, int(head[0].split()[1])
    fields = dict(line.split(": ", 1) for line in head[1:] if ": " in line)
    seen.retry_after = int(fields.get("retry-after", 0))
    async for line in reader:
        if line.startswith(b"data: {"):
            seen.first = seen.first or time.perf_counter() - start
            choices = json.loads(line[6:])["choices"]
            seen.tokens += len(choices[0]["token_ids"]) if choices else 0
    seen.last = time.perf_counter() - start
    writer.close()
    return seen


async def closed_loop(port: int, clients: int, seconds: float) -> list[Seen]:
    end, out = time.monotonic() + seconds, list[Seen]()

    async def client() -> None:
        while time.monotonic() < end:
            out.append(await ask(port))

    await asyncio.gather(*(client() for _ in range(clients)))
    return out


async def open_loop(port: int, rate: float, seconds: float) -> list[Seen]:
    """Poisson arrivals; none waits for another."""
    draw, tasks = random.Random(0), []
    start = at = time.monotonic()
    while (at := at + draw.expovariate(rate)) < start + seconds:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        tasks.append(asyncio.create_task(ask(port)))
    return await asyncio.gather(*tasks)


def test_t13_a_minute_of_ten_times_what_can_be_served() -> None:
    """Steps of 20 ms, four slots, four places in the queue. Peak: eight clients in a closed loop."""
    with toy_process(4, 4, 0.02) as server:
        port, begin = server.running.port, time.monotonic()
        asyncio.run(closed_loop(port, 8, 3))  # warm
        begin = time.monotonic()
        full = asyncio.run(closed_loop(port, 8, 15))
        seconds = time.monotonic() - begin
        peak, rate = sum(s.tokens for s in full) / seconds, len(full) / seconds
        calm = [s.first for s in asyncio.run(open_loop(port, 0.8 * rate, 20)) if s.status == 200]
        memory, begin = server.memory(), time.monotonic()
        flood = asyncio.run(open_loop(port, 10 * rate, 60))
        seconds = time.monotonic() - begin
        grown = server.memory() / memory - 1
        assert server.running.call("GET", "/ready")[0] == 200
    served, refused = [s for s in flood if s.status == 200], [s for s in flood if s.status != 200]
    goodput, waits, refusals = (
        sum(s.tokens for s in served) / seconds,
        [s.first for s in served],
        [s.head for s in refused],
    )
    print(
        f"\nT13: {len(flood)} requests in {seconds:.0f} s, {len(served)} served, {dict(Counter(s.status for s in flood))}"
    )
    print(f"  refusals: p50 {1e3 * p_of(refusals, 0.5):.1f}, p99 {1e3 * p_of(refusals, 0.99):.1f} ms")
    print(
        f"  first token p99: {p_of(waits, 0.99):.2f} s; at 0.8 of capacity {p_of(calm, 0.99):.2f} s (p50 {p_of(calm, 0.5):.2f})"
    )
    print(f"  goodput: {goodput:.0f} tokens/s, peak {peak:.0f}: {goodput / peak:.3f}; memory {100 * grown:+.1f}%")
    assert {s.status for s in refused} <= {429, 503} and all(s.retry_after >= 1 for s in refused)
    assert p_of(refusals, 0.99) <= 0.05
    assert p_of(waits, 0.99) <= min(20.0, 3 * p_of(calm, 0.99))
    assert goodput >= 0.95 * peak and grown <= 0.05


# ---------------------------------------------------------------------- T15: SIGTERM
@dataclass
class Ended:
    """What servers that got SIGTERM under load did. cut: how those ended that did not come to their end; probes: newcomers."""

    streams: int = 0
    cut: list[str] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)
    exits: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    probes: list[float] = field(default_factory=list)

    def trial(self, delay: float, keeper: bool) -> None:
        """Start the real server, load it with four streams, and end it `delay` seconds later."""
        port = a_port()
        command = [sys.executable, "-m", "outrider.cli.main", "serve", "--port", str(port), "--slots", "4"]
        with subprocess.Popen(
            [*command, *(["--restarts", "1"] if keeper else [])], stderr=subprocess.DEVNULL
        ) as process:
            running: Any = Running(port, None, None, None, None)  # type: ignore[arg-type]
            until(lambda: self.probe(running)[0] == "200", 300)
            body = {"model": "pycode", "prompt": "def f(", "max_tokens": 150, "ignore_eos": True}
            socks = [running.stream(body) for _ in range(4)]
            time.sleep(delay)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
            for kind, seconds in (self.probe(running) for _ in range(3)):
                self.kinds[kind] += 1
                self.probes.append(seconds)
            for sock in socks:
                rest = b""
                while part := sock.recv(65536):
                    rest += part
                sock.close()
                self.streams += 1
                if b"[DONE]" not in rest or b'{"error"' in rest:
                    self.cut.append(f"trial {len(self.exits)}, {time.monotonic() - start:.1f} s: {rest[-200:]!r}")
            self.codes[process.wait(60)] += 1
            self.exits.append(time.monotonic() - start)
            assert not any(Path(f"/proc/{pid}").exists() for pid in children)

    def probe(self, running: Running) -> tuple[str, float]:
        """What /ready says to a newcomer, and after how many seconds."""
        start = time.perf_counter()
        try:
            kind = str(running.call("GET", "/ready")[0])
        except ConnectionRefusedError:
            kind = "refused"
        except (OSError, IndexError, ValueError):
            kind = "cut"
        return kind, time.perf_counter() - start

    def __str__(self) -> str:
        asked = ", ".join(f"p{100 * q:g} {1e3 * p_of(self.probes, q):.1f} ms" for q in (0.5, 0.9, 0.99))
        return (
            f"T15: {len(self.exits)} SIGTERMs, {self.streams} streams, {len(self.cut)} cut; exit codes {dict(self.codes)}, after "
            f"at most {max(self.exits):.1f} s; newcomers {dict(self.kinds)}, {asked}"
        )


def test_t15_a_hundred_sigterms_under_load() -> None:
    """Every second one with a keeper: no stream is cut, newcomers are refused at once, exit 0, no orphan."""
    ended = Ended()
    for trial in range(100):
        ended.trial(0.005 * trial, keeper=bool(trial % 2))
        if trial % 10 == 9:
            print(f"\n{ended} {ended.cut}", flush=True)
    assert not ended.cut, ended.cut
    assert set(ended.codes) == {0} and max(ended.exits) <= 31
    assert "200" not in ended.kinds and p_of(ended.probes, 0.5) <= 0.01


# ---------------------------------------------------------------------- T19: stalled readers
READERS = 200
LONG = {**BODY, "max_tokens": 400, "logprobs": 15}
"""A reply of more than what the kernel and asyncio hold."""


def stalled(port: int) -> socket.socket:
    """A client that sends a request with a long reply, takes the first bytes, and then nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.sendall(request(LONG))
    assert sock.recv(64)
    return sock


def gaps(server: Toy, replies: int, tokens: int = 800) -> list[float]:
    """Seconds between the chunks that one reader gets."""
    out: list[float] = []
    for _ in range(replies):
        with server.running.stream({**BODY, "max_tokens": tokens}) as sock:
            last, rest = time.perf_counter(), b""
            while b"[DONE]" not in rest:
                rest = rest[-10:] + sock.recv(65536)
                now = time.perf_counter()
                out.append(now - last)
                last = now
    return out


def gauge(server: Toy, *names: str) -> float:
    """Sum of the metrics whose names begin so."""
    lines = server.running.call("GET", "/metrics")[2].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


def open_requests(server: Toy) -> float:
    return gauge(server, "outrider_requests_started_total") - gauge(server, "vllm:request_success_total")


async def good_readers(port: int) -> None:
    """As many clients with the same request, that read all of it."""

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(LONG))
        await reader.read()
        writer.close()

    await asyncio.gather(*(one() for _ in range(READERS)))


def test_t19_two_hundred_stalled_readers() -> None:
    """They are dropped, and cost and delay others little: compared with good readers of the same texts, who come first."""
    with toy_process(READERS + 2, 64, 0.005, sure=6.0) as server:
        asyncio.run(good_readers(server.running.port))
        alone, memory = gaps(server, 4), server.memory()
        socks = [stalled(server.running.port) for _ in range(READERS)]
        try:
            until(lambda: gauge(server, "vllm:num_requests_running", "vllm:num_requests_waiting") == 0, 300)
            decoded, held, still = time.monotonic(), server.memory() - memory, open_requests(server)
            beside, until_then = gaps(server, 4), open_requests(server)
            falling = list[float]()
            while open_requests(server) and time.monotonic() < decoded + 60:
                falling += gaps(server, 1, 200)
            dropped = time.monotonic()
            until(lambda: server.descriptors() < 20, 60)  # the sockets too, though their readers still hold them open
            closed = time.monotonic()
        finally:
            for sock in socks:
                sock.close()
    print(
        f"\nT19: {still:.0f} of {READERS} stalled when their texts were ready, {until_then:.0f} after the comparison;"
    )
    print(
        f"  {held / READERS / 1024:.0f} KiB each more than good readers; the last dropped {dropped - decoded:.1f} s, "
        f"its socket closed {closed - decoded:.1f} s after the texts were ready"
    )
    for q in (0.5, 0.9, 0.99):
        one, two, three = (1e3 * p_of(found, q) for found in (alone, beside, falling))
        print(
            f"  another reader waits p{100 * q:g} {one:.2f} ms for a chunk alone, {two:.2f} beside them ({two / one - 1:+.1%}), "
            f"{three:.2f} while they are dropped ({three / one - 1:+.1%})"
        )
    assert still > 0.5 * READERS and until_then > 0
    assert held <= READERS * 256 * 1024
    assert dropped - decoded <= 30.5 and closed - decoded <= 35
    assert p_of(beside, 0.5) <= 1.1 * p_of(alone, 0.5)
