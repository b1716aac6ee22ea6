"""What the server says while it runs, at the log level `info`: a line for each request, and one of statistics every ten seconds."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.serve.bridge import Bridge
from outrider.telemetry.ledger import ratio

logger = logging.getLogger("outrider.serve.access")
EVERY = 10.0
"""Seconds between two lines of statistics; none is written while nothing happens."""


class Log:
    """Logs method, path, status and seconds of each request when it has ended; never a query, a header or a body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not logger.isEnabledFor(logging.INFO):
            await self.app(scope, receive, send)
            return
        start, status = monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            path = scope["path"].encode("unicode_escape").decode()[:120]
            logger.info("%s %s %s %.3f s", scope["method"][:16], path, status or "-", monotonic() - start)


class Statistics:
    """Says every ten seconds what has happened since."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._last, self._before = monotonic(), (0, 0, 0, 0)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            line = self.line()
            if line:
                logger.info(line)

    def line(self) -> str:
        """The sums since the last line, or an empty string if there are none."""
        metrics, now = self.bridge.metrics, monotonic()
        c = metrics.counts
        sums = (c.emitted, metrics.prompt_tokens, c.accepted, c.proposed)
        tokens, prompt, accepted, proposed = (a - b for a, b in zip(sums, self._before, strict=True))
        seconds, self._last, self._before = now - self._last, now, sums
        if not tokens and not self.bridge.tickets:
            return ""
        share = ratio(accepted, proposed)
        drafts = "" if share is None else f", draft acceptance rate {share:.2f}"
        return (
            f"generation {tokens / seconds:.1f} tokens/s, prompts of finished requests {prompt / seconds:.1f} tokens/s, "
            f"running {metrics.running}, waiting {metrics.waiting}{drafts}"
        )
