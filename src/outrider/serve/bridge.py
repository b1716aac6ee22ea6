"""The one place where threads and asyncio meet: an engine thread that steps, an event loop that speaks HTTP.

The engine belongs to its thread: it is built there, and only there is it called. The loop sends it commands (closures over
tickets) through a list under a condition; the thread sends back what each step emitted with one call into the loop per step. So
a step never waits for a socket, and a command (an abort, say) is obeyed before the next step.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from outrider.engine.engine import Engine
from outrider.engine.sequence import Event, Sequence
from outrider.errors import CapacityError, OutriderError, RequestError
from outrider.sampling.params import SamplingParams
from outrider.telemetry.prometheus import Finished, Metrics
from outrider.types import Counts

logger = logging.getLogger(__name__)
T = TypeVar("T")
IDLE_BEAT = 0.5
"""Seconds between two heartbeats of an idle engine thread."""
BROKEN_STEPS = 3
"""Steps in a row that may fail, each ending the requests that were in it, before the engine is given up."""
DEAD = "the engine has died: send the request again later"
EXHAUSTED = (
    "the grammar needs more work than this server allows, and was given up in the middle of the text: make it simpler"
)
GRAMMAR_SECONDS = 2.0
"""Seconds a client's grammar may take to compile."""
SHOWN = 96
"""Latest token origins of a running request that the dashboard sees."""


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
    """What one server lets in. queue: sequences that may wait beside those that decode. per_owner: most that one owner (API key)
    may hold of both, None: all of them. Times in seconds."""

    queue: int = 64
    per_owner: int | None = None
    queue_seconds: float = 30.0
    request_seconds: float = 600.0
    hang_seconds: float = 10.0


@dataclass(eq=False)
class Ticket:
    """One HTTP request inside the server: a place that is held from before its prompt is read until its reply has ended.

    choices: samples in all (prompts x n). owner: whose it is (the number of an API key). sequences: the engine's objects, in
    order of choices, once it has started. accepted: done when the engine has checked and queued it. last: when its latest tokens
    came. arm, on_end: of an experiment it is in (`trial`).
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
    accepted: asyncio.Future[None] | None = None
    mail: asyncio.Queue[list[tuple[int, Event]] | OutriderError] = field(default_factory=asyncio.Queue)
    origins: deque[str] = field(default_factory=lambda: deque(maxlen=SHOWN))

    @property
    def done(self) -> bool:
        return self.ended >= self.choices

    def counts(self) -> Counts:
        """The sums of all its sequences."""
        total = Counts()
        for sequence in self.sequences:
            total.merge(sequence.counts)
        return total


class Bridge:
    """An engine in a thread of its own, as asyncio sees it. All public methods belong to the event loop.

    build: makes the engine, in the engine's thread. metrics: gets every step and every finished request.
    prepare: called with the new engine before it serves (warm-up, controller).
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        metrics: Metrics,
        limits: Limits | None = None,
        prepare: Callable[[Engine], None] | None = None,
    ) -> None:
        self.limits, self.metrics = limits or Limits(), metrics
        self.tickets: dict[str, Ticket] = {}
        self.draining = self.broken = False
        self._build, self._prepare = build, prepare
        self._engine: Engine | None = None
        self._held = self.begun = 0
        self._owned: Counter[int] = Counter()
        self._typical = 1.0  # seconds of a request, exponentially averaged: only for Retry-After
        self._condition = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._stop = False
        self._beat = monotonic()
        self._failures = 0
        self._routes: dict[str, tuple[Ticket, int]] = {}  # engine thread: request name -> ticket, first choice
        self._queued: dict[str, Ticket] = {}  # engine thread: names that have no slot yet
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: Future[None] = Future()
        self._compiler = ThreadPoolExecutor(1, "outrider-grammar")
        metrics.counters["requests_started"] = (
            "Requests that got a place; each is counted once more, by how it ended, when it gives the place back.",
            lambda: self.begun,
        )
        metrics.counters["incidents"] = (
            "Defects that were contained: drafts that were none, grammars that ran out of their budget in the middle of a text.",
            lambda: None if self._engine is None else self._engine.incidents,
        )
        self._thread = threading.Thread(target=self._run, name="outrider-engine", daemon=True)

    # ------------------------------------------------------------------ life
    async def start(self) -> None:
        """Build the engine and wait until it serves; raises what its construction raised."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        await asyncio.wrap_future(self._started)

    @property
    def engine(self) -> Engine:
        """The engine: for reading what never changes (tokenizer, parts, limits)."""
        if self._engine is None:
            raise Unavailable("the engine is still loading: try again in some seconds")
        return self._engine

    @property
    def alive(self) -> bool:
        """The engine thread has come round within `hang_seconds`, working or idle."""
        return self._thread.is_alive() and not self.broken and self.silence < self.limits.hang_seconds

    @property
    def silence(self) -> float:
        """Seconds since the engine thread last came round."""
        return monotonic() - self._beat

    @property
    def ready(self) -> bool:
        """New requests are welcome."""
        return self._engine is not None and self.alive and not self.draining

    def drain(self) -> None:
        """Take nothing new; what runs may finish. Safe from a signal handler."""
        self.draining = True

    async def close(self, grace: float = 30.0) -> None:
        """Let running requests finish for `grace` seconds, end the others with an error, and join the thread."""
        self.drain()
        await self.settle(grace)
        self._stop = True
        self._command(lambda: None)
        await asyncio.to_thread(self._thread.join, self.limits.hang_seconds)
        self._compiler.shutdown(wait=False, cancel_futures=True)

    async def settle(self, grace: float) -> None:
        """Wait until nothing is open; after `grace` seconds end what is left with an error and give it a second to say so."""
        end = monotonic() + grace
        while self.tickets and monotonic() < end and self.alive:
            await asyncio.sleep(0.02)
        for ticket in list(self.tickets.values()):
            ticket.mail.put_nowait(Unavailable("the server is shutting down: send the request again elsewhere"))
        last = monotonic() + 1.0
        while self.tickets and monotonic() < last:
            await asyncio.sleep(0.02)

    # ------------------------------------------------------------------ requests
    def reserve(self, choices: int, owner: int = 0) -> Ticket:
        """A place for a request of `choices` samples, before any work is done for it. Raises Overloaded or Unavailable."""
        if not self.ready:
            why = "draining" if self.draining else "not answering" if self._engine is not None else "still loading"
            raise Unavailable(f"the engine is {why}: try again later")
        slots = self.engine.scheduler.slots
        room = slots + self.limits.queue
        most = room if self.limits.per_owner is None else min(room, self.limits.per_owner)
        if choices > most:
            raise RequestError(f"this server holds {most} samples of one client: ask for fewer at once")
        full = self._held + choices > room
        if full or self._owned[owner] + choices > most:
            wait = math.ceil(self._typical * self._held / slots)
            what = "the queue is full" if full else "this key has too many requests in hand"
            raise Overloaded(f"{what}: try again later", max(1, min(60, wait)))
        self._held += choices
        self._owned[owner] += choices
        self.begun += 1
        ticket = Ticket(choices, owner)
        self.tickets[ticket.id] = ticket
        return ticket

    async def submit(self, ticket: Ticket, prompts: list[list[int]], params: SamplingParams) -> None:
        """Hand a request to the engine; returns when it has been checked and queued. Raises RequestError for a bad one."""
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticket.accepted = accepted
        self._command(lambda: self._admit(ticket, prompts, params, accepted))
        if not self._thread.is_alive():  # it died while the prompt was read, and takes no commands
            raise EngineFailure(DEAD)
        async with self._deadline(ticket):
            await accepted

    async def events(self, ticket: Ticket) -> AsyncIterator[list[tuple[int, Event]]]:
        """What the request's samples emit, as (choice, event) pairs, everything that has come up so far at a time.

        Raises EngineFailure or Unavailable; whoever reads must call `release` in the end, come what may.
        """
        while not ticket.done:
            async with self._deadline(ticket):
                parts = [await ticket.mail.get()]
            while not ticket.mail.empty():
                parts.append(ticket.mail.get_nowait())
            batch: list[tuple[int, Event]] = []
            for part in parts:
                if isinstance(part, OutriderError):
                    ticket.outcome = "error"
                    raise part
                batch += part
            ticket.ended += sum(event.finish_reason is not None for _, event in batch)
            for _, event in batch:
                if event.error is not None:
                    ticket.outcome = "error"
                    raise EngineFailure(event.error)
                ticket.outcome = event.finish_reason or ticket.outcome
            if not ticket.done:
                ticket.outcome = "abort"
            yield batch

    def release(self, ticket: Ticket) -> None:
        """The reply has ended, finished or not: give the place back and abort what still runs. May be called twice."""
        if not ticket.open:
            return
        ticket.open = False
        self._held -= ticket.choices
        self._owned[ticket.owner] -= ticket.choices
        self.tickets.pop(ticket.id, None)
        if not ticket.done:
            self._command(lambda: self._abort(ticket))
        total = monotonic() - ticket.arrived
        if ticket.done:
            self._typical += 0.1 * (total - self._typical)
        if ticket.admitted is not None:
            self.metrics.queued.observe(ticket.admitted - ticket.arrived)
        first = None if ticket.first is None else ticket.first - ticket.arrived
        counts = ticket.counts()
        self.metrics.finished(Finished(ticket.outcome, ticket.prompt_tokens, counts.emitted, first, total, counts))
        if ticket.on_end is not None:
            ticket.on_end(ticket)

    async def aside(self, work: Callable[[], T], seconds: float = 10.0) -> T:
        """Run a pure function (tokenising, a chat template) beside the loop. Raises Unavailable after `seconds`."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(work), seconds)
        except TimeoutError:
            raise Unavailable("the prompt took too long to prepare: make it shorter") from None

    async def compile(self, grammar: str, seconds: float = GRAMMAR_SECONDS) -> None:
        """Compile a grammar in a thread kept for that, so that neither engine nor tokenising waits for it; the engine then finds
        it ready. Raises RequestError for a bad one, Unavailable after `seconds`."""
        work = asyncio.get_running_loop().run_in_executor(self._compiler, self.engine.compile_grammar, grammar)
        try:
            await asyncio.wait_for(work, seconds)
        except TimeoutError:
            raise Unavailable("the grammar took too long to compile: make it smaller") from None

    def _deadline(self, ticket: Ticket) -> Any:
        return _Deadline(ticket.arrived + self.limits.request_seconds - monotonic())

    def _command(self, command: Callable[[], None]) -> None:
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    # ------------------------------------------------------------------ the engine's thread
    def _run(self) -> None:
        try:
            engine = self._build()
            if self._prepare is not None:
                self._prepare(engine)
            engine.sinks = (*engine.sinks, self.metrics)
            self._engine = engine
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._beat = monotonic()
        self._started.set_result(None)
        try:
            while not self._stop:
                self._round(engine)
        except BaseException:  # nothing is served any more: whoever waits must hear it now, not at a deadline
            logger.exception("the engine's thread has died")
            self.broken = True
            self._post(self._give_up)

    def _round(self, engine: Engine) -> None:
        """Obey the commands, let those go who have waited too long, and step."""
        for command in self._take(engine.busy):
            command()
        self._expire(engine)
        self._share(engine)
        if engine.busy:
            self._step(engine)

    def _give_up(self) -> None:
        """End every open request with an error (in the event loop)."""
        for ticket in self.tickets.values():
            ticket.mail.put_nowait(EngineFailure(DEAD))
            if ticket.accepted is not None and not ticket.accepted.done():
                ticket.accepted.set_exception(EngineFailure(DEAD))

    def _take(self, busy: bool) -> list[Callable[[], None]]:
        """The commands since the last step; an idle engine waits for one."""
        with self._condition:
            if not busy and not self._commands and not self._stop:
                self._condition.wait(IDLE_BEAT)
            commands, self._commands = self._commands, []
        self._beat = monotonic()
        return commands

    def _step(self, engine: Engine) -> None:
        """One step; a failure ends the requests that were in it and leaves an engine that serves the next ones."""
        engine.scheduler.admit()
        ruled = {s.slot: s.request for s in engine.scheduler.running if s.params.grammar is not None}
        try:
            events = engine.step()
            self._failures = 0
        except Exception as error:  # whatever it is, the process and the other requests live on
            logger.exception("a step failed")
            self._failures += 1
            self.broken = self._failures >= BROKEN_STEPS
            tickets = list({id(t): t for t, _ in self._routes.values()}.values())
            inside = [t for t in tickets if any(s.slot >= 0 for s in t.sequences)]
            for ticket in inside or tickets:
                self._fail(ticket, EngineFailure(f"the engine failed ({type(error).__name__}): send the request again"))
            return
        self._end_exhausted(engine, ruled)
        mail: dict[int, tuple[Ticket, list[tuple[int, Event]]]] = {}
        for event in events:
            if event.request not in self._routes:
                continue
            ticket, offset = self._routes[event.request]
            mail.setdefault(id(ticket), (ticket, []))[1].append((offset + event.index, event))
        self._note_admissions()
        for name in {event.request for event in events if event.finish_reason is not None}:
            if not engine.sequences(name):
                self._routes.pop(name, None)
        self._post(lambda: self._deliver(list(mail.values())))

    def _end_exhausted(self, engine: Engine, ruled: dict[int, str]) -> None:
        """End the requests whose grammar ran out of its budget in this step. ruled: those that had one when it began, by slot.

        What the step added to them is dropped, and their automata are: a slot's next request begins with its own budget."""
        automata = engine.parts.law._automata
        for slot, name in ruled.items():
            if slot in automata and automata[slot].exhausted:
                del automata[slot]
                engine.incidents += 1
                if name in self._routes:  # not ended yet for another of its samples
                    self._fail(self._routes[name][0], RequestError(EXHAUSTED))

    def _note_admissions(self) -> None:
        now = monotonic()
        for name, ticket in list(self._queued.items()):
            first = self._routes[name][1]
            if ticket.sequences[first].slot >= 0 or ticket.sequences[first].finish_reason is not None:
                ticket.admitted = ticket.admitted or now
                del self._queued[name]

    def _admit(
        self, ticket: Ticket, prompts: list[list[int]], params: SamplingParams, accepted: asyncio.Future[None]
    ) -> None:
        engine = self.engine
        if not ticket.open:
            return
        try:
            for i, prompt in enumerate(prompts):
                name = engine.submit(prompt, params, request=f"{ticket.id}/{i}")
                ticket.names.append(name)
                self._routes[name] = (ticket, len(ticket.sequences))
                self._queued[name] = ticket
                ticket.sequences += engine.sequences(name)
                ticket.prompt_tokens += len(prompt)
        except Exception as error:
            self._abort(ticket)
            failure = error if isinstance(error, OutriderError) else EngineFailure("the request could not be queued")
            self._post(lambda: accepted.done() or accepted.set_exception(failure))
            return
        self._post(lambda: accepted.done() or accepted.set_result(None))

    def _abort(self, ticket: Ticket) -> None:
        for name in ticket.names:
            self.engine.abort(name)
            self._routes.pop(name, None)
            self._queued.pop(name, None)

    def _fail(self, ticket: Ticket, error: OutriderError) -> None:
        self._abort(ticket)
        self._post(lambda: ticket.mail.put_nowait(error))

    def _share(self, engine: Engine) -> None:
        """Before free slots are given away: owners take turns, so that one with many requests delays another by one of them."""
        if len(engine.scheduler.waiting) > 1 and len({t.owner for t in self._queued.values()}) > 1:
            engine.scheduler.share(lambda s: self._routes[s.request][0].owner)

    def _expire(self, engine: Engine) -> None:
        """End requests that have waited too long for a slot."""
        if not self._queued:
            return
        limit = monotonic() - self.limits.queue_seconds
        for ticket in {id(t): t for t in self._queued.values()}.values():
            if ticket.arrived < limit and ticket.admitted is None:
                self._fail(ticket, Unavailable("the request waited too long for a free slot: try again later"))

    def _post(self, call: Callable[[], object]) -> None:
        """Run `call` in the event loop; nobody is left to hear it once the loop is closed."""
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            self._stop = True

    def _deliver(self, mail: list[tuple[Ticket, list[tuple[int, Event]]]]) -> None:
        now = monotonic()
        for ticket, events in mail:
            if any(event.tokens for _, event in events):
                ticket.first, ticket.last = ticket.first or now, now
            for _, event in events:
                ticket.origins.extend(origin[0] for origin in event.origins)
            ticket.mail.put_nowait(events)


class _Deadline:
    """`asyncio.timeout` whose expiry is an outcome with a sentence."""

    def __init__(self, seconds: float) -> None:
        self._timeout = asyncio.timeout(max(0.0, seconds))

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *exc: Any) -> None:
        try:
            await self._timeout.__aexit__(*exc)
        except TimeoutError:
            raise Unavailable("the request took longer than this server allows: ask for fewer tokens") from None
