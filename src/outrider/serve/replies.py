"""Replies to requests: from the events of their samples to a whole reply or to chunks; completions, usage, and vLLM's acceptance
metrics. Other wire formats derive from `Reply` (`chat/reply.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Any

from outrider import __version__
from outrider.drafters.prediction import Places, Replay
from outrider.engine.sequence import Event, TokenLogprob
from outrider.errors import OutriderError, RequestError
from outrider.records import Counts
from outrider.serve.bridge import Bridge
from outrider.serve.requests import RequestFields
from outrider.serve.spelling import Offsets, Spelling
from outrider.serve.sse import DONE, PIECE, frame
from outrider.serve.tickets import Ticket
from outrider.telemetry.ledger import ledger, ratio
from outrider.telemetry.prometheus import drafts

FINGERPRINT = f"outrider-{__version__}"


@dataclass(slots=True)
class ReplyChoice:
    """One sample as it grows. steps: tokens and accepted drafts of each step, to count the tokens of a prediction."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    steps: list[tuple[tuple[int, ...], int]] = field(default_factory=list)

    def add(self, event: Event) -> None:
        self.text.append(event.text)
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.finish = event.finish_reason
        self.steps.append((event.tokens, event.origins.count("accepted")))


class Reply:
    """The reply to one request, whole or in chunks.

    tokenizer: for the strings of log-probabilities. details: put `metrics.speculative_decoding` into the reply. kinds: the names of
    its object, whole and as a chunk. prefix: of its id.
    """

    kinds = ("text_completion", "text_completion")
    prefix = "cmpl-"

    def __init__(self, request: RequestFields, ticket: Ticket, tokenizer: Any, longest: int, details: bool) -> None:
        self.request, self.ticket, self.tokenizer = request, ticket, tokenizer
        self.longest, self.details = longest, details
        self.created = int(time())
        self.choices = [ReplyChoice() for _ in range(ticket.choices)]
        self.prediction: tuple[int, ...] = ()
        self._places: Places | None = None
        self._replays: dict[int, Replay] = {}
        self._spelling = Spelling(tokenizer)
        self._offsets = [Offsets(self._spelling) for _ in self.choices]

    # ------------------------------------------------------------------ whole
    async def whole(self, bridge: Bridge) -> dict[str, Any]:
        """Wait for the end and build the reply."""
        await self._prepare()
        async for batch in bridge.events(self.ticket):
            self._take(batch)
        choices = [self._choice(i, c, await self._spaced(i, c.logprobs)) for i, c in enumerate(self.choices)]
        return {**self._head(self.kinds[0]), "choices": choices, "usage": self.usage(), **self._metrics()}

    async def _spaced(self, index: int, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        """The log-probabilities of a whole text. Other tasks may run after every PIECE of them."""
        out = self._logprobs(index, entries[:PIECE])
        for start in range(PIECE, len(entries), PIECE):
            await asyncio.sleep(0)
            for name, more in (self._logprobs(index, entries[start : start + PIECE]) or {}).items():
                if out is not None and isinstance(more, list):
                    out[name] += more
        return out

    def _choice(self, index: int, c: ReplyChoice, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        out: dict[str, Any] = {"index": index, "finish_reason": c.finish, "logprobs": logprobs, **self._said(index, c)}
        if self.request.return_token_ids:
            out["token_ids"] = c.tokens
        return out

    def _said(self, index: int, c: ReplyChoice) -> dict[str, Any]:
        """What a whole sample says."""
        return {"text": "".join(c.text)}

    # ------------------------------------------------------------------ streamed
    async def frames(self, bridge: Bridge, pad: bool = False) -> AsyncIterator[bytes]:
        """The chunks as they come, usage if requested, and the end marker; an error becomes one event."""
        try:
            await self._prepare()
            async for batch in bridge.events(self.ticket):
                for data in self.rendered(batch, pad):
                    yield data
                    if len(batch) > PIECE:
                        await asyncio.sleep(0)  # let other tasks run
            if self.request.usage_in_stream:
                yield frame({**self._chunk([], True), **self._metrics()}, pad)
        except OutriderError as error:
            kind = "invalid_request_error" if isinstance(error, RequestError) else "server_error"
            yield frame(error_body(str(error), kind, None, None), pad)
        yield DONE

    def rendered(self, batch: list[tuple[int, Event]], pad: bool) -> Iterator[bytes]:
        """The chunks of a batch of events."""
        for start in range(0, len(batch), PIECE):
            new = self._take(batch[start : start + PIECE])
            for index in sorted(new):
                for choice in self._deltas(index, new[index]):
                    yield frame(self._chunk([choice], self.request.usage_in_chunks), pad)

    def _deltas(self, index: int, c: ReplyChoice) -> list[dict[str, Any]]:
        """The chunk choices for the new part of one sample."""
        text = "".join(c.text)
        more: dict[str, Any] = {"token_ids": c.tokens} if self.request.return_token_ids else {}
        logprobs = self._logprobs(index, c.logprobs)
        if not (text or c.finish or logprobs or more):
            return []
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": c.finish, **more}]

    def _chunk(self, choices: list[dict[str, Any]], usage: bool) -> dict[str, Any]:
        out = {**self._head(self.kinds[1]), "choices": choices}
        if self.request.usage_in_stream or self.request.usage_in_chunks:
            out["usage"] = self.usage() if usage else None
        return out

    # ------------------------------------------------------------------ parts of both
    async def _prepare(self) -> None:
        """Index the prediction, which may be long, in another thread."""
        if self.prediction:
            self._places = Places(self.prediction)
            await asyncio.to_thread(self._places.prepare)

    def _accepted(self, index: int) -> int:
        """Tokens of a sample that were accepted drafts of the prediction; each step is counted once."""
        if self._places is None or self._places.prediction is not self.prediction:
            self._places = Places(self.prediction)
        replay, steps = self._replays.get(index), self.choices[index].steps
        if replay is None or replay.steps is not steps or replay.places is not self._places:
            replay = self._replays[index] = Replay(self._places, steps)
        return replay.accepted()

    def _take(self, batch: list[tuple[int, Event]]) -> dict[int, ReplyChoice]:
        """Add events to the samples; returns the new parts by sample."""
        new: dict[int, ReplyChoice] = {}
        for index, event in batch:
            self.choices[index].add(event)
            new.setdefault(index, ReplyChoice()).add(event)
        return new

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.prefix + self.ticket.id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "system_fingerprint": FINGERPRINT,
        }

    def usage(self) -> dict[str, Any]:
        """Token counts; those of a `prediction` only if there was one."""
        written = sum(len(c.tokens) for c in self.choices)
        prompt = self.ticket.prompt_tokens
        out: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": self.ticket.cached_tokens},
        }
        if self.prediction:
            accepted = [self._accepted(index) for index in range(len(self.choices))]
            out["completion_tokens_details"] = {
                "accepted_prediction_tokens": sum(accepted),
                "rejected_prediction_tokens": sum(max(0, len(self.prediction) - n) for n in accepted),
            }
        return out

    def _logprobs(self, index: int, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        return self._legacy(index, entries) if entries and self.top is not None else None

    @property
    def top(self) -> int | None:
        """How many likely tokens are reported beside each, or None."""
        return getattr(self.request, "top", None)

    def _legacy(self, index: int, entries: list[TokenLogprob]) -> dict[str, Any]:
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for e in entries:
            out["tokens"].append(self._spelling.shown(e.token))
            out["token_logprobs"].append(max(e.logprob, -9999.0))
            keys = self._spelling.keys([t for t, _ in e.top], e.token)
            out["top_logprobs"].append({key: max(v, -9999.0) for key, (_, v) in zip(keys, e.top, strict=True)})
            out["text_offset"].append(self._offsets[index].next(e.token))
        return out

    def _metrics(self) -> dict[str, Any]:
        """vLLM's per-request metrics, and ours under the key `outrider`; null for several samples, as in vLLM."""
        if not self.details:
            return {}
        one = self.ticket.sequences[0].counts if self.ticket.choices == len(self.ticket.sequences) == 1 else None
        ticket, now = self.ticket, monotonic()
        first = ticket.first or now
        tokens = sum(len(c.tokens) for c in self.choices)
        return {
            "metrics": {
                "time_to_first_token_ms": 1e3 * (first - ticket.arrived),
                "generation_time_ms": 1e3 * (now - first),
                "queue_time_ms": 1e3 * ((ticket.admitted or now) - ticket.arrived),
                "tokens_per_second": tokens / max(now - ticket.arrived, 1e-9),
                "speculative_decoding": None if one is None else acceptance(one, self.longest),
                "outrider": [rejections(s.counts) for s in ticket.sequences],
            }
        }


def acceptance(counts: Counts, longest: int) -> dict[str, Any]:
    """vLLM's `speculative_decoding` of one sample; entry j of its histogram counts steps with exactly j of `longest` accepted."""
    steps = drafts(counts)
    reached = [steps, *counts.accepted_at, *[0] * (longest + 1)][: longest + 2]
    return {
        "mean_acceptance_length": 1 + (counts.accepted - counts.cut) / steps if steps else 1.0,
        "draft_acceptance_rate": ratio(counts.accepted, counts.proposed) or 0.0,
        "acceptance_histogram": [reached[j] - reached[j + 1] for j in range(longest + 1)],
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": counts.accepted,
        "num_draft_tokens": counts.proposed,
        "num_spec_tokens": longest,
    }


def rejections(counts: Counts) -> dict[str, Any]:
    """The ledger of one sample: rejections observed and predicted, with the interval of an exact engine."""
    book = ledger(counts)
    return {
        "steps": counts.steps,
        "judged_tokens": counts.judged,
        "judged_by_position": list(counts.judged_at),
        "accepted_by_position": list(counts.accepted_at),
        "rejections": counts.rejected,
        "rejection_probability": ratio(counts.rejected, counts.judged),
        "predicted_rejections": book.predicted,
        "interval": [book.low, book.high],
        "bias": counts.bias,
    }


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error object, always with all four keys."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
