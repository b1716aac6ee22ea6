"""The interface between threads and asyncio: an engine thread that makes steps, and an event loop that serves HTTP.

The engine belongs to its thread (`worker`). The loop sends it commands (closures over tickets); the thread sends back the events
of each step with at most two calls into the loop: sequences that continue, and sequences that ended. So a step never waits for a
socket, and a command (such as an abort) is executed before the next step.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, TypeVar

from outrider.build import Engine
from outrider.engine.prompt_scores import PromptScores
from outrider.engine.sequence import Event
from outrider.errors import OutriderError, RequestError
from outrider.params import SamplingParams
from outrider.pictured import ImagePrompt
from outrider.serve.engine_thread import EngineThread, Mail, Scoring
from outrider.serve.prep import Prep
from outrider.serve.supervisor import HEARTBEAT_SECONDS, Awake
from outrider.serve.tickets import Deadline, EngineFailure, Limits, Overloaded, Ticket, Unavailable
from outrider.telemetry.prometheus import Finished, Metrics

T = TypeVar("T")
DEAD = "the engine has died: send the request again later"
OBJECT, WARMING = 'json:{"type": "object"}', -1
"""The form of JSON mode, and the number of no client, in whose name it is compiled."""
LOADING = "the engine is still loading: try again in some seconds"
REUSE = {
    "prefix_cache_queries": ("Tokens of the prompts that entered the engine.", "asked"),
    "prefix_cache_hits": ("Those of them that it did not have to compute.", "reused"),
    "preemptions": ("Sequences that went back to the queue for want of cache, to be computed again.", "preempted"),
}
"""Counter -> its help text, and the sum of `engine.room.Reuse` that it is."""


class Bridge:
    """The asyncio side of an engine in its own thread. All public methods belong to the event loop.

    build: makes the engine, in the engine's thread. metrics: gets every finished request; the engine should have it as a sink.
    prepare: called with the new engine before it serves (warm-up).
    tickets: the open requests. held: their samples. owned: their samples by owner. begun: requests so far. failures: requests that
    the engine failed after their reply had begun or while they waited.
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
        self.draining = False
        self.held = self.begun = self.failures = 0
        self.owned: Counter[int] = Counter()
        self.worker = EngineThread(build, prepare, self._post, self._deliver, self._give_up, self.limits.queue_seconds)
        self._typical = 1.0  # seconds of a request, exponentially averaged: only for Retry-After
        self._loop: asyncio.AbstractEventLoop | None = None
        self._compiler = ThreadPoolExecutor(1, "outrider-grammar")
        self._prep: Prep | None = None
        self._quiet, self._beat = (
            Awake(),
            0.0,
        )  # time without a heartbeat of the engine's thread, and the last heartbeat
        self._watching: asyncio.Task[None] | None = None
        metrics.counters["requests_started"] = (
            "Requests that got a place; each is counted once more, by how it ended, when it gives the place back.",
            lambda: self.begun,
        )
        metrics.counters["requests_failed"] = ("Requests that the engine failed.", lambda: self.failures)
        metrics.counters["incidents"] = (
            "Contained defects: invalid drafts, and grammars that ran out of their budget in the middle of a text.",
            lambda: None if self.worker.engine is None else self.worker.engine.defects,
        )
        for name, (about, field) in REUSE.items():
            metrics.counters[name] = (about, partial(self._reuse, field))
        metrics.counters["drafter_faults"] = (
            "Calls of a drafter that raised or did not return a draft; each lost the drafts of one step and no text.",
            lambda: None if self.worker.engine is None else self.worker.engine.drafter_faults,
        )

    def _reuse(self, field: str) -> float | None:
        return None if self.worker.engine is None else getattr(self.worker.engine.state.room.sums, field)

    # ------------------------------------------------------------------ life
    async def start(self) -> None:
        """Build the engine and wait until it serves; an exception of its construction is raised here."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()
        await asyncio.wrap_future(self.worker.started)
        self._watching, engine = asyncio.create_task(self._watch()), self.engine
        self._prep = await asyncio.to_thread(
            Prep, engine.tokenizer, tuple(engine.eos), engine.max_length - 1, self.limits.per_owner is not None
        )

    @property
    def prep(self) -> Prep:
        """The processes that read clients' texts and grammars."""
        if self._prep is None:
            raise Unavailable(LOADING)
        return self._prep

    @property
    def engine(self) -> Engine:
        """The engine, to read what never changes (tokenizer, parts, limits)."""
        if self.worker.engine is None:
            raise Unavailable(LOADING)
        return self.worker.engine

    @property
    def alive(self) -> bool:
        """Whether the engine thread had a heartbeat within `hang_seconds`, working or idle."""
        return self.worker.running and not self.worker.broken and self.heartbeat_age < self.limits.hang_seconds

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine thread's last heartbeat; time in which this process was stopped does not count."""
        return min(self.worker.heartbeat_age, self._quiet.seconds)

    @property
    def ready(self) -> bool:
        """Whether new requests are accepted."""
        return self.worker.engine is not None and self.alive and not self.draining

    async def _watch(self) -> None:
        """Measure the age of the engine's last heartbeat."""
        while True:
            if self.worker.beat != self._beat:
                self._quiet, self._beat = Awake(), self.worker.beat
            self._quiet.tick()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def drain(self) -> None:
        """Accept no new requests; running ones may finish. Safe in a signal handler."""
        self.draining = True

    async def close(self, grace: float = 30.0) -> None:
        """Let running requests finish for `grace` seconds, end the others with an error, and join the thread."""
        self.drain()
        await self.drain_requests(grace)
        self.worker.stop()
        await asyncio.to_thread(self.worker.join, self.limits.hang_seconds)
        self._compiler.shutdown(wait=False, cancel_futures=True)
        if self._watching is not None:
            self._watching.cancel()
        if self._prep is not None:
            await self._prep.close()

    async def drain_requests(self, grace: float) -> None:
        """Wait until no request is open; after `grace` seconds end the rest with an error and give the replies a second."""
        end = monotonic() + grace
        while self.tickets and monotonic() < end and self.alive:
            await asyncio.sleep(0.02)
        for ticket in list(self.tickets.values()):
            ticket.fail(Unavailable("the server is shutting down: send the request again elsewhere"))
        last = monotonic() + 1.0
        while self.tickets and monotonic() < last:
            await asyncio.sleep(0.02)

    # ------------------------------------------------------------------ requests
    def reserve(self, choices: int, owner: int = 0) -> Ticket:
        """Reserve a place for a request of `choices` samples, before any work is done for it. Raises Overloaded or Unavailable."""
        if not self.ready:
            why = (
                "draining" if self.draining else "not answering" if self.worker.engine is not None else "still loading"
            )
            raise Unavailable(f"the engine is {why}: try again later")
        slots = self.engine.scheduler.slots
        room = slots + self.limits.queue
        most = room if self.limits.per_owner is None else min(room, self.limits.per_owner)
        if choices > most:
            raise RequestError(f"this server holds {most} samples of one client: ask for fewer at once")
        full = self.held + choices > room
        if full or self.owned[owner] + choices > most:
            wait = math.ceil(self._typical * self.held / slots)
            what = "the queue is full" if full else "this key has too many open requests"
            raise Overloaded(f"{what}: try again later", max(1, min(60, wait)))
        self.held += choices
        self.owned[owner] += choices
        self.begun += 1
        ticket = Ticket(choices, owner)
        self.tickets[ticket.id] = ticket
        return ticket

    async def submit(self, ticket: Ticket, prompts: list[list[int]], params: SamplingParams) -> None:
        """Pass a request to the engine; returns when it is checked and queued. Raises RequestError for a bad one."""
        for prompt in prompts:
            if isinstance(prompt, ImagePrompt):
                await self._see(ticket, prompt, params)
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticket.accepted = accepted

        def answer(failure: OutriderError | None) -> None:
            if not accepted.done():
                accepted.set_result(None) if failure is None else accepted.set_exception(failure)

        self.worker.command(lambda: self.worker.admit(ticket, prompts, params, answer))
        if not self.worker.running:  # it died while the prompt was read, and executes no commands
            raise EngineFailure(DEAD)
        async with self._deadline(ticket):
            await accepted

    async def _see(self, ticket: Ticket, prompt: ImagePrompt, params: SamplingParams) -> None:
        """Have the target see the images of a prompt, one between two steps: nobody waits for all images of another."""
        self.engine.check(prompt, params)  # no image is seen for a prompt that is refused
        for image in prompt.images:
            seen: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            ticket.accepted = seen
            answer = partial(_answered, seen)
            self.worker.command(partial(self.worker.see, ticket, image, answer))
            if not self.worker.running:
                raise EngineFailure(DEAD)
            async with self._deadline(ticket):
                await seen

    async def score(self, ticket: Ticket, prompts: list[list[int]], top: int) -> list[PromptScores]:
        """Log-probabilities of the tokens of prompts. Raises RequestError for one that cannot be served."""
        found: asyncio.Future[list[PromptScores]] = asyncio.get_running_loop().create_future()
        ticket.accepted = found  # fails when the engine's thread ends

        def answer(done: list[PromptScores] | OutriderError) -> None:
            if not found.done():
                found.set_exception(done) if isinstance(done, OutriderError) else found.set_result(done)

        self.worker.command(lambda: self.worker.score(Scoring(ticket, prompts, top, answer)))
        if not self.worker.running:
            raise EngineFailure(DEAD)
        async with self._deadline(ticket):
            return await found

    async def events(self, ticket: Ticket) -> AsyncIterator[list[tuple[int, Event]]]:
        """The events of the request's samples as (choice, event) pairs, in batches of everything available.

        Raises EngineFailure or Unavailable; the caller must call `release` in the end in every case.
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
                    self.failures += isinstance(part, EngineFailure)
                    raise part
                batch += part
            ticket.ended += sum(event.finish_reason is not None for _, event in batch)
            for _, event in batch:
                if event.error is not None:
                    ticket.outcome = "error"
                    ours = event.blame != "request"
                    self.failures += ours
                    raise EngineFailure(event.error) if ours else RequestError(event.error)
                ticket.outcome = event.finish_reason or ticket.outcome
            if not ticket.done:
                ticket.outcome = "abort"
            yield batch

    def release(self, ticket: Ticket) -> None:
        """The reply has ended, finished or not: give the place back and abort the rest. May be called twice."""
        if not ticket.open:
            return
        ticket.open = False
        self.held -= ticket.choices
        self.owned[ticket.owner] -= ticket.choices
        self.tickets.pop(ticket.id, None)
        if not ticket.done:
            self.worker.command(lambda: self.worker.abort(ticket))
        total = monotonic() - ticket.arrived
        if ticket.done:
            self._typical += 0.1 * (total - self._typical)
        if ticket.admitted is not None:
            self.metrics.queued.observe(ticket.admitted - ticket.arrived)
        first = None if ticket.first is None else ticket.first - ticket.arrived
        counts = ticket.counts()
        queued = None if ticket.admitted is None else ticket.admitted - ticket.arrived
        longest = max((s.counts.emitted for s in ticket.sequences), default=0)
        self.metrics.finished(
            Finished(ticket.outcome, ticket.prompt_tokens, counts.emitted, first, total, counts, queued, longest)
        )
        if ticket.on_end is not None:
            ticket.on_end(ticket)

    async def in_thread(self, work: Callable[[], T], seconds: float = 10.0) -> T:
        """Run a pure function (tokenising, a chat template) beside the loop. Raises Unavailable after `seconds`."""
        try:
            async with asyncio.timeout(seconds):  # `wait_for` of Python 3.11 may swallow a cancellation
                return await asyncio.to_thread(work)
        except TimeoutError:
            raise Unavailable("the prompt took too long to prepare: make it shorter") from None

    async def compile(self, grammar: str, owner: int = 0) -> None:
        """Compile a grammar ahead of the engine: first in a process, to show that it can be done in time, then in a dedicated
        thread, so that neither the engine nor tokenising waits. Raises RequestError for a grammar that cannot be used."""
        await self.prep.try_grammar(grammar, owner)
        await asyncio.get_running_loop().run_in_executor(self._compiler, self.engine.compile_grammar, grammar)

    async def warm(self) -> None:
        """Compile the form of any JSON object, as a request would: with a large vocabulary it takes seconds to start the process
        and to read the tokenizer there and here, for which no client should wait. What fails is said to who asks."""
        if self.prep.compiles and self.engine.eos:
            with suppress(OutriderError):
                await self.compile(OBJECT, WARMING)

    def _deadline(self, ticket: Ticket) -> Any:
        return Deadline(ticket.arrived + self.limits.request_seconds - monotonic())

    # ------------------------------------------------------------------ calls from the engine's thread
    def _post(self, call: Callable[[], object]) -> None:
        """Run `call` in the event loop; once the loop is closed, stop the engine's thread instead."""
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            self.worker.stop()

    def _deliver(self, mail: Mail) -> None:
        now = monotonic()
        for ticket, events in mail:
            if any(event.tokens for _, event in events):
                if ticket.last is not None:
                    new = sum(len(event.tokens) for _, event in events)
                    self.metrics.interval.observe((now - ticket.last) / max(1, new))
                ticket.first, ticket.last = ticket.first or now, now
            for _, event in events:
                ticket.origins.extend(origin[0] for origin in event.origins)
            ticket.mail.put_nowait(events)

    def _give_up(self) -> None:
        """End every open request with an error (in the event loop)."""
        for ticket in self.tickets.values():
            ticket.fail(EngineFailure(DEAD))


def _answered(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
