"""Data of the page at `/`: raw sums, the present load, past runs, and a playground that shows the origin of every token."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from time import monotonic
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from outrider import __version__
from outrider.engine.sequence import Event
from outrider.errors import OutriderError
from outrider.serve.bridge import Bridge
from outrider.serve.middleware import OWNER
from outrider.serve.parsing import BadField
from outrider.serve.requests import CompletionRequest
from outrider.serve.routes import OpenAI
from outrider.serve.settings import Settings
from outrider.serve.sse import DONE, EventStream, frame
from outrider.serve.tickets import Unavailable
from outrider.serve.watch import Monitor, Watching
from outrider.telemetry.ledger import ledger

Past = Callable[[], dict[str, Any]]
"""Reads a store: {"runs": [...], "experiments": [...]}; called in another thread than the event loop."""
READ_SECONDS = 10.0
"""Seconds a page waits for the store."""


class Live:
    """The page's data and its playground."""

    def __init__(
        self, bridge: Bridge, settings: Settings, v1: OpenAI, watch: Monitor, past: Past | None = None
    ) -> None:
        self.bridge, self.settings, self.v1, self.watch, self._past = bridge, settings, v1, watch, past
        self._reading: asyncio.Future[dict[str, Any]] | None = None

    async def state(self, request: Request) -> Response:
        """GET /outrider/state: all data of the page; `?after=T` leaves out the history up to time T."""
        try:
            after = float(request.query_params.get("after", "0"))
        except ValueError:
            raise BadField("after must be a time in seconds", "after") from None
        engine, watch = self.bridge.engine, self.watch
        server = {
            "pid": os.getpid(),
            "drafter": engine.parts.drafter.name,
            "rule": engine.parts.rule.name,
            "lossless": engine.parts.rule.lossless,
            "slots": engine.scheduler.slots,
            "queue": self.bridge.limits.queue,
            "longest": engine.parts.drafter.max_depth,
            "max_length": engine.max_length,
            "ready": self.bridge.ready,
            "notices": engine.notices,
        }
        shown = state_of(watch, self.settings.model, server, self._requests(), after)
        return JSONResponse({**shown, "store": self._past is not None}, headers={"cache-control": "no-store"})

    async def runs(self, request: Request) -> Response:
        """GET /outrider/runs: runs and experiments of the store the operator named, newest first; 404 without a store."""
        if self._past is None:
            raise HTTPException(404, "no store is shown: start with --store FILE")
        if self._reading is None or self._reading.done():  # one at a time: prompts need the same threads
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._past))
        try:
            async with asyncio.timeout(READ_SECONDS):
                found = await asyncio.shield(self._reading)
        except TimeoutError:
            raise Unavailable("the store takes too long to read: try again later") from None
        return JSONResponse(found, headers={"cache-control": "no-store"})

    def _requests(self) -> list[dict[str, Any]]:
        """Running requests, oldest first: numbers and origins of tokens, never text."""
        now = monotonic()
        return [
            {
                "id": t.id[:8],
                "age": now - t.arrived,
                "samples": t.choices,
                "prompt": t.prompt_tokens,
                "tokens": sum(len(s.tokens) - s.prompt for s in t.sequences),
                "waiting": t.admitted is None,
                "origins": "".join(t.origins),
            }
            for t in list(self.bridge.tickets.values())[:64]
        ]

    # ------------------------------------------------------------------ the playground
    async def play(self, request: Request) -> EventStream:
        """POST /outrider/play: a streamed completion of one sample, each piece of text with the origin of its token."""
        body = await self.v1.body(request, CompletionRequest)
        if len(body.prompts) * body.samples > 1:
            raise BadField("the playground shows one sample", "n")
        if body.echo or body.prompt_logprobs is not None:
            name = "echo" if body.echo else "prompt_logprobs"
            raise BadField(f"the playground shows new text alone: leave {name} out", name)
        ticket = (await self.v1.begun(request, self.v1.begin(body, request.scope.get(OWNER, 0)))).ticket
        return EventStream(self._pieces(ticket), lambda: self.bridge.release(ticket))

    async def _pieces(self, ticket: Any) -> AsyncIterator[bytes]:
        start, tokens, accepted = monotonic(), 0, 0
        decode = self.bridge.engine.tokenizer.decode
        try:
            async for batch in self.bridge.events(ticket):
                out: list[list[str]] = []
                for _, event in batch:
                    out += coloured(decode, event)
                    tokens += len(event.tokens)
                    accepted += event.origins.count("accepted")
                done = batch[-1][1].finish_reason
                seconds = monotonic() - start
                yield frame(
                    {"pieces": out, "steps": len(batch), "tokens": tokens, "accepted": accepted}
                    | {"seconds": seconds, "finish": done}
                )
        except OutriderError as error:
            yield frame({"error": str(error)})
        yield DONE


def state_of(
    watch: Watching, model: str, server: dict[str, Any], requests: list[dict[str, Any]], after: float
) -> dict[str, Any]:
    """All data of the page but whether it has a store: raw sums, estimates, alerts, and the history after a time.

    server: what is fixed about the engine. requests: its running ones.
    """
    metrics = watch.bridge.metrics
    c, residuals = metrics.counts, metrics.residuals
    look, book = watch.outlook(), ledger(metrics.evidence)
    fixed = {"model": model, "version": __version__, "uptime": monotonic() - watch.began}
    return {
        "server": fixed | server,
        "now": watch.sample(),
        "positions": {"judged": c.judged_at, "accepted": c.accepted_at},
        "ledger": {
            "predicted": book.predicted,
            "observed": book.observed,
            "low": book.low,
            "high": book.high,
            "agrees": not residuals.doubted,
            "log_evidence": residuals.log_evidence,
        },
        "outlook": asdict(look) if look else None,
        "speeds": watch.speeds(),
        "resources": watch.resources(),
        "alerts": watch.alerts.table(),
        "requests": requests,
        "outcomes": dict(metrics.outcomes),
        "refused": dict(metrics.refused),
        "history": [s for s in watch.history if s["t"] > after],
    }


def coloured(decode: Any, event: Event) -> list[list[str]]:
    """[text, origin] pairs of an event: token by token if the pieces add up to its text, otherwise in one piece."""
    pieces = [decode([token]) for token in event.tokens]
    if "".join(pieces) == event.text:
        return [[piece, origin] for piece, origin in zip(pieces, event.origins, strict=True)]
    return [[event.text, event.origins[-1] if event.origins else "sampled"]] if event.text else []
