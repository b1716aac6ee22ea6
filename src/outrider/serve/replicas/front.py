"""The address that clients know: checks requests, passes them to replicas, and shows what all of them have counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, Protocol, runtime_checkable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from outrider.errors import OutriderError
from outrider.serve.access import Log
from outrider.serve.app import openapi, page, shared_with, version
from outrider.serve.body import Bodies
from outrider.serve.middleware import HEADERS, RequestGate, on_error, reply
from outrider.serve.replicas.calls import PASSED, Call, Lost, Replicas, conversation_key
from outrider.serve.replicas.sums import Sums, described, sample
from outrider.serve.settings import Settings
from outrider.serve.sse import DONE, frame
from outrider.serve.tickets import Unavailable
from outrider.telemetry.prometheus import CONTENT_TYPE, Metrics

logger = logging.getLogger(__name__)
TROUBLE = (OutriderError, OSError, ValueError, TimeoutError)
"""What reading a replica may raise while it starts or ends."""
PERIOD = 1.0
"""Seconds between two readings of the replicas."""
FRESH = 0.2
"""Seconds for which a reading is as good as a new one."""
MISSED = 5
"""Readings without an answer after which a replica's counters are those of one that is gone."""
VALUES = 5_000_000
"""Most values of a body; a replica knows its model's context, and has a limit of its own."""
KEPT = 600
"""Readings that the page can look back on."""
ANSWERED = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/outrider/play",
)
"""What replicas answer to clients' bodies: all that `serve.app` does."""


@runtime_checkable
class RecordKeeper(Protocol):
    """An experiment whose requests are placed by the replicas, all by one hash, and whose records are kept here."""

    def start(self) -> None: ...
    def adopt(self, label: str, unit: str, record: dict[str, Any]) -> None: ...
    def stopped(self) -> list[str]: ...
    def close(self) -> None: ...


class Front:
    """The state of the front. tickets: open requests; a server drains by them, as by an engine's."""

    def __init__(self, replicas: Replicas, settings: Settings, keeper: RecordKeeper | None = None) -> None:
        self.replicas, self.settings, self.keeper = replicas, settings, keeper
        self.sums, self.metrics = Sums(), Metrics(settings.model)
        self.draining, self.alive = False, True
        self.tickets: dict[int, str] = {}
        self.outcomes: Counter[str] = Counter()
        self.history: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._bodies = Bodies(settings.body, settings.body_seconds)
        self._began, self._number = monotonic(), 0
        self._missed: Counter[str] = Counter()
        self._looking, self._looked = asyncio.Lock(), float("-inf")

    # ------------------------------------------------------------------ life
    def drain(self) -> None:
        """Accept no new requests."""
        self.draining = True

    async def drain_requests(self, grace: float) -> None:
        """Wait for open requests, at most `grace` seconds; the replicas end the rest."""
        end = monotonic() + grace
        while self.tickets and monotonic() < end:
            await asyncio.sleep(0.05)

    async def watch(self) -> None:
        """Read the replicas from time to time, until cancelled."""
        while True:
            try:
                await self.look(0.0)
            except TROUBLE as error:
                logger.debug("the replicas could not be read: %s", error)
            except Exception:  # what is shown grows old; what is served does not need it
                logger.exception("the replicas could not be read")
            await asyncio.sleep(PERIOD)

    async def look(self, age: float = FRESH) -> None:
        """A reading of all replicas that is at most `age` seconds old. One at a time: readings must come in their order."""
        async with self._looking:
            if monotonic() - self._looked > age:
                await self._read()
                self._looked = monotonic()

    async def _read(self) -> None:
        """Their sums, and the records of an experiment."""
        stopped = json.dumps(self.keeper.stopped() if self.keeper else [])
        calls = [Call("GET", "/outrider/state", b"after=1e18"), Call("GET", "/metrics")]
        calls += [Call("POST", "/outrider/ended", body=stopped.encode())] * bool(self.keeper)
        found = await self.replicas.ask(calls)
        good = {n: a for n, a in found.items() if all(status == 200 for status, _ in a)}
        self.sums.update({n: (json.loads(a[0][1]), a[1][1].decode()) for n, a in good.items()})
        for name in list(self.sums.live):
            self._missed[name] = 0 if name in good else self._missed[name] + 1
        self.sums.forget([n for n, times in self._missed.items() if times >= MISSED])
        self._missed = Counter({n: t for n, t in self._missed.items() if t < MISSED})
        for answers in good.values() if self.keeper else ():
            for ended in json.loads(answers[2][1]):
                assert self.keeper is not None
                self.keeper.adopt(ended["label"], ended["unit"], ended["record"])
        if (state := self.sums.state(monotonic() - self._began)) is not None:
            self.history.append(state["now"])

    # ------------------------------------------------------------------ routes
    async def passed(self, request: Request) -> Response:
        """A client's request, answered by a replica."""
        if self.draining:
            raise Unavailable("the server is draining: send the request again elsewhere")
        body, key = b"", ""
        if request.method == "POST":
            parsed = await self._bodies.read(request, VALUES)
            body, key = json.dumps(parsed).encode(), conversation_key(parsed)
        headers = tuple((k, v) for k, v in request.scope["headers"] if k in PASSED)
        call = Call(request.method, request.url.path, request.url.query.encode(), headers, body)
        return Passed(self, call, key)

    async def health(self, request: Request) -> Response:
        """GET /health"""
        return Response(status_code=200)

    async def ready(self, request: Request) -> Response:
        """GET /ready: 200 while a replica serves."""
        serving = [r.name for r in self.sums.live.values() if r.state["server"]["ready"] and not self._missed[r.name]]
        if serving and not self.draining:
            return PlainTextResponse(f"ready: {len(serving)} replicas\n")
        return PlainTextResponse(f"not ready: {'draining' if self.draining else 'no replica serves'}\n", 503)

    async def exposition(self, request: Request) -> Response:
        """GET /metrics: sums over all replicas that there ever were, and gauges of each that is there."""
        with contextlib.suppress(*TROUBLE):
            await self.look()
        return Response(self.sums.exposition(self._lines()), headers={"content-type": CONTENT_TYPE})

    def _lines(self) -> list[str]:
        lines = described(
            "outrider_front_requests", "counter", "Requests passed to a replica, by how their reply ended."
        )
        lines += [
            sample("outrider_front_requests_total", [("outcome", k)], self.outcomes[k])
            for k in ("answered", "left", "lost", "refused")
        ]
        lines += described(
            "outrider_front_responses", "counter", "Replies of the front, refusals of its own among them."
        )
        seen = sorted(self.metrics.responses.items())
        lines += [sample("outrider_front_responses_total", [("route", r), ("code", c)], n) for (r, c), n in seen]
        lines += described("outrider_front_open_requests", "gauge", "Requests whose reply has not ended.")
        lines.append(sample("outrider_front_open_requests", (), len(self.tickets)))
        lines += described("outrider_replicas", "gauge", "Replicas that answer.")
        lines.append(sample("outrider_replicas", (), len(self.sums.live)))
        lines += described(
            "outrider_replicas_gone", "counter", "Replicas that have ended since the start; their counts are kept."
        )
        lines.append(sample("outrider_replicas_gone_total", (), self.sums.gone))
        return lines

    async def state(self, request: Request) -> Response:
        """GET /outrider/state: as one server's, of all replicas together, and a row for each."""
        with contextlib.suppress(*TROUBLE):
            await self.look()
        state = self.sums.state(monotonic() - self._began)
        if state is None:
            raise Unavailable("no replica serves yet: try again in some seconds")
        try:
            after = float(request.query_params.get("after", "0"))
        except ValueError:
            after = 0.0
        state["history"] = [s for s in self.history if s["t"] > after]
        return JSONResponse(state, headers={"cache-control": "no-store"})


class Passed(Response):
    """The reply of a replica as it comes. A client that leaves ends the request there; a replica that ends, the reply."""

    def __init__(self, front: Front, call: Call, key: str) -> None:
        super().__init__()
        self.front, self.call, self.key = front, call, key
        self.outcome: str | None = None
        """How the reply ended, once that is known."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        front = self.front
        front._number += 1
        number, front.tickets[front._number] = front._number, self.key
        sending = asyncio.create_task(self._send(scope, receive, send))
        leaving = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            front.outcomes[self.outcome or "left"] += 1
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            front.tickets.pop(number, None)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts, begun, stream, refused = self.front.replicas.forward(self.call, self.key), False, False, False
        try:
            async for part in parts:
                if part.status is not None:
                    begun = True
                    stream = any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in part.headers)
                    refused = part.status >= 400
                    headers = [
                        (k, v) for k, v in part.headers if k.decode("latin-1") not in HEADERS
                    ]  # the gate adds its own
                    await send({"type": "http.response.start", "status": part.status, "headers": headers})
                if part.body:
                    await send({"type": "http.response.body", "body": part.body, "more_body": True})
            self.outcome = "refused" if refused else "answered"
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (Lost, Unavailable) as error:
            self.outcome = "lost" if isinstance(error, Lost) else "refused"
            await self._sorry(error, begun, stream, scope, receive, send)
        finally:
            with contextlib.suppress(Exception):
                await parts.aclose()  # type: ignore[attr-defined]

    async def _sorry(
        self, error: OutriderError, begun: bool, stream: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Say that the reply ends here, in whatever way is still open."""
        if not begun:
            await reply(503, str(error), "server_error", headers={"retry-after": "1"})(scope, receive, send)
        elif stream:
            said = frame({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
            await send({"type": "http.response.body", "body": said + DONE, "more_body": False})
        else:
            raise error  # a whole body that stops short: the connection is closed, and the client sees that it is


async def gone(receive: Receive) -> None:
    """Return when the client has left."""
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


def create_front(replicas: Replicas, settings: Settings, keeper: RecordKeeper | None = None) -> Starlette:
    """The application; its `state.bridge` is the Front, by which `server.Server` drains it."""
    front = Front(replicas, settings, keeper)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await replicas.start()
        if keeper is not None:
            keeper.start()
        watching = asyncio.create_task(front.watch())
        yield
        front.drain()
        await front.drain_requests(settings.grace)
        watching.cancel()
        with contextlib.suppress(Exception):
            await front.look(0.0)
        await replicas.close(settings.grace)
        if keeper is not None:
            await asyncio.to_thread(keeper.close)

    routes = [
        Route("/", page),
        Route("/health", front.health),
        Route("/ready", front.ready),
        Route("/metrics", front.exposition),
        Route("/version", version),
        Route("/openapi.json", openapi),
        Route("/outrider/state", front.state),
        Route("/outrider/runs", front.passed),
        Route("/v1/models", front.passed),
        Route("/v1/models/{id:path}", front.passed),
        Route("/tokenizer_info", front.passed),
        *(Route(path, front.passed, methods=["POST"]) for path in ANSWERED),
    ]
    known = frozenset(route.path for route in routes)
    guard = Middleware(RequestGate, settings=settings, metrics=front.metrics, routes=known)
    handlers: dict[Any, Any] = {OutriderError: on_error, HTTPException: on_error}
    layers = [*shared_with(settings.cors), Middleware(Log), guard]
    app = Starlette(routes=routes, middleware=layers, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    app.state.bridge = front
    return app
