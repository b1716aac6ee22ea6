"""HTTP requests to other servers, without following redirects."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any

from outrider.errors import ConfigError, printable


class Stay(urllib.request.HTTPRedirectHandler):
    """Redirects raise HTTPError: an API key and a text must reach only the server they were meant for."""

    def redirect_request(self, *_: object) -> None:  # type: ignore[override]
        return None


OPENER = urllib.request.build_opener(Stay)
"""Uses the proxies of the environment, as other clients do."""
DIRECT = urllib.request.build_opener(Stay, urllib.request.ProxyHandler({}))
"""Uses no proxy."""


def base_of(url: str, option: str = "--url") -> str:
    """The address of a server without a slash at its end or /v1. Raises ConfigError, in which `option` names what to mend."""
    base = url.strip().rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise ConfigError(f"{option} is not an http or https address")
    if "@" in base.partition("://")[2].partition("/")[0]:  # it would be printed with every error
        raise ConfigError(f"{option} has a user or a password in it: leave it out, and give a key with --api-key")
    return base


def refusal(base: str, error: urllib.error.HTTPError, option: str = "--url") -> str:
    """The sentence for an error, or for a direction to another place, which is not followed: the key is for this one."""
    if 300 <= error.code < 400:
        place = words(str(error.headers.get("Location", "another address")))
        return f"{base} sends elsewhere ({error.code}, to {place}): redirects are not followed, so give that address as {option}"
    try:
        said = error.read(2000).decode("utf-8", "replace")
    except (OSError, HTTPException):
        said = ""
    return f"{base} refused the request ({error.code}): {words(said)}"


def words(text: str) -> str:
    """A server's own words, in one short line."""
    return printable(" ".join(text.split()))[:300]


# ------------------------------------------------------------------ a whole answer within a time and a size
class Fault(Exception):
    """A server's answer is missing or cannot be used. kind: a word for it, of few; code: the HTTP status, if there was one."""

    def __init__(self, kind: str, sentence: str, code: int | None = None) -> None:
        super().__init__(sentence)
        self.kind, self.code = kind, code


@dataclass(frozen=True, slots=True)
class Answer:
    """body: at most as long as was allowed. kind: the content type, in small letters."""

    body: bytes
    kind: str


class _Cut:
    """The sockets of one request: shut when its time is over, however slowly bytes still come."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.over = False

    def add(self, found: socket.socket) -> None:
        self.sockets.append(found)
        if self.over:
            self.end()

    def end(self) -> None:
        self.over = True
        for one in self.sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class _Plain(HTTPConnection):
    def __init__(self, *args: Any, cut: _Cut, **more: Any) -> None:
        super().__init__(*args, **more)
        self.cut = cut

    def connect(self) -> None:
        super().connect()
        self.cut.add(self.sock)


class _Sealed(HTTPSConnection):
    def __init__(self, *args: Any, cut: _Cut, **more: Any) -> None:
        super().__init__(*args, **more)
        self.cut = cut

    def connect(self) -> None:
        super().connect()
        self.cut.add(self.sock)


class _Through(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections that `cut` can end."""

    def __init__(self, cut: _Cut) -> None:
        urllib.request.HTTPSHandler.__init__(self)
        self.cut = cut

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_Plain, cut=self.cut), req)  # type: ignore[arg-type]

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_Sealed, cut=self.cut), req)  # type: ignore[arg-type]


def get(url: str, key: str | None = None, *, seconds: float, most: int) -> Answer:
    """One GET. Raises Fault for what is no whole answer (2xx) of at most `most` bytes within `seconds`, counted from now to its
    last byte: a server that sends a byte now and then does not keep the caller."""
    cut = _Cut()
    timer = threading.Timer(seconds, cut.end)
    timer.daemon = True
    timer.start()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    opener = urllib.request.build_opener(Stay, _Through(cut))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=seconds) as reply:
            body = reply.read(most + 1)
            due, kind = reply.headers.get("Content-Length"), str(reply.headers.get("Content-Type", "")).lower()
    except urllib.error.HTTPError as error:
        with error:
            sentence = refusal(url, error, "the address")
            raise Fault("elsewhere" if 300 <= error.code < 400 else "refused", sentence, error.code) from None
    except (OSError, HTTPException, ValueError) as error:
        if cut.over or isinstance(error, TimeoutError) or "timed out" in str(error):
            raise Fault("slow", f"{url} gave no whole answer within {seconds:g} s") from None
        said = words(str(error) or type(error).__name__)
        raise Fault("silent", f"{url} cannot be reached ({said})") from None
    finally:
        timer.cancel()
    if cut.over:
        raise Fault("slow", f"{url} gave no whole answer within {seconds:g} s")
    if len(body) > most:
        raise Fault("large", f"{url} answered with more than {most >> 20} MiB")
    if due is not None and due.isdigit() and len(body) < int(due):
        raise Fault("cut", f"{url} broke off in the middle of its answer")
    return Answer(body, kind)
