"""Connections that owe a request are ended, make room for others, and hide nothing."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from outrider.serve.connection import RESERVED
from tests.serve.harness import Running, serving, until

LONG = {"model": "pycode", "prompt": "def f(", "max_tokens": 900, "ignore_eos": True, "temperature": 1.0}
MOST = 6


@pytest.fixture(scope="module")
def narrow() -> Iterator[Running]:
    """Six connections, and half a second for a head."""
    with serving(slots=8, connections=MOST, head_seconds=0.5) as running:
        yield running


def connected(running: Running, data: bytes = b"") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", running.port), timeout=10)
    sock.sendall(data)
    return sock


def closed(sock: socket.socket, seconds: float = 5.0) -> bool:
    """Whether the server ends the connection in time."""
    sock.settimeout(seconds)
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def reply_of(sock: socket.socket) -> bytes:
    """One reply, by its length."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        part = sock.recv(65536)
        assert part, answer
        answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < size:
        body += sock.recv(65536)
    return head + b"\r\n\r\n" + body


def request_of(body: dict) -> bytes:
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def test_a_head_has_its_time_however_it_trickles(narrow: Running) -> None:
    silent, half = connected(narrow), connected(narrow, b"GET /health HTTP/1.1\r\nX: ")
    behind = connected(narrow, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    end = time.monotonic() + 5
    while time.monotonic() < end:
        for sock in (half, behind):
            try:
                sock.sendall(b"G")
            except OSError:
                end = 0
        time.sleep(0.05)
    for sock in (silent, half, behind):
        with sock:
            assert closed(sock)
    until(lambda: not narrow.server.server_state.connections)


def test_newcomers_get_in_past_those_who_owe(narrow: Running) -> None:
    """As many silent connections as there may be, twice: everybody is answered, and the oldest of them have gone."""
    held = [connected(narrow, b"POST / HTTP/1.1\r\n") for _ in range(2 * MOST)]
    for _ in range(3):
        assert narrow.call("GET", "/health")[0] == 200
        assert narrow.call("POST", "/v1/completions", {**LONG, "max_tokens": 2})[0] == 200
    assert len(narrow.server.server_state.connections) <= MOST
    assert closed(held[0])
    for sock in held:
        sock.close()


def test_when_all_are_served_health_still_answers(narrow: Running) -> None:
    streams = [narrow.stream(LONG) for _ in range(MOST)]
    assert narrow.call("GET", "/health")[0] == 200
    status, _, reply = narrow.call("POST", "/v1/completions", {**LONG, "max_tokens": 2})
    if status != 200:  # a stream may have ended meanwhile
        assert status == 503 and "too many connections" in json.loads(reply)["error"]["message"]
    for sock in streams:
        sock.close()
    until(lambda: not narrow.server.server_state.connections)
    assert RESERVED >= 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("extra", [b"\r\n", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 2000])
def test_bytes_behind_a_request_do_not_hide_that_its_client_has_gone(
    server: Running, extra: bytes, stream: bool
) -> None:
    """With the request or after it, few or many: the slots are free at once."""
    for together in (True, False):
        data = request_of({**LONG, "stream": stream, "n": 2})
        sock = connected(server, data + extra if together else data)
        until(lambda: server.bridge.held == 2)
        if not together:
            sock.sendall(extra)
            time.sleep(0.05)
        sock.close()
        until(lambda: server.bridge.held == 0, 3)
    assert server.bridge.metrics.outcomes["abort"] > 0


def test_a_reply_before_pipelined_bytes_is_whole_and_the_last(server: Running) -> None:
    sock = connected(server, request_of({**LONG, "max_tokens": 3}) + b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    answer = b""
    with sock:
        while part := sock.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer.lower()
    assert answer.count(b"HTTP/1.1") == 1 and json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]


def test_a_body_of_crumbs_is_refused(server: Running) -> None:
    """A byte a chunk costs the loop as much as a page a chunk does; whoever streams a body in sensible chunks is served."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    data = json.dumps({"model": "pycode", "prompt": "x" * 5000, "max_tokens": 2}).encode()

    def reply_to(size: int) -> bytes:
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        sock = connected(server, head + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n")
        with sock:
            return sock.recv(65536) if size == 1 else reply_of(sock)

    assert reply_to(1).startswith(b"HTTP/1.1 400")
    assert b"context holds" in reply_to(100)


def test_two_requests_after_each_other_share_a_connection(server: Running) -> None:
    sock = connected(server)
    for _ in range(2):
        sock.sendall(request_of({**LONG, "max_tokens": 2}))
        answer = reply_of(sock)
        assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" not in answer.lower()
    sock.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/nothing"])
def test_who_sends_too_much_can_read_why(server: Running, path: str) -> None:
    """A client that sends its whole body before it reads, and then wants the connection closed: the refusal comes before the end of
    its body, and is not lost with the bytes that nobody reads."""
    size = 6 << 20
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode())
        for _ in range(size >> 16):
            sock.sendall(b" " * (1 << 16))
        answer = b""
        while part := sock.recv(65536):
            answer += part
    assert answer.split(b" ")[1] == (b"413" if path == "/v1/completions" else b"404") and b'"message":' in answer


def test_bytes_behind_a_refusal_are_heard_within_bounds(server: Running) -> None:
    """Not longer than some seconds, and not more than some megabytes: then the connection is closed, and its place is free."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: text/plain\r\n"
    for crumbs in (b"", b" " * (1 << 20)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
            sock.sendall(head + b"Content-Length: 999999999\r\n\r\n")
            sent = 0
            with pytest.raises(OSError) if crumbs else nullcontext():
                while crumbs and sent < 200 << 20:
                    sent += sock.send(crumbs)
            assert sent < 64 << 20
        until(lambda: not server.server.server_state.connections)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/nothing", "/health"])
def test_what_is_no_http_is_answered_once(server: Running, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """A body that breaks the rules of HTTP in the bytes of its head: the application does not answer too, which would be logged."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with caplog.at_level(logging.ERROR), socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(head.encode() + b"zz\r\n")
        answer = b""
        while part := sock.recv(65536):
            answer += part
        until(lambda: not server.server.server_state.connections)
    assert answer.count(b"HTTP/1.1") == 1 and answer.split(b" ")[1] == b"400"
    assert not caplog.records


@pytest.mark.parametrize("other", ["websocket", "h2c", "TLS/1.3"])
def test_who_asks_for_another_protocol_is_answered_in_this_one(
    server: Running, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    """And the operator is not told to install a library for web sockets."""
    asks = {"Connection": "Upgrade, close", "Upgrade": other, "Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw=="}
    assert server.call("GET", "/health", headers=asks)[0] == 200
    assert not caplog.records
