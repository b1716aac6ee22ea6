"""The OpenAI routes: from a body to a ticket to a reply."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from outrider.errors import RequestError, unknown_name
from outrider.serve.bridge import Bridge
from outrider.serve.guard import OWNER, body_of
from outrider.serve.openai import BadField, ChatRequest, CompletionRequest, Engine, parse, sampling, text_of
from outrider.serve.replies import Reply
from outrider.serve.settings import Settings
from outrider.serve.sse import CADENCE, EventStream, paced, while_connected, written
from outrider.serve.tickets import Overloaded, Ticket, Unavailable
from outrider.serve.trial import ARM, USER, Trial, fixed_by_seed, join

Body = CompletionRequest | ChatRequest
STARTED = int(time())


class OpenAI:
    """The handlers of one server."""

    def __init__(self, bridge: Bridge, settings: Settings, trial: Trial | None = None) -> None:
        self.bridge, self.settings, self.trial = bridge, settings, trial

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
        body = parse(kind, await body_of(request, self.settings.body, self.settings.body_seconds))
        who = body.user or request.headers.get(USER) or secrets.token_hex(8)
        reply = await self.begin(body, request.scope.get(OWNER, 0), who)
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

    async def begin(self, body: Body, owner: int = 0, who: str | None = None) -> Reply:
        """Take a place for `owner`, prepare the prompts, and queue them. On failure the place is given back.

        who: whose the request is, in an experiment; None: it is in none, as one that says itself how it is drafted for.
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
        prompts = await self.bridge.aside(lambda: self._prompts(body))
        predicted: tuple[int, ...] = ()
        if body.prediction is not None:
            text = text_of(body.prediction.content)
            predicted = tuple(await self.bridge.aside(lambda: engine.encode(text))) if text else ()
        params = sampling(body, facts, predicted)
        if params.max_tokens >= engine.max_length:
            params = replace(params, max_tokens=engine.max_length, min_tokens=min(params.min_tokens, engine.max_length))
        if params.grammar is not None:
            await self.bridge.compile(params.grammar)
        if self.trial is not None and who is not None and not fixed_by_seed(params, engine.parts.rule.lane):
            params = join(self.trial, who, ticket, params)
        await self.bridge.submit(ticket, prompts, params)
        reply = Reply(body, ticket, engine.tokenizer, facts.longest, self.settings.details)
        reply.prediction = predicted
        return reply

    def _prompts(self, body: Body) -> list[list[int]]:
        engine = self.bridge.engine
        if isinstance(body, CompletionRequest):
            return [engine.encode(p) for p in body.prompts]
        return [chat_prompt(engine.tokenizer, engine.encode, body, self.settings.fallback_chat)]

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


def served(bridge: Bridge) -> Engine:
    """The facts of the engine that requests are checked against."""
    parts = bridge.engine.parts
    return Engine(parts.drafter.name, parts.rule.name, parts.drafter.max_depth, parts.rule.lossless)


def chat_prompt(tokenizer: Any, encode: Callable[[str], list[int]], body: ChatRequest, fallback: bool) -> list[int]:
    """The prompt of a conversation: the model's own chat template, never a client's, in transformers' immutable sandbox.

    A model without a template continues text: if `fallback`, it is given the messages' texts, a line each. BadField otherwise.
    """
    messages = [{"role": m.role, "content": m.text} for m in body.messages]
    if not getattr(tokenizer, "chat_template", None):
        if not fallback:
            raise BadField("this model has no chat template: use /v1/completions", "messages")
        return encode("\n".join(m["content"] for m in messages))
    try:
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        )
    except Exception as error:  # templates refuse orders of roles by raising, and are outside code
        raise BadField(
            f"the model's chat template refuses these messages ({type(error).__name__})", "messages"
        ) from None
