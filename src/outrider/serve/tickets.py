"""A request inside the server: its ticket, the server's limits, and the errors."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from outrider.engine.sequence import Event, Sequence
from outrider.errors import CapacityError, OutriderError
from outrider.pictured import ImageRows
from outrider.records import Counts

SHOWN = 96
"""Latest token origins of a running request that the dashboard shows."""


class Overloaded(CapacityError):
    """The queue is full. retry_after: whole seconds after which a place is likely to be free."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(OutriderError):
    """The server is starting, draining, hung or broken, or a deadline has passed: not this request's fault."""


class EngineFailure(OutriderError):
    """The engine failed while this request was in it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one server. queue: sequences that may wait besides those that decode. per_owner: most sequences of both kinds
    of one owner (API key); None: no limit. Times in seconds."""

    queue: int = 64
    per_owner: int | None = None
    queue_seconds: float = 30.0
    request_seconds: float = 600.0
    hang_seconds: float = 10.0


@dataclass(eq=False)
class Ticket:
    """One HTTP request inside the server. Its place is held from before its prompt is read until its reply has ended.

    choices: samples in all (prompts x n). owner: the number of its API key. sequences: the engine's objects, in order of choices,
    once it has started. accepted: done when the engine has checked and queued it, or scored its prompts. last: when its latest
    tokens arrived. arm, on_end: of its experiment, if any (`trial`). seen: its images while its prompt is not queued.
    """

    choices: int
    owner: int = 0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived: float = field(default_factory=monotonic)
    sequences: list[Sequence] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    admitted: float | None = None
    first: float | None = None
    last: float | None = None
    prompt_tokens: int = 0
    ended: int = 0
    arm: str | None = None
    on_end: Callable[[Ticket], None] | None = None
    outcome: str = "abort"
    open: bool = True
    accepted: asyncio.Future[Any] | None = None
    seen: list[ImageRows] = field(default_factory=list)
    mail: asyncio.Queue[list[tuple[int, Event]] | OutriderError] = field(default_factory=asyncio.Queue)
    origins: deque[str] = field(default_factory=lambda: deque(maxlen=SHOWN))

    @property
    def cached_tokens(self) -> int:
        """Tokens of its prompts that the engine did not have to compute; each prompt counts once, as in `prompt_tokens`."""
        return sum(s.reused for s in self.sequences if s.index == 0)

    @property
    def done(self) -> bool:
        return self.ended >= self.choices

    def fail(self, error: OutriderError) -> None:
        """Tell whoever waits for the request, for its events or for being queued, that it has failed."""
        self.mail.put_nowait(error)
        if self.accepted is not None and not self.accepted.done():
            self.accepted.set_exception(error)

    def counts(self) -> Counts:
        """The sums of all its sequences."""
        total = Counts()
        for sequence in self.sequences:
            total.merge(sequence.counts)
        return total


class Deadline:
    """`asyncio.timeout` that raises Unavailable with a sentence when it expires."""

    def __init__(self, seconds: float) -> None:
        self._timeout = asyncio.timeout(max(0.0, seconds))

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *exc: Any) -> None:
        try:
            await self._timeout.__aexit__(*exc)
        except TimeoutError:
            raise Unavailable("the request took longer than this server allows: ask for fewer tokens") from None
