"""The engine: admit, step, stream, abort. No method names, no first step, no speculation mode."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from outrider.engine.contracts import check_parts
from outrider.engine.guard import honest
from outrider.engine.prompts import Prompt, Prompts, as_prompt, as_prompts
from outrider.engine.scheduler import Scheduler, Work
from outrider.engine.sequence import Event, Sequence, TokenLogprob
from outrider.engine.step import Judged, Parts, propose, verify
from outrider.engine.text import TextStream
from outrider.errors import CapabilityError, RequestError
from outrider.noise import derive_seed
from outrider.protocols import Controller, Drafter, Rule, Sink, Target
from outrider.sampling.grammar import Grammars, tokenizer_json
from outrider.sampling.law import Law, logprobs_of
from outrider.sampling.params import SamplingParams
from outrider.types import PHASES, Counts, Draft, StepRecord


@dataclass(frozen=True, slots=True)
class Output:
    """One finished sample of a request."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    counts: Counts
    origins: tuple[str, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One finished request: its prompt and its `n` outputs."""

    request: str
    prompt: tuple[int, ...]
    outputs: tuple[Output, ...]

    @property
    def text(self) -> str:
        return self.outputs[0].text


class Engine:
    """Decodes many sequences together, each exactly by the target's law.

    target, drafter, rule, controller: see `protocols`. tokenizer: a Hugging Face tokenizer, or None to work on ids alone.
    slots: sequences decoded together. max_length: most tokens (prompt and output) of a sequence; the target's context if None.
    chunk: rows of a prompt chunk. eos: ids that end a sequence. sinks: receive one StepRecord per step.
    Raises CapabilityError when parts do not fit together.
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
    ) -> None:
        check_parts(target, drafter, rule, controller)
        check_fit(target, drafter, rule, allow_lossy)
        self.max_length = min(max_length or target.max_length, target.max_length)
        self.tokenizer, self.controller, self.sinks, self.eos = tokenizer, controller, tuple(sinks), frozenset(eos)
        kv = target.new_kv(slots, self.max_length + drafter.max_nodes)
        drafter.bind(slots, self.max_length)
        self.parts = Parts(target, kv, Law(target.vocab_size, tuple(self.eos)), rule, drafter)
        self.scheduler = Scheduler(slots, chunk=chunk)
        self.counts, self.seconds = Counts(), dict.fromkeys(PHASES, 0.0)
        self.steps = self.incidents = 0
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._draft, self._drafted = Draft.empty(0, target.device), list[Sequence]()
        self._names = 0
        self.notices: list[str] = []
        self.loaded: Any = None
        """What `engine.build` loaded, so that a companion can share it; None for an engine made by hand."""

    @classmethod
    def build(cls, **options: object) -> Engine:
        """An engine from paths and names; see `engine.build.build_engine` for the options."""
        from outrider.engine.build import build_engine

        return build_engine(**options)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ requests
    def submit(self, prompt: Prompt, params: SamplingParams | None = None, *, request: str | None = None) -> str:
        """Queue a request and return its name. prompt: text or token ids. Raises RequestError when it cannot be served."""
        params = params or SamplingParams()
        tokens = self.encode(prompt)
        self._check(tokens, params)
        name = request if request is not None else self._name()
        if (name, 0) in self._sequences:
            raise RequestError(f"request {name!r} is already running; use another name")
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        for index in range(params.n):
            text = self._text(tokens, params)
            sequence = Sequence(
                name,
                index,
                list(tokens),
                len(tokens),
                params,
                derive_seed(seed, index),
                self.max_length,
                self.eos,
                text,
            )
            self._sequences[sequence.key] = sequence
            self.scheduler.waiting.append(sequence)
        return name

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt: of its text, or those it is made of. Raises RequestError for anything else."""
        prompt = as_prompt(prompt)
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer: build the engine with one, or pass token ids")
        return list(self.tokenizer.encode(prompt))  # type: ignore[attr-defined]

    def encode_all(self, prompts: Prompts) -> list[list[int]]:
        """Token ids of every prompt of one or several: a string is one prompt, and so is a flat list of ids."""
        return [self.encode(prompt) for prompt in as_prompts(prompts)]

    def sequences(self, request: str) -> list[Sequence]:
        """The live sequences of a request, by index; each object stays readable after the engine has let go of it."""
        return [s for key, s in self._sequences.items() if key[0] == request]

    def abort(self, request: str) -> bool:
        """Drop a request; its slots are free before the next step. True if it was there."""
        found = self.sequences(request)
        for sequence in found:
            self._forget(sequence)
        return bool(found)

    def preempt(self, request: str) -> bool:
        """Send a request back to the queue; it resumes with the same tokens and the same noise. True if it was running."""
        found = [s for s in self.scheduler.running if s.request == request]
        for sequence in found:
            self.scheduler.drop(sequence, self._release)
            self.scheduler.waiting.appendleft(sequence)
        return bool(found)

    def reset(self) -> tuple[Counts, dict[str, float]]:
        """Start new sums (counts, seconds by phase) and return the old ones."""
        old = self.counts, self.seconds
        self.counts, self.seconds = Counts(), dict.fromkeys(PHASES, 0.0)
        return old

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    # ------------------------------------------------------------------ stepping
    def step(self, deliver: Callable[[list[Event]], None] | None = None) -> list[Event]:
        """Advance every running sequence once; returns what was added. Nothing to do returns an empty list.

        deliver: called with those of sequences that go on as soon as they are known, before the next draft is made; it may abort
        requests. What ends a sequence is known when the step is over and in all the sums.
        """
        start = perf_counter()
        self.scheduler.admit()
        works = self.scheduler.plan()
        if not works:
            return []
        draft, defects = honest(self._pending(works), self.parts.target.vocab_size)
        self.incidents += defects
        judged = verify(self.parts, works, draft)
        counts, fresh = Counts(), Counts()
        events = self._emit(works, judged, counts, fresh)
        if deliver is not None:
            deliver([e for e in events if e.finish_reason is None])
        live = list(self.scheduler.running)
        drafting = perf_counter()
        self._draft, self._drafted = Draft.empty(0, self.parts.target.device), []
        if live:
            self._draft, self._drafted = propose(self.parts, judged, works, live, self._budget(live)), live
        end = perf_counter()
        judged.seconds["draft"] = end - drafting
        judged.seconds["host"] = (end - start) - sum(judged.seconds[k] for k in PHASES if k != "host")
        self._record(judged, counts, fresh)
        return events

    def run(self) -> Iterator[Event]:
        """Step until nothing is left, yielding events."""
        while self.busy:
            yield from self.step()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Event]:
        """Events of one request as they come; leaving the loop early aborts it."""
        name = self.submit(prompt, params)
        try:
            while any(key[0] == name for key in self._sequences):
                yield from (e for e in self.step() if e.request == name)
        finally:
            self.abort(name)

    def generate(
        self, prompts: Prompts, params: SamplingParams | Iterable[SamplingParams] | None = None
    ) -> list[Result]:
        """Decode one prompt or several together and return a result for each, in their order.

        prompts: text, or token ids (a list, an array or a tensor), or any iterable of those. params: for all, or one for each.
        """
        texts = self.encode_all(prompts)
        many = [params] * len(texts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(many) != len(texts):
            raise RequestError(f"{len(texts)} prompts but {len(many)} sampling parameters: give one, or one for each")
        names = self._submit_all(texts, many)
        mine = {name: [s for key, s in self._sequences.items() if key[0] == name] for name in names}
        try:
            while any(s.finish_reason is None for group in mine.values() for s in group):
                self.step()
        finally:
            for name in names:
                self.abort(name)
        return [Result(n, tuple(mine[n][0].tokens[: mine[n][0].prompt]), tuple(map(_output, mine[n]))) for n in names]

    def _submit_all(self, texts: list[list[int]], params: Seq[SamplingParams | None]) -> list[str]:
        """Queue every prompt, or none of them: one that is refused leaves nothing of its neighbours behind."""
        names: list[str] = []
        try:
            for text, p in zip(texts, params, strict=True):
                names.append(self.submit(text, p))
        except BaseException:
            for name in names:
                self.abort(name)
            raise
        return names

    # ------------------------------------------------------------------ inside a step
    def _pending(self, works: list[Work]) -> Draft:
        """The pending draft, in the order of this step's scored sequences."""
        where = {s.key: b for b, s in enumerate(self._drafted) if s.slot >= 0}
        return self._draft.take([where.get(w.sequence.key, -1) for w in works if w.scored])

    def _budget(self, live: list[Sequence]) -> list[int]:
        """Depth each sequence may draft: the controller's wish within what may still be emitted."""
        wish = self.controller.budget([s.view() for s in live])
        ready = [len(s.tokens) - s.cached == 1 for s in live]
        wish = [
            w if s.params.draft_length is None else min(w, s.params.draft_length)
            for w, s in zip(wish, live, strict=True)
        ]
        return [
            max(0, min(w, s.room - 1, self.parts.drafter.max_depth)) if r else 0
            for w, s, r in zip(wish, live, ready, strict=True)
        ]

    def _emit(self, works: list[Work], judged: Judged, counts: Counts, fresh: Counts) -> list[Event]:
        """Append the verdict's tokens, cut where a sequence ends, free finished slots; add to the sums of the step."""
        events: list[Event] = []
        verdict, draft, b = judged.verdict, judged.draft, -1
        for work in works:
            sequence = work.sequence
            sequence.cached = self.parts.kv.length[sequence.slot]
            if not work.scored:
                continue
            b += 1
            if b in judged.unusable:
                events.append(
                    sequence.fail("the target returned NaN or empty logits: check the checkpoint and the dtype")
                )
                self.parts.kv.erase(sequence.slot)
                self._forget(sequence)
                continue
            path, accepted = verdict.path[b], len(verdict.path[b])
            tokens = [draft.tokens[k] for k in path] + [verdict.next_token[b]]
            rejected = verdict.judged[b] > accepted
            last = "corrected" if rejected else "bonus" if accepted else "sampled"
            ledger = (verdict.risk[b], verdict.spread[b], verdict.bias[b])
            before = sequence.counts.emitted
            event = sequence.emit(tokens, ["accepted"] * accepted + [last], self._logprobs(sequence, judged, b))
            for sums in (sequence.counts, counts, *([fresh] if sequence.params.seed is None else [])):
                sums.add(draft.counts[b], accepted, verdict.judged[b], *ledger)
            counts.emitted += sequence.counts.emitted - before
            events.append(event)
            if sequence.finish_reason is not None:
                self._forget(sequence)
        return events

    def _logprobs(self, sequence: Sequence, judged: Judged, b: int) -> list[TokenLogprob]:
        """Log-probabilities of the tokens of a verdict, read off the rows that verified them."""
        top = sequence.params.logprobs
        if top is None:
            return []
        path = judged.verdict.path[b]
        rows = [b, *(len(judged.draft.counts) + k for k in path)]
        tokens = [*(judged.draft.tokens[k] for k in path), judged.verdict.next_token[b]]
        values, best = logprobs_of(judged.scores.logits[rows], tokens, top)
        return [TokenLogprob(t, v, tuple(alt)) for t, v, alt in zip(tokens, values, best, strict=True)]

    def _record(self, judged: Judged, counts: Counts, fresh: Counts) -> None:
        self.steps += 1
        self.counts.merge(counts)
        for phase in PHASES:
            self.seconds[phase] += judged.seconds[phase]
        record = StepRecord(
            judged.rows.count,
            len(judged.draft.counts),
            len(self.scheduler.running),
            len(self.scheduler.waiting),
            judged.seconds,
            counts,
            fresh,
        )
        self.controller.observe(record)
        for sink in self.sinks:
            sink(record)

    # ------------------------------------------------------------------ small helpers
    def _forget(self, sequence: Sequence) -> None:
        self.scheduler.drop(sequence, self._release)
        self._sequences.pop(sequence.key, None)

    def _release(self, slots: list[int]) -> None:
        self.parts.kv.release(slots)
        self.parts.drafter.release(slots)

    def _check(self, tokens: list[int], params: SamplingParams) -> None:
        vocab = self.parts.target.vocab_size
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token")
        if len(tokens) >= self.max_length:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.max_length}: shorten it to at most "
                f"{self.max_length - 1}, or build the engine with a larger max_length if the model allows it"
            )
        wrong = next((t for t in tokens if not 0 <= t < vocab), None)
        if wrong is not None:
            raise RequestError(
                f"prompt token {wrong} is outside the vocabulary of {vocab}: use this target's tokenizer"
            )
        params.check_vocab(vocab)
        if params.stop and self.tokenizer is None:
            raise RequestError("a stop string needs a tokenizer: build the engine with one, or use stop_token_ids")
        if params.grammar is not None:
            self.compile_grammar(params.grammar)

    def compile_grammar(self, grammar: str) -> None:
        """Compile a `SamplingParams.grammar` ahead of its request, from any thread. Raises RequestError for a bad one."""
        self._grammars().compile(grammar)

    def _grammars(self) -> Grammars:
        """The grammars of this engine's tokenizer, made for the first request that needs them."""
        law = self.parts.law
        if law.grammars is None:
            text = tokenizer_json(self.tokenizer)
            if text is None:
                raise RequestError("a grammar needs a fast tokenizer (tokenizer.json), and this engine has none")
            law.grammars = Grammars(text, law.vocab_size, law.eos_ids)
        return law.grammars

    def _text(self, prompt: list[int], params: SamplingParams) -> TextStream | None:
        """The text of one sequence; tokenizers whose decoding looks to the left need the prompt's last tokens."""
        if self.tokenizer is None:
            return None
        return TextStream(self.tokenizer, params.stop, context=prompt[-12:], min_tokens=params.min_tokens)

    def _name(self) -> str:
        self._names += 1
        return f"request-{self._names}"


def check_fit(target: Target, drafter: Drafter, rule: Rule, allow_lossy: bool) -> None:
    """Mismatches fail when the engine is built, with the remedy in the sentence (contract 8)."""
    if drafter.trees and not target.trees:
        raise CapabilityError(
            f"drafter {drafter.name!r} proposes trees and this target cannot score them: use a chain (branching 1)"
        )
    if drafter.trees and not rule.trees:
        raise CapabilityError(
            f"rule {rule.name!r} judges chains only and drafter {drafter.name!r} proposes trees: change one"
        )
    if drafter.max_nodes and not target.rewinds:
        raise CapabilityError("this target cannot forget rejected tokens (recurrent state): use the drafter 'none'")
    if not rule.lossless and not allow_lossy:
        raise CapabilityError(
            f"rule {rule.name!r} changes the distribution of the text: say allow_lossy (--allow-lossy) to use it"
        )


def with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    """The same parameters with another seed."""
    return replace(params, seed=seed)


def _output(s: Sequence) -> Output:
    return Output(
        s.index,
        tuple(s.output),
        "".join(s.pieces),
        s.finish_reason or "abort",
        s.counts,
        tuple(s.origins),
        tuple(s.logprobs),
        s.error,
    )
