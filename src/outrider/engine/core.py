"""The engine: it takes requests, makes steps and returns events. It knows no method by name, and has no speculation mode."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from outrider.deprecated import Renamed
from outrider.engine.intake import Intake
from outrider.engine.outputs import Result, result_of
from outrider.engine.parts import CoreOptions, Hooks, Parts
from outrider.engine.prompts import Prompt, Prompts, as_params, as_prompt, as_prompts
from outrider.engine.scheduler import Scheduler
from outrider.engine.sequence import Event, Sequence
from outrider.engine.state import StepState
from outrider.engine.step import step
from outrider.engine.turns import Turns
from outrider.errors import RequestError
from outrider.noise import derive_seed
from outrider.params import SamplingParams
from outrider.progress import Tell, notebook_bar
from outrider.protocols import Controller, ImageReader
from outrider.records import PHASES, Counts, StepRecord
from outrider.types import SequenceView

logger = logging.getLogger(__name__)


class EngineCore:
    """Decodes many sequences together, each exactly by the target's distribution.

    parts, hooks, options: its components, its observers, and how it runs; `build.Engine` makes them from a target and a drafter.

    Sharing: several streams, `generate` and `step` may run at the same time and are decoded together. Any thread may call any
    method: calls take turns, in the order they arrive, one step at a time. `abort` may be called from inside a step (`deliver`, a
    sink); `step`, `generate` and `stream` may not. A process forked from one that has built an engine cannot compute:
    every call raises CapabilityError there; start processes with multiprocessing's "spawn".
    Exceptions of a drafter, the controller or a sink are caught, counted in `defects` and reported in `notices`; no request ends.
    """

    incidents = Renamed("defects")

    def __init__(self, parts: Parts, hooks: Hooks, options: CoreOptions) -> None:
        self.state = StepState(parts, hooks, options)
        """What steps read and change. Its methods take no turn: they are the engine's."""
        self._turns = options.turns or Turns()
        self._intake = Intake(options.tokenizer, parts.pipeline, options.max_length, options.images)
        self._names = 0
        self._stepping = False

    @property
    def parts(self) -> Parts:
        """The components: target, KV cache, logits processors, rule and drafter."""
        return self.state.parts

    @property
    def options(self) -> CoreOptions:
        """How it runs."""
        return self.state.options

    @property
    def scheduler(self) -> Scheduler:
        """The slots, and the queue before them."""
        return self.state.scheduler

    @property
    def counts(self) -> Counts:
        """Sums over the steps since it was made, or since `reset`."""
        return self.state.counts

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase of the same steps."""
        return self.state.seconds

    @property
    def steps(self) -> int:
        """Steps since it was made."""
        return self.state.steps

    @property
    def max_length(self) -> int:
        """Most tokens (prompt and output) of a sequence."""
        return self.options.max_length

    @property
    def eos(self) -> frozenset[int]:
        """Ids that end a sequence."""
        return frozenset(self.parts.pipeline.eos_ids)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None if the engine works on token ids alone."""
        return self.options.tokenizer

    @property
    def images(self) -> ImageReader:
        """Makes prompts with images. Raises CapabilityError if the target reads none."""
        return self._intake.reader

    @property
    def controller(self) -> Controller:
        """The controller, which sets the draft length of each sequence."""
        return self.state.hooks.controller

    def __reduce__(self) -> Any:
        raise TypeError(
            "an engine holds a model and locks, and cannot be copied or sent to another process: build one there"
        )

    # ------------------------------------------------------------------ requests
    def submit(self, prompt: Prompt, params: SamplingParams | None = None, *, request: str | None = None) -> str:
        """Queue a request and return its name. prompt: text or token ids. Raises RequestError when it cannot be served."""
        params = SamplingParams() if params is None else as_params(params)
        tokens = self.encode(prompt)
        self._intake.check(tokens, params)
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        seeds = [derive_seed(seed, index) for index in range(params.n)]
        texts = [self._intake.text(tokens, params) for _ in seeds]
        ends = self.eos
        with self._turns:
            name = request if request is not None else self._name()
            if self.sequences(name):
                raise RequestError(f"request {name!r} is already running; use another name")
            pictured = self._intake.pictured(tokens)
            for index, (own, text) in enumerate(zip(seeds, texts, strict=True)):
                made = Sequence(name, index, list(tokens), len(tokens), params, own, self.max_length, ends, text)
                made.shares, made.pictured = self.options.prefix_cache, pictured
                self.state.live.setdefault(name, {})[index] = made
                self.scheduler.waiting.append(made)
        return name

    def check(self, tokens: list[int], params: SamplingParams) -> None:
        """Raise RequestError for a request that cannot be served."""
        self._intake.check(tokens, params)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt, which is text or token ids already. Raises RequestError for anything else."""
        prompt = as_prompt(prompt)
        if not isinstance(prompt, str):
            return prompt
        return self._intake.encode(prompt)

    def encode_all(self, prompts: Prompts) -> list[list[int]]:
        """Token ids of each prompt. A string is one prompt; a flat list of ids is one prompt too."""
        return [self.encode(prompt) for prompt in as_prompts(prompts)]

    def sequences(self, request: str) -> list[Sequence]:
        """The live sequences of a request, by index; each object stays readable after the engine has dropped it."""
        with self._turns:
            return self.state.sequences(request)

    def abort(self, request: str) -> bool:
        """Drop a request; its slots are free before the next step. Returns whether the request existed."""
        with self._turns:
            return self.state.drop(request)

    def preempt(self, request: str) -> bool:
        """Send a request back to the queue; it resumes with the same tokens and the same noise. Returns whether it was running."""
        with self._turns:
            found = [s for s in self.scheduler.running if s.request == request]
            for sequence in found:
                self.scheduler.send_back(sequence, self.state.release)
        return bool(found)

    def reset(self) -> tuple[Counts, dict[str, float]]:
        """Start new sums (counts, seconds by phase) and return the old ones."""
        with self._turns:
            old = self.counts, self.seconds
            self.state.counts, self.state.seconds = Counts(), dict.fromkeys(PHASES, 0.0)
        return old

    @property
    def defects(self) -> int:
        """Contained defects: invalid drafts, exceptions of drafters, controllers and sinks, and exhausted grammars."""
        return sum(n for kind, n in self.state.watchers.defects.items() if kind != "drafter") + self.drafter_faults

    @property
    def drafter_faults(self) -> int:
        """How often a drafter raised or returned something that is not a draft; each time it lost its drafts of one step."""
        return self.state.drafter.faults

    @property
    def notices(self) -> list[str]:
        """Sentences that a user should read about parts that have failed."""
        return [*self.state.drafter.notices, *self.state.watchers.notices]

    @property
    def busy(self) -> bool:
        return bool(self.state.live)

    # ------------------------------------------------------------------ stepping
    def step(self, deliver: Callable[[list[Event]], None] | None = None) -> list[Event]:
        """Advance every running sequence once; returns the events. With nothing to do the list is empty.

        deliver: called with the events of sequences that continue, as soon as they are known and before the next draft is made; it
        may abort requests. Events that end a sequence are returned only when the step is complete and counted in all sums.
        """
        with self._turns:
            if self._stepping:
                raise RequestError(
                    "the engine is in the middle of a step: a sink or `deliver` may abort requests, not step"
                )
            try:
                self._stepping = True
                self.state.seal()
                return step(self.state, deliver)
            finally:
                self._stepping = False
                self.state.unseal()

    def run(self) -> Iterator[Event]:
        """Step until no request is left, yielding the events of all requests."""
        while self.busy:
            yield from self.step()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Event]:
        """Events of one request as they come; leaving the loop early aborts it."""
        with self._turns:
            name = self.submit(prompt, params)
            samples, events = self.sequences(name), deque[Event]()
            self.state.readers[name] = events  # steps that other threads make add to it too
        try:
            while events or self._alive(samples):
                if not events:
                    self.step()
                while events:
                    yield events.popleft()
        finally:
            self.state.readers.pop(name, None)
            self.abort(name)

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: Tell | None = None,
    ) -> list[Result]:
        """Decode one prompt or several together and return a result for each, in their order.

        prompts: text, or token ids (a list, an array or a tensor), or any iterable of those. params: for all, or one for each. If
        one prompt is refused, the requests already queued for the others are aborted. progress: told the share of the requested
        tokens that is there, after each step; None: a bar in a notebook, once it has taken a second.
        """
        texts = self.encode_all(prompts)
        many: list[SamplingParams | None]
        if params is None or isinstance(params, SamplingParams):
            many = [params] * len(texts)
        elif isinstance(params, Mapping | str) or not isinstance(params, Iterable):
            many = [as_params(params)]
        else:
            many = list(params)
        if len(many) != len(texts):
            raise RequestError(f"{len(texts)} prompts but {len(many)} sampling parameters: give one, or one for each")
        mine: dict[str, list[Sequence]] = {}
        try:
            for prompt, p in zip(texts, many, strict=True):
                with self._turns:
                    name = self.submit(prompt, p)
                    mine[name] = self.sequences(name)
            with notebook_bar(f"generating {len(texts)}", progress) as tell:
                while any(map(self._alive, mine.values())):
                    self.step()
                    if tell is not None:
                        tell(self._share(mine.values()))
        finally:
            for name in mine:
                self.abort(name)
        return [result_of(name, group) for name, group in mine.items()]

    # ------------------------------------------------------------------ small helpers
    def _share(self, groups: Iterable[list[Sequence]]) -> float:
        """Share of the tokens asked for that is there; a sequence that has ended counts as whole."""
        every = [s for group in groups for s in group]
        there = sum(
            s.params.max_tokens if s.finish_reason else min(len(s.tokens) - s.prompt, s.params.max_tokens)
            for s in every
        )
        return there / max(1, sum(s.params.max_tokens for s in every))

    def _alive(self, sequences: list[Sequence]) -> bool:
        """Whether any of them has neither ended nor been aborted."""
        return any(self.state.live.get(s.request, {}).get(s.index) is s for s in sequences)

    def compile_grammar(self, grammar: str) -> None:
        """Compile a `SamplingParams.grammar` ahead of its request, from any thread. Raises RequestError for a bad one."""
        self._intake.compile(grammar)

    def _name(self) -> str:
        while True:
            self._names += 1
            if not self.sequences(name := f"request-{self._names}"):
                return name

    def warm_up(self) -> None:
        """Touch every part once, plain and drafted, so that the first user does not pay for it. Nobody is told of these steps.

        Raises RequestError for an engine that has requests: theirs are the slots that this would use.
        """
        with self._turns:
            if self.busy:
                raise RequestError("an engine that has requests is warm: warm it up before the first, or not at all")
            options = replace(self.options, turns=self._turns)
            other = EngineCore(self.parts, Hooks(_Deepest(self.parts.drafter.max_depth)), options)
            prompt = [0, 1, 2, 3][: self.parts.target.vocab_size]
            for count in {1, min(2, self.options.slots)}:
                other.generate([prompt] * count, SamplingParams(max_tokens=8, ignore_eos=True, seed=0))
            for notice in other.notices:
                logger.warning("while warming up: %s", notice)


class _Deepest:
    """A controller that always asks for the longest draft."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def budget(self, sequences: Seq[SequenceView]) -> list[int]:
        return [self.depth] * len(sequences)

    def observe(self, record: StepRecord) -> None:
        pass
