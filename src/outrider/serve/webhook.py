"""Alerts to the operator's address: JSON by POST, with retries, in the background.

The address comes from the command line or the environment, never from a request, and is the only one this server ever connects
to. Redirects are not followed, replies are not read, and neither the address nor a body is logged. Only the fields of
`telemetry.alerts.Notice` and the served model's name are sent: no text of requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import urlsplit

from outrider.errors import ConfigError
from outrider.telemetry.alerts import Notice
from outrider.web import DIRECT

logger = logging.getLogger(__name__)
PAUSES = (1.0, 5.0, 25.0)
"""Seconds before each retry; then the notice is dropped."""
SECONDS = 10.0
"""For one attempt."""
WAITING = 256
"""Notices that may wait; beyond this the oldest is dropped."""


def check_url(url: str) -> str:
    """`url` if alerts can be sent to it; raises ConfigError otherwise."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or any(c.isspace() for c in url):
        raise ConfigError("the alert webhook must be a http:// or https:// URL")
    return url


def body_of(notice: Notice, model: str) -> bytes:
    """The JSON body of a notice. Times are seconds since the epoch."""
    document = {
        "status": "firing" if notice.firing else "resolved",
        "alert": notice.name,
        "severity": notice.severity,
        "summary": notice.summary,
        "model": model,
        "value": notice.value,
        "threshold": notice.threshold,
        "since": notice.since,
        "at": notice.at,
    }
    return json.dumps(document).encode()


@dataclass
class Webhook:
    """A queue of notices and the task that empties it. url: as `check_url` returned it. sent, lost: notices so far."""

    url: str
    model: str
    pauses: Sequence[float] = PAUSES
    sent: int = 0
    lost: int = 0
    _waiting: asyncio.Queue[Notice] = field(default_factory=asyncio.Queue)

    def put(self, notice: Notice) -> None:
        """Queue a notice; never waits."""
        while self._waiting.qsize() >= WAITING:
            self._waiting.get_nowait()
            self.lost += 1
        self._waiting.put_nowait(notice)

    async def run(self) -> None:
        """Deliver, in order, until cancelled."""
        while True:
            await self._deliver(await self._waiting.get())

    async def _deliver(self, notice: Notice) -> None:
        for pause in (0.0, *self.pauses):
            await asyncio.sleep(pause)
            if await asyncio.to_thread(post, self.url, body_of(notice, self.model)):
                self.sent += 1
                return
        self.lost += 1
        logger.warning("an alert (%s) could not be delivered to the webhook", notice.name)


def post(url: str, data: bytes, seconds: float = SECONDS) -> bool:
    """Make one attempt; returns whether the reply was 2xx."""
    request = urllib.request.Request(url, data, {"content-type": "application/json", "user-agent": "outrider"})
    try:
        with DIRECT.open(request, timeout=seconds) as reply:
            return 200 <= reply.status < 300
    except HTTPError as error:
        error.close()
        return False
    except (OSError, ValueError, HTTPException):  # refused, timed out, an error status, a name that does not resolve
        return False
