"""The engine's thread: it builds the engine, executes commands between steps, and posts the events of each step.

This module does not depend on the event loop: results leave through `post`, which runs a closure in the tickets' thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from time import monotonic

from outrider.build import Engine
from outrider.engine.prompt_scores import PromptScores, prompt_scores
from outrider.engine.sequence import Event
from outrider.errors import OutriderError
from outrider.params import SamplingParams
from outrider.pictured import ImageInput
from outrider.serve.tickets import EngineFailure, Ticket, Unavailable

logger = logging.getLogger(__name__)
IDLE_BEAT = 0.5
"""Seconds between two heartbeats of an idle engine thread."""
BROKEN_STEPS = 3
"""After this many failed steps in a row, each of which ends its requests, the engine counts as broken."""
Mail = list[tuple[Ticket, list[tuple[int, Event]]]]


class Scoring:
    """Prompts of a request whose log-probabilities are wanted. top: likely tokens beside each. answer: gets them, or the error."""

    def __init__(
        self,
        ticket: Ticket,
        prompts: list[list[int]],
        top: int,
        answer: Callable[[list[PromptScores] | OutriderError], None],
    ) -> None:
        self.ticket, self.answer, self.done = ticket, answer, list[PromptScores]()
        self._left, self._top = deque(prompts), top
        self._running: Iterator[PromptScores | None] | None = None

    def advance(self, engine: Engine) -> bool:
        """Score one chunk; whether all is done."""
        if self._running is None:
            tokens = self._left.popleft()
            engine.check(tokens, SamplingParams())
            self._running = prompt_scores(engine.parts.target, tokens, self._top)
        found = next(self._running)
        if found is not None:
            self.done.append(found)
            self._running = None
        return found is not None and not self._left


def told(error: Exception, general: str) -> OutriderError:
    """What a client is told of an error: ours as it is. Any other is a fault of the server: it is logged, and told in `general`."""
    if isinstance(error, OutriderError):
        return error
    logger.error(general, exc_info=error)
    return EngineFailure(general)


class EngineThread:
    """A thread that owns an engine: the engine is built and called only there.

    build: makes the engine. prepare: called with it before it serves. post: runs a closure in the event loop. deliver, give_up:
    called there, with the events of a step, and when the thread has died. queue_seconds: how long a request may wait for a slot.
    `_run` belongs to the thread; any thread may call `command` and `stop`; the rest belongs to commands.
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        prepare: Callable[[Engine], None] | None,
        post: Callable[[Callable[[], object]], None],
        deliver: Callable[[Mail], None],
        give_up: Callable[[], None],
        queue_seconds: float,
    ) -> None:
        self.engine: Engine | None = None
        self.broken = False
        self.started: Future[None] = Future()
        self.routes: dict[str, tuple[Ticket, int]] = {}  # request name -> ticket, first choice
        self.queued: dict[str, Ticket] = {}  # names that have no slot yet
        self._build, self._prepare = build, prepare
        self._post, self._deliver, self._give_up = post, deliver, give_up
        self._queue_seconds = queue_seconds
        self._scoring: deque[Scoring] = deque()
        self._condition = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._stop = self._ended = False
        self.beat = monotonic()
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="outrider-engine", daemon=True)

    @property
    def running(self) -> bool:
        """Whether the thread has started, and executes what it is told. Once requests are told of its end, it is false: a request
        that comes after that, while the thread is about to be gone, must not wait for it."""
        return self._thread.is_alive() and not self._ended

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the thread's last heartbeat."""
        return monotonic() - self.beat

    def start(self) -> None:
        """Start; `started` is done when the engine serves, or has the error of its construction."""
        self._thread.start()

    def stop(self) -> None:
        """End after the present step."""
        self._stop = True
        self.command(lambda: None)

    def join(self, seconds: float) -> None:
        """Wait at most `seconds` for the thread's end."""
        self._thread.join(seconds)

    def command(self, command: Callable[[], None]) -> None:
        """Run `command` in the thread, before its next step."""
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def _run(self) -> None:
        try:
            engine = self._build()
            if self._prepare is not None:
                self._prepare(engine)
            self.engine = engine
        except BaseException as error:
            self.started.set_exception(error)
            return
        self.beat = monotonic()
        self.started.set_result(None)
        try:
            while not self._stop:
                self._round(engine)
        except BaseException:  # nothing is served any more: waiting clients must learn it now, not at a deadline
            logger.exception("the engine's thread has died")
            self.broken = self._ended = True
            self._post(self._give_up)

    def _round(self, engine: Engine) -> None:
        """Execute the commands, end requests that have waited too long, and make a step."""
        for command in self._take(engine.busy or bool(self._scoring)):
            command()
        self._expire()
        self._share(engine)
        if self._scoring:
            self._score(engine)
        if engine.busy:
            self._step(engine)

    def score(self, scoring: Scoring) -> None:
        """Queue prompts whose log-probabilities are wanted (a command)."""
        self._scoring.append(scoring)

    def _score(self, engine: Engine) -> None:
        """Score a chunk of the first prompt that waits; the steps of others go on between two chunks."""
        job = self._scoring[0]
        try:
            if not job.ticket.open or job.advance(engine):
                self._scoring.popleft()
                self._post(lambda: job.answer(job.done))
        except Exception as error:
            self._scoring.popleft()
            failure = told(error, "the prompt could not be scored")
            self._post(lambda: job.answer(failure))

    def _take(self, busy: bool) -> list[Callable[[], None]]:
        """The commands since the last step; an idle engine waits for one."""
        with self._condition:
            if not busy and not self._commands and not self._stop:
                self._condition.wait(IDLE_BEAT)
            commands, self._commands = self._commands, []
        self.beat = monotonic()
        return commands

    def _step(self, engine: Engine) -> None:
        """Make one step. A failure ends the requests in it, and the engine serves the next ones.

        Events of sequences that continue are posted before the next draft is made, so that readers do not wait for it.
        """
        engine.scheduler.admit()
        inside = {s.request for s in engine.scheduler.running}
        try:
            events = engine.step(self._midway)
            self._failures = 0
        except Exception as error:  # in every case, the process and the other requests continue
            logger.exception("a step failed")
            self._failures += 1
            self.broken = self._failures >= BROKEN_STEPS
            routes = [route for name, route in self.routes.items() if name in inside or not inside]
            for ticket in {id(t): t for t, _ in routes}.values():
                self._fail(ticket, EngineFailure(f"the engine failed ({type(error).__name__}): send the request again"))
            return
        self._hand_out([event for event in events if event.finish_reason is not None])
        for name in {event.request for event in events if event.finish_reason is not None}:
            if not engine.sequences(name):
                self.routes.pop(name, None)

    def _midway(self, events: list[Event]) -> None:
        """Called in the middle of a step with the events of sequences that continue."""
        self._note_admissions()
        self._hand_out(events)

    def _hand_out(self, events: list[Event]) -> None:
        """Post events to the event loop of their readers."""
        mail: dict[int, tuple[Ticket, list[tuple[int, Event]]]] = {}
        for event in events:
            if event.request not in self.routes:
                continue
            ticket, offset = self.routes[event.request]
            mail.setdefault(id(ticket), (ticket, []))[1].append((offset + event.index, event))
        if mail:
            self._post(lambda: self._deliver(list(mail.values())))

    def _note_admissions(self) -> None:
        now = monotonic()
        for name, ticket in list(self.queued.items()):
            first = self.routes[name][1]
            if ticket.sequences[first].slot >= 0 or ticket.sequences[first].finish_reason is not None:
                ticket.admitted = ticket.admitted or now
                del self.queued[name]

    def admit(
        self,
        ticket: Ticket,
        prompts: list[list[int]],
        params: SamplingParams,
        answer: Callable[[OutriderError | None], None],
    ) -> None:
        """Queue a request (a command); `answer` is posted with None when it is queued, or with the error."""
        engine = self.engine
        if not ticket.open or engine is None:
            return
        # owners never share what was computed: how soon a reply begins would tell one what another has asked
        params = replace(params, cache_salt=f"{ticket.owner}/{params.cache_salt or ''}")
        try:
            for i, prompt in enumerate(prompts):
                name = engine.submit(prompt, params, request=f"{ticket.id}/{i}")
                ticket.names.append(name)
                self.routes[name] = (ticket, len(ticket.sequences))
                self.queued[name] = ticket
                ticket.sequences += engine.sequences(name)
                ticket.prompt_tokens += len(prompt)
        except Exception as error:
            self.abort(ticket)
            failure = told(error, "the request could not be queued")
            self._post(lambda: answer(failure))
            return
        finally:
            ticket.seen.clear()  # its sequences have them now
        self._post(lambda: answer(None))

    def see(self, ticket: Ticket, image: ImageInput, answer: Callable[[], None]) -> None:
        """Have the target see an image, which the ticket holds until its prompt is queued (a command): all its images may need more
        than the target keeps. What is wrong is said when the prompt is queued."""
        if not ticket.open or self.engine is None:
            return
        with suppress(Exception):
            ticket.seen.append(self.engine.images.rows(image))
        self._post(answer)

    def abort(self, ticket: Ticket) -> None:
        """Abort the running parts of a request (a command)."""
        if self.engine is None:
            return
        for name in ticket.names:
            self.engine.abort(name)
            self.routes.pop(name, None)
            self.queued.pop(name, None)

    def _fail(self, ticket: Ticket, error: OutriderError) -> None:
        self.abort(ticket)
        self._post(lambda: ticket.mail.put_nowait(error))

    def _share(self, engine: Engine) -> None:
        """Before free slots are given out: owners take turns, so that an owner with many requests delays another by only one."""
        if len(engine.scheduler.waiting) > 1 and len({t.owner for t in self.queued.values()}) > 1:
            engine.scheduler.share(lambda s: self.routes[s.request][0].owner)

    def _expire(self) -> None:
        """End requests that have waited too long for a slot."""
        if not self.queued:
            return
        limit = monotonic() - self._queue_seconds
        for ticket in {id(t): t for t in self.queued.values()}.values():
            if ticket.arrived < limit and ticket.admitted is None:
                self._fail(ticket, Unavailable("the request waited too long for a free slot: try again later"))
