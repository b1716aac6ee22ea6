"""The OpenAI routes: from a request body to a ticket to a reply."""

from __future__ import annotations

import secrets
from dataclasses import replace
from time import time
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from outrider.errors import RequestError, unknown_name
from outrider.serve.body import Bodies
from outrider.serve.bridge import Bridge
from outrider.serve.experiment import ARM, USER, LiveExperimentHook, fixed_by_seed, join
from outrider.serve.meaning import ServedEngine, sampling
from outrider.serve.middleware import OWNER
from outrider.serve.prep import Refused, TooLong
from outrider.serve.prep_worker import conversation, encoder
from outrider.serve.replies import Reply
from outrider.serve.requests import MAX_PROMPTS, BadField, ChatRequest, CompletionRequest, parse, text_of
from outrider.serve.settings import Settings
from outrider.serve.sse import CADENCE, EventStream, paced, while_connected, written
from outrider.serve.tickets import Overloaded, Ticket, Unavailable

Body = CompletionRequest | ChatRequest
T = TypeVar("T", bound=CompletionRequest | ChatRequest)
VALUES = 50_000
"""Most values of a body besides the ids of its prompts: schemas may have many."""
PREDICTED = 4
"""Longest prediction, in multiples of the context."""
STARTED = int(time())


class OpenAI:
    """The handlers of one server."""

    def __init__(self, bridge: Bridge, settings: Settings, trial: LiveExperimentHook | None = None) -> None:
        self.bridge, self.settings, self.trial = bridge, settings, trial
        self._bodies = Bodies(settings.body, settings.body_seconds)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._answer(request, CompletionRequest)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._answer(request, ChatRequest)

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}"""
        self._check_model(request.path_params["id"])
        return JSONResponse(self._model())

    # ------------------------------------------------------------------ inside
    async def _answer(self, request: Request, kind: type[Body]) -> Any:
        body = await self.body(request, kind)
        who = body.user or request.headers.get(USER) or secrets.token_hex(8)
        reply = await while_connected(request, self.begin(body, request.scope.get(OWNER, 0), who))
        headers = {"x-request-id": reply.ticket.id} | ({ARM: reply.ticket.arm} if reply.ticket.arm else {})
        if body.stream:
            frames = reply.frames(self.bridge, self.settings.pad)
            frames = paced(frames, CADENCE) if self.settings.pad else frames
            return EventStream(frames, lambda: self.bridge.release(reply.ticket), headers)
        try:
            whole = await while_connected(request, reply.whole(self.bridge))
        finally:
            self.bridge.release(reply.ticket)
        return Response(await written(whole), media_type="application/json", headers=headers)

    async def body(self, request: Request, kind: type[T]) -> T:
        """The checked body of a request."""
        most = MAX_PROMPTS * self.bridge.engine.max_length + VALUES
        return parse(kind, await self._bodies.read(request, most))

    async def begin(self, body: Body, owner: int = 0, who: str | None = None) -> Reply:
        """Take a place for `owner`, prepare the prompts, and queue them. On failure the place is given back.

        who: the request's user, for an experiment; None: it takes part in none, as a request with its own speculation options.
        """
        try:
            self._check_model(body.model)
            count = len(body.prompts) if isinstance(body, CompletionRequest) else 1
            ticket = self.bridge.reserve(count * body.samples, owner)
        except (RequestError, Overloaded, Unavailable) as error:
            self.bridge.metrics.refused[type(error).__name__] += 1
            raise
        try:
            return await self._queue(body, ticket, None if body.speculation else who)
        except BaseException as error:
            if isinstance(error, RequestError | Unavailable):
                self.bridge.metrics.refused[type(error).__name__] += 1
            self.bridge.release(ticket)
            raise

    async def _queue(self, body: Body, ticket: Ticket, who: str | None) -> Reply:
        engine = self.bridge.engine
        facts = served(self.bridge)
        if body.prediction is not None and "prediction" not in facts.drafter.split("+"):
            raise BadField(
                "this server's drafter does not read predictions: start it with --draft prediction+...", "prediction"
            )
        prompts = await self._prompts(body, ticket.owner)
        predicted = await self._predicted(body, ticket.owner)
        params = sampling(body, facts, predicted)
        if params.max_tokens >= engine.max_length:
            params = replace(params, max_tokens=engine.max_length, min_tokens=min(params.min_tokens, engine.max_length))
        if params.grammar is not None:
            await self.bridge.compile(params.grammar, ticket.owner)
        if self.trial is not None and who is not None and not fixed_by_seed(params, engine.parts.rule.lane):
            params = join(self.trial, who, ticket, params)
        await self.bridge.submit(ticket, prompts, params)
        reply = Reply(body, ticket, engine.tokenizer, facts.longest, self.settings.details)
        reply.prediction = predicted
        return reply

    async def _prompts(self, body: Body, owner: int) -> list[list[int]]:
        if isinstance(body, ChatRequest):
            return [await self._conversation(body, owner)]
        prep = self.bridge.prep
        for prompt in body.prompts:
            if not isinstance(prompt, str) and len(prompt) > prep.most:
                raise TooLong(len(prompt), prep.most)
        texts = [p for p in body.prompts if isinstance(p, str)]
        read = iter(await self._read(texts, body.add_special_tokens is not False, prep.most, owner))
        return [next(read) if isinstance(p, str) else p for p in body.prompts]

    async def _predicted(self, body: Body, owner: int) -> tuple[int, ...]:
        text = "" if body.prediction is None else text_of(body.prediction.content)
        most = PREDICTED * self.bridge.engine.max_length
        try:
            return tuple((await self._read([text], True, most, owner))[0]) if text else ()
        except TooLong as error:
            message = (
                f"the prediction has {error.tokens} tokens, and at most {most} are read: send only the expected part"
            )
            raise BadField(message, "prediction") from None

    async def _read(self, texts: list[str], special: bool, most: int, owner: int) -> list[list[int]]:
        """Token ids of texts, each of at most `most` tokens. special: add the tokens that begin or end a text."""
        prep, tokenizer = self.bridge.prep, self.bridge.engine.tokenizer
        if not texts:
            return []
        if tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer, and this server has none: send token ids")
        if prep.in_thread(sum(map(len, texts)), False):
            return await prep.encode(texts, special, most, owner)
        encode = encoder(tokenizer)
        return await self.bridge.in_thread(lambda: [encode(text, special) for text in texts])

    async def _conversation(self, body: ChatRequest, owner: int) -> list[int]:
        """The prompt of a conversation, by the model's own chat template, never a client's, in transformers' immutable sandbox.

        A model without a template continues text: if that is allowed, it gets the messages' texts, one per line.
        """
        prep, tokenizer = self.bridge.prep, self.bridge.engine.tokenizer
        messages = [{"role": m.role, "content": m.text} for m in body.messages]
        if not getattr(tokenizer, "chat_template", None):
            if not self.settings.fallback_chat:
                raise BadField("this model has no chat template: use /v1/completions", "messages")
            text = "\n".join(m["content"] for m in messages)
            return (await self._read([text], body.add_special_tokens is not False, prep.most, owner))[0]
        special = body.add_special_tokens is True
        try:
            if prep.in_thread(sum(len(m["content"]) for m in messages), True):
                return await prep.chat(messages, special, owner)
            return await self.bridge.in_thread(lambda: conversation(tokenizer, messages, special))
        except Refused as error:
            raise BadField(str(error), "messages") from None

    def _check_model(self, name: str) -> None:
        if name != self.settings.model:
            message = unknown_name("model", name[:64], [self.settings.model])
            raise BadField(message, "model", "model_not_found")

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model,
            "object": "model",
            "created": STARTED,
            "owned_by": "outrider",
            "root": self.settings.model,
            "parent": None,
            "max_model_len": self.bridge.engine.max_length,
        }


def served(bridge: Bridge) -> ServedEngine:
    """The facts about the engine that requests are checked against."""
    parts = bridge.engine.parts
    return ServedEngine(parts.drafter.name, parts.rule.name, parts.drafter.max_depth, parts.rule.lossless)
