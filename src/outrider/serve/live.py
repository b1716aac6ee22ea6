"""What the page at `/` shows: raw sums every second, the present load, and a playground whose tokens say where they came from."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict
from time import monotonic, time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from outrider import __version__
from outrider.control.adaptive import Adaptive, Outlook
from outrider.engine.sequence import Event
from outrider.errors import OutriderError
from outrider.serve.bridge import Bridge
from outrider.serve.guard import body_of
from outrider.serve.openai import BadField, CompletionRequest, parse
from outrider.serve.settings import Settings
from outrider.serve.sse import DONE, EventStream, frame
from outrider.serve.v1 import OpenAI
from outrider.telemetry.ledger import ledger

PERIOD, KEPT = 1.0, 600
"""Seconds between two samples of the sums, and how many are kept."""
BROKEN = "\N{REPLACEMENT CHARACTER}"


class Live:
    """The page's data and its playground."""

    def __init__(self, bridge: Bridge, settings: Settings, v1: OpenAI) -> None:
        self.bridge, self.settings, self.v1 = bridge, settings, v1
        self.history: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.since = monotonic()

    async def watch(self) -> None:
        """Sample the sums until cancelled."""
        while True:
            self.history.append(self.sample())
            await asyncio.sleep(PERIOD)

    def sample(self) -> dict[str, Any]:
        """The sums now. Everything is cumulative: whoever reads forms differences, and ratios of them."""
        m, c = self.bridge.metrics, self.bridge.metrics.counts
        look = self.outlook()
        return {
            "t": time(),
            "steps": m.steps,
            "sequence_steps": c.steps,
            "emitted": c.emitted,
            "proposed": c.proposed,
            "accepted": c.accepted,
            "rejected": c.rejected,
            "judged": c.judged,
            "risk": c.risk,
            "spread": c.spread,
            "seconds": dict(m.seconds),
            "running": m.running if self.bridge.tickets else 0,
            "waiting": m.waiting if self.bridge.tickets else 0,
            "length": look.length if look else None,
            "speedup": look.speedup if look else None,
        }

    def outlook(self) -> Outlook | None:
        """What the controller believes, if it is one that measures."""
        controller = self.bridge.engine.controller
        return controller.outlook() if isinstance(controller, Adaptive) else None

    async def state(self, request: Request) -> Response:
        """GET /outrider/state: everything the page needs; `?after=T` leaves out the history up to time T."""
        try:
            after = float(request.query_params.get("after", "0"))
        except ValueError:
            raise BadField("after must be a time in seconds", "after") from None
        engine, c = self.bridge.engine, self.bridge.metrics.counts
        look, book = self.outlook(), ledger(c)
        return JSONResponse(
            {
                "server": {
                    "model": self.settings.model,
                    "version": __version__,
                    "uptime": monotonic() - self.since,
                    "drafter": engine.parts.drafter.name,
                    "rule": engine.parts.rule.name,
                    "lossless": engine.parts.rule.lossless,
                    "slots": engine.scheduler.slots,
                    "queue": self.bridge.limits.queue,
                    "longest": engine.parts.drafter.max_depth,
                    "max_length": engine.max_length,
                    "ready": self.bridge.ready,
                },
                "now": self.sample(),
                "positions": {"judged": c.judged_at, "accepted": c.accepted_at},
                "ledger": {
                    "predicted": book.predicted,
                    "observed": book.observed,
                    "low": book.low,
                    "high": book.high,
                    "agrees": book.agrees,
                },
                "outlook": asdict(look) if look else None,
                "requests": self._requests(),
                "outcomes": dict(self.bridge.metrics.outcomes),
                "refused": dict(self.bridge.metrics.refused),
                "history": [s for s in self.history if s["t"] > after],
            },
            headers={"cache-control": "no-store"},
        )

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
        body = parse(CompletionRequest, await body_of(request, self.settings.body, self.settings.body_seconds))
        if len(body.prompts) * body.samples > 1:
            raise BadField("the playground shows one sample", "n")
        ticket = (await self.v1.begin(body)).ticket
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


def coloured(decode: Any, event: Event) -> list[list[str]]:
    """[text, origin] pairs of an event: token by token where the pieces add up to its text, otherwise in one piece."""
    pieces = [decode([token]) for token in event.tokens]
    if "".join(pieces) == event.text:
        return [[piece, origin] for piece, origin in zip(pieces, event.origins, strict=True)]
    return [[event.text, event.origins[-1] if event.origins else "sampled"]] if event.text else []
