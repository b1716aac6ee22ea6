"""A real server on a loopback port, in a thread of the test process, and raw sockets to be rude to it with."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from outrider.build import build_engine
from outrider.engine.core import EngineCore
from outrider.engine.parts import Hooks
from outrider.serve.app import create_app
from outrider.serve.bridge import Bridge
from outrider.serve.server import Server, server_for
from outrider.serve.settings import Settings, digest
from outrider.serve.tickets import Limits
from outrider.serve.watch import Monitor

KEY = "test-key-123456"
RUNNING: set[int] = set()
"""Ports of the servers that run."""


@dataclass
class Running:
    """A server that runs. port: where. thread: its event loop's. watch: what it knows over time."""

    port: int
    server: Server
    thread: threading.Thread
    bridge: Bridge
    watch: Monitor

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self, seconds: float = 60.0) -> None:
        self.server.handle_exit(15, None)
        self.thread.join(seconds)
        assert not self.thread.is_alive()

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict, bytes]:
        """One request over a fresh connection: status, headers, body. `body` is sent as it is if bytes, else as JSON."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = {"Host": "127.0.0.1", "Connection": "close", "Content-Length": str(len(data))}
        lines |= {"Content-Type": "application/json"} if body is not None else {}
        lines |= headers or {}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
            sock.sendall(head.encode() + b"\r\n" + data)
            answer = b""
            while part := sock.recv(65536):
                answer += part
        top, _, rest = answer.partition(b"\r\n\r\n")
        first, *more = top.decode("latin-1").split("\r\n")
        found = {k.lower(): v for k, v in (line.split(": ", 1) for line in more)}
        return int(first.split()[1]), found, _unchunk(rest) if found.get("transfer-encoding") == "chunked" else rest

    def stream(self, body: dict[str, Any], path: str = "/v1/completions", key: str | None = None) -> socket.socket:
        """A socket that has sent a streaming request and got the first bytes of its stream."""
        data = json.dumps({**body, "stream": True}).encode()
        auth = f"Authorization: Bearer {key}\r\n" if key else ""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{auth}Content-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        seen = b""
        while b"data: " not in seen and b"error" not in seen:
            part = sock.recv(4096)
            assert part, seen
            seen += part
        return sock


def _unchunk(data: bytes) -> bytes:
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        n = int(size, 16)
        out, data = out + data[:n], data[n + 2 :]
    return out


def rewired(engine: EngineCore) -> Callable[..., EngineCore]:
    """Makes an engine on the same parts that a server looks on."""

    def build(*, sinks: tuple[Any, ...], controller: Any = None) -> EngineCore:
        parts = engine.parts
        made = engine.controller if controller is None else controller(parts.drafter, parts.rule, parts.target)
        return EngineCore(parts, Hooks(made, sinks), engine.options)

    return build


@contextmanager
def serving(
    keys: tuple[str, ...] = (), limits: Limits | None = None, engine: Any = None, **options: Any
) -> Iterator[Running]:
    """A server for the shipped pair (or for `engine`), stopped at the end of the block. arrange: called with its watch before it
    starts."""
    fixed = options.pop("fixed", False)
    settings = Settings(
        options.pop("model", "pycode"),
        tuple(digest(k) for k in keys),
        limits=limits or Limits(),
        grace=options.pop("grace", 5.0),
        pad=options.pop("pad", False),
        price=options.pop("price", None),
        webhook=options.pop("webhook", None),
        body_seconds=options.pop("body_seconds", 30.0),
        head_seconds=options.pop("head_seconds", 10.0),
        connections=options.pop("connections", 1024),
        cors=options.pop("cors", ()),
    )
    past, arrange = options.pop("past", None), options.pop("arrange", lambda watch: None)
    before = set(threading.enumerate())
    build = partial(build_engine, **{"slots": 8, **options}) if engine is None else rewired(engine)
    app = create_app(build, settings, adaptive=not fixed, past=past)
    arrange(app.state.watch)
    port = a_port()
    RUNNING.add(port)
    server = server_for(app, settings, "127.0.0.1", port)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), name="server")
    thread.start()
    running = Running(port, server, thread, app.state.bridge, app.state.watch)
    try:
        until(lambda: server.started or not thread.is_alive(), 60)
        assert server.started
        yield running
    finally:
        if thread.is_alive():
            running.stop()
    left = lambda: {t.name for t in set(threading.enumerate()) - before}  # noqa: E731
    RUNNING.remove(port)
    if not RUNNING:  # another server may have started threads of its own meanwhile
        until(lambda: not left(), say=left)  # no thread is left behind


def a_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(condition: Any, seconds: float = 60.0, say: Any = lambda: "") -> None:
    """Wait for a condition; fail if it never comes, with what `say` returns. A busy machine takes its time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not come true in time {say()}"
        time.sleep(0.005)


def p_of(values: Sequence[float], share: float) -> float:
    """The value that a `share` of the values do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
