"""The page of a watched server, served here: our server's own page on another server's figures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from types import FrameType
from typing import Any

from outrider.errors import ConfigError, OutriderError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ConfigError("the page of a watch needs starlette and uvicorn: pip install 'outrider[serve]'") from error

from outrider.integrations.watch.watcher import Watch
from outrider.serve.address import is_loopback
from outrider.serve.connection import guarded
from outrider.serve.dashboard import HEADERS, PAGE, PAGE_HEADERS
from outrider.serve.webhook import Webhook

Asked = Callable[[], "dict[str, Any] | None"]
GRACE = 5.0
"""Seconds that a request of ours gets to come back when the watch ends."""
CONNECTIONS = 64
"""Connections to the page at the same time."""
NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
"""Host names that are answered: a page elsewhere that resolves to this machine has another."""


@dataclass(slots=True)
class Watching:
    """A watch that goes on. every: seconds between two readings. log: makes the store's end, in the thread that uses it. step:
    one round of our own requests, returning the seconds to wait or None at its end; asked: what they have shown. past: runs of
    the store."""

    watch: Watch
    every: float = 2.0
    log: Callable[[], Any] | None = None
    step: Callable[[], float | None] | None = None
    asked: Asked = lambda: None
    past: Callable[[], dict[str, Any]] | None = None
    webhook: Webhook | None = None
    say: Callable[[str], object] = lambda sentence: None
    hosts: frozenset[str] = NAMES
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "watch"))
    _log: Any = None
    _over: threading.Event = field(default_factory=threading.Event)
    _asking: threading.Thread | None = None

    def open(self) -> None:
        """Open the store, in the one thread that reads and writes. Raises ConfigError."""
        if self.log is not None:
            self._log = self._thread.submit(self.log).result()

    async def run(self) -> None:
        """Read, judge and keep until cancelled."""
        loop = asyncio.get_running_loop()
        sender = asyncio.create_task(self.webhook.run()) if self.webhook else None
        if self.step is not None:  # a daemon: a server that hangs must not keep us from ending
            self._asking = threading.Thread(target=self._ask, name="watch-requests", daemon=True)
            self._asking.start()
        try:
            while True:
                began = monotonic()
                for notice in await loop.run_in_executor(self._thread, self.tick):
                    self._tell(notice)
                await asyncio.sleep(max(0.05, self.every - (monotonic() - began)))
        finally:
            self._over.set()
            if sender is not None:
                sender.cancel()

    def tick(self) -> list[Any]:
        """One reading; the alerts that began and ended. What goes wrong besides is a fault like others: the watch goes on."""
        try:
            notices = self.watch.tick()
        except Exception as error:
            self.watch.fault("watch", f"a reading failed here ({type(error).__name__}: {error})")
            return []
        if self._log is not None:
            try:
                self._log.tick(self.asked)
            except OutriderError as error:
                self.watch.fault("store", str(error))
        return notices

    def _tell(self, notice: Any) -> None:
        ended = "" if notice.firing else " is over"
        self.say(f"{notice.severity}: {notice.summary}{ended}")
        if self.webhook is not None:
            self.webhook.put(notice)

    def _ask(self) -> None:
        assert self.step is not None
        while not self._over.is_set():
            try:
                wait = self.step()
            except (
                Exception
            ) as error:  # a text that cannot be scored must not end the watch; said once, and no more are sent
                self.watch.fault("requests", f"requests of our own have ended: {error}")
                return
            if wait is None:
                return
            self._over.wait(min(wait, 5.0))

    @property
    def busy(self) -> bool:
        """Whether a request of ours is still on its way: its thread cannot be ended, only the process can."""
        return self._asking is not None and self._asking.is_alive()

    def close(self) -> None:
        """Finish the store's run; a request of ours that is on its way gets some seconds."""
        self._over.set()
        if self._asking is not None:
            self._asking.join(GRACE)
        try:
            if self._log is not None:
                self._thread.submit(self._log.close, self.asked()).result()
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ routes
    async def page(self, request: Request) -> Response:
        """GET /: the page."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def state(self, request: Request) -> Response:
        """GET /outrider/state: all data of the page; `?after=T` leaves out the history up to time T."""
        try:
            after = float(request.query_params.get("after", "0"))
        except ValueError:
            raise HTTPException(400, "after must be a time in seconds") from None
        asked = await asyncio.to_thread(self.asked)
        found = self.watch.state(after) | {"store": self.past is not None, "asked": asked}
        return JSONResponse(found, headers={"cache-control": "no-store"})

    async def reading(self, request: Request) -> Response:
        """GET /outrider/reading: what `outrider watch --once --json` prints."""
        found = self.watch.reading() | {"asked": await asyncio.to_thread(self.asked)}
        return JSONResponse(found, headers={"cache-control": "no-store"})

    async def runs(self, request: Request) -> Response:
        """GET /outrider/runs: runs of the store."""
        if self.past is None:
            raise HTTPException(404, "no store is shown: start with --store FILE")
        return JSONResponse(await asyncio.to_thread(self.past), headers={"cache-control": "no-store"})


class Local:
    """Answers only under the names of this machine, and says so in the headers that keep other pages out."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = ((k.encode(), v.encode()) for k, v in HEADERS.items())
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        known = "*" in self.hosts or name in self.hosts
        refusal = PlainTextResponse("this host name is not served\n", 403)
        await (self.app if known else refusal)(scope, receive, headed)


def create_app(watching: Watching) -> ASGIApp:
    """The application: it reads from its start to its end."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(watching.run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(watching.close)

    routes = [
        Route("/", watching.page),
        Route("/outrider/state", watching.state),
        Route("/outrider/reading", watching.reading),
        Route("/outrider/runs", watching.runs),
    ]
    return Local(Starlette(routes=routes, lifespan=lifespan), watching.hosts)


class PageServer(uvicorn.Server):
    """uvicorn whose end by a signal is an end like others: uvicorn itself raises the signal again behind it."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends, a second one at once."""
        self.force_exit = self.should_exit
        self.should_exit = True


def server_for(app: ASGIApp, host: str, port: int) -> PageServer:
    """A server for the page. Raises ConfigError for an address that others can reach: the page asks nobody for a key."""
    if not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached by others, and the page of a watch has no keys: use a loopback address"
        )
    return PageServer(guarded(app, host, port, connections=CONNECTIONS, head_seconds=10.0, timeout_graceful_shutdown=3))
