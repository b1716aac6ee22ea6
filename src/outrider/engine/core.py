"""The engine: admit, step, stream, abort. No method names, no first step, no speculation mode."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from time import perf_counter
from typing import Any

from outrider.drafters.contained import Contained
from outrider.engine.contracts import check_parts
from outrider.engine.emission import Emission, emit
from outrider.engine.fit import check_fit
from outrider.engine.intake import Intake
from outrider.engine.outputs import Output, Result, result_of
from outrider.engine.prompts import Prompt, Prompts, as_prompt, as_prompts
from outrider.engine.sanitize import honest
from outrider.engine.scheduler import Scheduler, Work
from outrider.engine.sequence import Event, Sequence
from outrider.engine.step import Judged, Parts, propose, verify
from outrider.engine.turns import Turns
from outrider.engine.watchers import Watchers
from outrider.errors import RequestError
from outrider.noise import derive_seed
from outrider.params import SamplingParams
from outrider.protocols import Controller, Drafter, Rule, Sink, Target
from outrider.sampling.pipeline import Law
from outrider.types import PHASES, Counts, Draft, StepRecord

__all__ = ["Engine", "Output", "Result"]


class Engine:
    """Decodes many sequences together, each exactly by the target's law.

    target, drafter, rule, controller: see `protocols`. tokenizer: a Hugging Face tokenizer, or None to work on ids alone.
    slots: sequences decoded together. max_length: most tokens (prompt and output) of a sequence; the target's context if None.
    chunk: rows of a prompt chunk. eos: ids that end a sequence. sinks: receive one StepRecord per step. turns: of engines that
    share a model, so that they take turns too.
    Raises CapabilityError when parts do not fit together.

    Sharing: several streams, `generate` and `step` may be under way at once and are decoded together. Any thread may call any
    method: calls take turns, in the order they came, a step at a time. `abort` may be called from inside a step (`deliver`, a
    sink); `step`, `generate` and `stream` may not. A process that is forked from one that has built an engine cannot compute:
    there every call raises CapabilityError; start processes with multiprocessing's "spawn".
    What a drafter, the controller or a sink raises is contained, counted in `incidents` and told in `notices`; it ends no request.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        rule: Rule,
        controller: Controller,
        *,
        tokenizer: Any = None,
        slots: int = 8,
        max_length: int | None = None,
        chunk: int = 256,
        eos: Iterable[int] = (),
        sinks: Seq[Sink] = (),
        allow_lossy: bool = False,
        turns: Turns | None = None,
    ) -> None:
        check_parts(target, drafter, rule, controller)
        self._turns = turns or Turns()
        check_fit(target, drafter, rule, allow_lossy)
        self.max_length = min(max_length or target.max_length, target.max_length)
        self.controller, self.sinks, self.eos = controller, tuple(sinks), frozenset(eos)
        kv = target.new_kv(slots, self.max_length + drafter.max_nodes)
        drafter.bind(slots, self.max_length)
        self.parts = Parts(target, kv, Law(target.vocab_size, tuple(self.eos)), rule, drafter)
        self.scheduler = Scheduler(slots, chunk=chunk)
        self.counts, self.seconds = Counts(), dict.fromkeys(PHASES, 0.0)
        self.steps = 0
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._draft, self._drafted = Draft.empty(0, target.device), list[Sequence]()
        self._names = 0
        self._intake = Intake(tokenizer, self.parts.law, self.max_length)
        self._contained, self._watchers = Contained(drafter), Watchers()
        self._stepping = self._sealed = False
        self._doomed: list[str] = []
        self._readers: dict[str, deque[Event]] = {}
        self._defects = 0
        self._notices: list[str] = []
        self.loaded: Any = None
        """What `build` loaded, so that a companion can share it; None for an engine made by hand."""

    @property
    def tokenizer(self) -> Any:
        """What reads and writes text, or None."""
        return self._intake.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._intake = Intake(tokenizer, self.parts.law, self.max_length)

    @classmethod
    def build(cls, **options: object) -> Engine:
        """An engine from paths and names; see `build.build_engine` for the options."""
        from outrider.build import build_engine

        return build_engine(**options)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ requests
    def submit(self, prompt: Prompt, params: SamplingParams | None = None, *, request: str | None = None) -> str:
        """Queue a request and return its name. prompt: text or token ids. Raises RequestError when it cannot be served."""
        params = params or SamplingParams()
        tokens = self.encode(prompt)
        self._intake.check(tokens, params)
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        seeds = [derive_seed(seed, index) for index in range(params.n)]
        texts = [self._intake.text(tokens, params) for _ in seeds]
        with self._turns:
            name = request if request is not None else self._name()
            if self.sequences(name):
                raise RequestError(f"request {name!r} is already running; use another name")
            for index, (own, text) in enumerate(zip(seeds, texts, strict=True)):
                made = Sequence(name, index, list(tokens), len(tokens), params, own, self.max_length, self.eos, text)
                self._sequences[made.key] = made
                self.scheduler.waiting.append(made)
        return name

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt: of its text, or those it is made of. Raises RequestError for anything else."""
        prompt = as_prompt(prompt)
        if not isinstance(prompt, str):
            return prompt
        return self._intake.encode(prompt)

    def encode_all(self, prompts: Prompts) -> list[list[int]]:
        """Token ids of every prompt of one or several: a string is one prompt, and so is a flat list of ids."""
        return [self.encode(prompt) for prompt in as_prompts(prompts)]

    def sequences(self, request: str) -> list[Sequence]:
        """The live sequences of a request, by index; each object stays readable after the engine has let go of it."""
        with self._turns:
            return [s for key, s in self._sequences.items() if key[0] == request]

    def abort(self, request: str) -> bool:
        """Drop a request; its slots are free before the next step. True if it was there."""
        with self._turns:
            found = self.sequences(request)
            if self._sealed:  # a collected stream, say, in the middle of a forward: its rows are still on their way
                self._doomed.append(request)
            else:
                for sequence in found:
                    self._forget(sequence)
        return bool(found)

    def preempt(self, request: str) -> bool:
        """Send a request back to the queue; it resumes with the same tokens and the same noise. True if it was running."""
        with self._turns:
            found = [s for s in self.scheduler.running if s.request == request]
            for sequence in found:
                self.scheduler.drop(sequence, self._release)
                self.scheduler.waiting.appendleft(sequence)
        return bool(found)

    def reset(self) -> tuple[Counts, dict[str, float]]:
        """Start new sums (counts, seconds by phase) and return the old ones."""
        with self._turns:
            old = self.counts, self.seconds
            self.counts, self.seconds = Counts(), dict.fromkeys(PHASES, 0.0)
        return old

    @property
    def incidents(self) -> int:
        """Defects that were contained: drafts that were none, drafters, controllers and sinks that raised, grammars given up."""
        return self._defects + self._contained.faults + self._watchers.incidents

    @property
    def drafter_faults(self) -> int:
        """How often a drafter has raised, or returned what is no draft; each cost its drafts of a step."""
        return self._contained.faults

    @property
    def notices(self) -> list[str]:
        """Sentences that a user should read: how parts were loaded, and which of them failed since."""
        return [*self._notices, *self._contained.notices, *self._watchers.notices]

    @notices.setter
    def notices(self, sentences: Iterable[str]) -> None:
        self._notices = list(sentences)

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    # ------------------------------------------------------------------ stepping
    def step(self, deliver: Callable[[list[Event]], None] | None = None) -> list[Event]:
        """Advance every running sequence once; returns what was added. Nothing to do returns an empty list.

        deliver: called with those of sequences that go on as soon as they are known, before the next draft is made; it may abort
        requests. What ends a sequence is known when the step is over and in all the sums.
        """
        with self._turns:
            if self._stepping:
                raise RequestError(
                    "the engine is in the middle of a step: a sink or `deliver` may abort requests, not step"
                )
            self._stepping = True
            try:
                return self._step(deliver)
            finally:
                self._stepping = False
                self._unseal()

    def _step(self, deliver: Callable[[list[Event]], None] | None) -> list[Event]:
        start, self._sealed = perf_counter(), True
        self.scheduler.admit()
        works = self.scheduler.plan()
        if not works:
            return []
        draft, defects = honest(self._pending(works), self.parts.target.vocab_size)
        # a draft is looked at once: should this step fail, the next one must not judge tokens that have been seen
        self._draft, self._drafted = Draft.empty(0, self.parts.target.device), []
        judged = verify(self.parts, works, draft)
        out = emit(self.parts, works, judged)
        self._defects += defects + out.incidents
        for sequence in out.ended:
            self._forget(sequence)
        self._unseal()
        for event in out.events:
            if event.request in self._readers:
                self._readers[event.request].append(event)
        if deliver is not None:
            deliver([e for e in out.events if e.finish_reason is None])
        drafting = perf_counter()
        self._propose(works, judged)
        end = perf_counter()
        judged.seconds["draft"] = end - drafting
        judged.seconds["host"] = (end - start) - sum(judged.seconds[k] for k in PHASES if k != "host")
        self._record(judged, out)
        return out.events

    def run(self) -> Iterator[Event]:
        """Step until nothing is left, yielding the events of all requests."""
        while self.busy:
            yield from self.step()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Event]:
        """Events of one request as they come; leaving the loop early aborts it."""
        with self._turns:
            name = self.submit(prompt, params)
            samples, events = self.sequences(name), deque[Event]()
            self._readers[name] = events  # others' steps add to it too
        try:
            while events or self._alive(samples):
                if not events:
                    self.step()
                while events:
                    yield events.popleft()
        finally:
            self._readers.pop(name, None)
            self.abort(name)

    def generate(
        self, prompts: Prompts, params: SamplingParams | Iterable[SamplingParams] | None = None
    ) -> list[Result]:
        """Decode one prompt or several together and return a result for each, in their order.

        prompts: text, or token ids (a list, an array or a tensor), or any iterable of those. params: for all, or one for each. A
        prompt that is refused leaves nothing of its neighbours behind.
        """
        texts = self.encode_all(prompts)
        many = [params] * len(texts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(many) != len(texts):
            raise RequestError(f"{len(texts)} prompts but {len(many)} sampling parameters: give one, or one for each")
        mine: dict[str, list[Sequence]] = {}
        try:
            for prompt, p in zip(texts, many, strict=True):
                with self._turns:
                    name = self.submit(prompt, p)
                    mine[name] = self.sequences(name)
            while any(map(self._alive, mine.values())):
                self.step()
        finally:
            for name in mine:
                self.abort(name)
        return [result_of(name, group) for name, group in mine.items()]

    # ------------------------------------------------------------------ inside a step
    def _pending(self, works: list[Work]) -> Draft:
        """The pending draft, in the order of this step's scored sequences."""
        where = {s.key: b for b, s in enumerate(self._drafted) if s.slot >= 0}
        return self._draft.take([where.get(w.sequence.key, -1) for w in works if w.scored])

    def _propose(self, works: list[Work], judged: Judged) -> None:
        """The next draft, of every sequence that goes on."""
        live = list(self.scheduler.running)
        if not live:
            return
        self._draft = propose(self.parts, judged, works, live, self._budget(live), self._drafter())
        self._drafted = live

    def _drafter(self) -> Contained:
        """The drafter, which may have been exchanged for one that the engine knows as little."""
        if self._contained.drafter is not self.parts.drafter:
            self._contained = Contained(self.parts.drafter)
        return self._contained

    def _budget(self, live: list[Sequence]) -> list[int]:
        """Depth each sequence may draft: the controller's wish within what may still be emitted."""
        wish = self._watchers.wish(self.controller, [s.view() for s in live])
        ready = [len(s.tokens) - s.cached == 1 and not self.parts.law.weary(s.slot) for s in live]
        wish = [
            w if s.params.draft_length is None else min(w, s.params.draft_length)
            for w, s in zip(wish, live, strict=True)
        ]
        return [
            max(0, min(w, s.room - 1, self.parts.drafter.max_depth)) if r else 0
            for w, s, r in zip(wish, live, ready, strict=True)
        ]

    def _record(self, judged: Judged, out: Emission) -> None:
        self.steps += 1
        self.counts.merge(out.counts)
        for phase in PHASES:
            self.seconds[phase] += judged.seconds[phase]
        record = StepRecord(
            judged.rows.count,
            len(judged.draft.counts),
            len(self.scheduler.running),
            len(self.scheduler.waiting),
            judged.seconds,
            out.counts,
            out.fresh,
        )
        self._watchers.tell(self.controller, self.sinks, record)

    # ------------------------------------------------------------------ small helpers
    def _alive(self, sequences: list[Sequence]) -> bool:
        """Whether some of them neither ended nor were aborted."""
        return any(self._sequences.get(s.key) is s for s in sequences)

    def _unseal(self) -> None:
        """From here on requests may go at once; those that were to go in the meantime go now."""
        self._sealed = False
        while self._doomed:
            self.abort(self._doomed.pop())

    def _forget(self, sequence: Sequence) -> None:
        self.scheduler.drop(sequence, self._release)
        self._sequences.pop(sequence.key, None)

    def _release(self, slots: list[int]) -> None:
        self.parts.kv.release(slots)
        self.parts.law.release(slots)
        self._drafter().release(slots)

    def compile_grammar(self, grammar: str) -> None:
        """Compile a `SamplingParams.grammar` ahead of its request, from any thread. Raises RequestError for a bad one."""
        self._intake.grammars().compile(grammar)

    def _name(self) -> str:
        while True:
            self._names += 1
            if not self.sequences(name := f"request-{self._names}"):
                return name
