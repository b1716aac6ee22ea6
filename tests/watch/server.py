"""Servers to be watched: one that answers with any bytes it is given, slowly or never, and the pages that real ones gave."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (Path(__file__).parent / "pages").glob("*.txt")}
"""Parts of pages by engine: vLLM 0.32's and llama.cpp's as they came, SGLang's written in the form of its sources."""


def ok(body: str | bytes, kind: str = "text/plain; version=0.0.4") -> bytes:
    """A whole reply."""
    data = body.encode() if isinstance(body, str) else body
    return (
        f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
        + data
    )


def status(code: int, *headers: str, body: str = "no") -> bytes:
    """A reply with another status."""
    more = "".join(f"{h}\r\n" for h in headers)
    return f"HTTP/1.1 {code} X\r\n{more}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


@dataclass
class Fake:
    """answer: bytes for a path and the whole request; None closes without a word. drip: seconds between single bytes; hang:
    whether it never answers. asked: paths so far."""

    port: int = 0
    answer: Callable[[str, str], bytes | None] = lambda path, request: None
    drip: float = 0.0
    hang: bool = False
    asked: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serves(self, page: str | bytes) -> None:
        """Answer /metrics with a page, and everything else with 404."""
        self.answer = lambda path, request: ok(page) if path == "/metrics" else status(404)

    def one(self, conn: socket.socket) -> None:
        with conn, suppress(OSError):
            conn.settimeout(5)
            request = b""
            while b"\r\n\r\n" not in request:
                part = conn.recv(65536)
                if not part:
                    return
                request += part
            text = request.decode("latin-1")
            path = text.split()[1]
            self.asked.append(path)
            if self.hang:
                self.over.wait(30)
                return
            data = self.answer(path, text)
            if data is None:
                return
            if not self.drip:
                conn.sendall(data)
                return
            for i in range(len(data)):
                if self.over.wait(self.drip):
                    return
                conn.sendall(data[i : i + 1])


@contextmanager
def fake(page: str | bytes | None = None) -> Iterator[Fake]:
    """A server that runs within the block."""
    one = Fake()
    if page is not None:
        one.serves(page)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one.port = listener.getsockname()[1]
        threads: list[threading.Thread] = []

        def run() -> None:
            while True:
                try:
                    conn, _ = listener.accept()
                except OSError:
                    return
                thread = threading.Thread(target=one.one, args=(conn,))
                thread.start()
                threads.append(thread)

        accepting = threading.Thread(target=run)
        accepting.start()
        try:
            yield one
        finally:
            one.over.set()
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            for thread in [accepting, *threads]:
                thread.join(10)
                assert not thread.is_alive()
