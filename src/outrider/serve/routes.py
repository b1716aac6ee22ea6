"""The OpenAI routes: from a request body to a ticket to a reply."""

from __future__ import annotations

import secrets
from collections.abc import Coroutine
from dataclasses import replace
from time import time
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from outrider.build import Engine
from outrider.engine.prompt_scores import PromptScores
from outrider.errors import RequestError, unknown_name
from outrider.params import SamplingParams
from outrider.pictured import ImagePrompt
from outrider.serve.body import Bodies
from outrider.serve.bridge import Bridge
from outrider.serve.chat.fields import ChatRequest
from outrider.serve.chat.reply import ChatReply
from outrider.serve.chat.turn import Turn
from outrider.serve.echo import EchoReply, alone, check_scores, last_event, wanted
from outrider.serve.experiment import ARM, USER, LiveExperimentHook, fixed_by_seed, join
from outrider.serve.meaning import ServedEngine, grammar_of, sampling
from outrider.serve.middleware import OWNER
from outrider.serve.parsing import BadField, parse
from outrider.serve.reading import Reading
from outrider.serve.replies import Reply
from outrider.serve.requests import GONE, MAX_PROMPTS, CompletionRequest
from outrider.serve.settings import Settings
from outrider.serve.sse import CADENCE, EventStream, paced, while_connected, written
from outrider.serve.tickets import Overloaded, Ticket, Unavailable

Body = CompletionRequest | ChatRequest
T = TypeVar("T", bound=CompletionRequest | ChatRequest)
VALUES = 50_000
"""Most values of a body besides the ids of its prompts: schemas may have many."""
IMAGE_BODY = 32_000_000
"""Bytes of a request's body where the model reads images: files in base64 are a third larger."""
STARTED = int(time())


class OpenAI:
    """The handlers of one server."""

    def __init__(self, bridge: Bridge, settings: Settings, trial: LiveExperimentHook | None = None) -> None:
        self.bridge, self.settings, self.trial = bridge, settings, trial
        self.reading = Reading(bridge, settings)
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
        self.check_model(request.path_params["id"])
        return JSONResponse(self._model())

    # ------------------------------------------------------------------ inside
    async def _answer(self, request: Request, kind: type[Body]) -> Any:
        body = await self.body(request, kind)
        reply = await self.begun(request, self.begin(body, request.scope.get(OWNER, 0), self.who(request, body)))
        return await self.sent(request, reply)

    async def begun(self, request: Request, begin: Coroutine[Any, Any, Reply]) -> Reply:
        """The reply that `begin` makes, for a client that is still there; otherwise its place is given back."""
        return await while_connected(request, begin, lambda reply: self.bridge.release(reply.ticket))

    def who(self, request: Request, body: Body) -> str:
        """The user of a request, for an experiment."""
        return body.user or request.headers.get(USER) or secrets.token_hex(8)

    async def sent(self, request: Request, reply: Reply) -> Any:
        """A reply, streamed or whole, as its request wants it."""
        headers = {"x-request-id": reply.ticket.id} | ({ARM: reply.ticket.arm} if reply.ticket.arm else {})
        if reply.request.stream:
            frames = reply.frames(self.bridge, self.settings.pad)
            frames = paced(frames, CADENCE) if self.settings.pad else frames
            return EventStream(frames, lambda: self.bridge.release(reply.ticket), headers)
        try:
            whole = await while_connected(request, reply.whole(self.bridge))
        finally:
            self.bridge.release(reply.ticket)
        return Response(await written(whole), media_type="application/json", headers=headers)

    async def raw(self, request: Request) -> Any:
        """The JSON body of a request, of bounded size."""
        most = MAX_PROMPTS * self.bridge.engine.max_length + VALUES
        return await self._bodies.read(request, most, IMAGE_BODY if reads_images(self.bridge.engine) else 0)

    async def body(self, request: Request, kind: type[T]) -> T:
        """The checked body of a request."""
        return parse(kind, await self.raw(request), GONE)

    async def begin(
        self, body: Body, owner: int = 0, who: str | None = None, chat: type[ChatReply] = ChatReply
    ) -> Reply:
        """Take a place for `owner`, prepare the prompts, and queue them. On failure the place is given back.

        who: the request's user, for an experiment; None: it takes part in none, as a request with its own speculation options.
        chat: the kind of reply to a conversation.
        """
        try:
            self.check_model(body.model)
            count = len(body.prompts) if isinstance(body, CompletionRequest) else 1
            ticket = self.bridge.reserve(count * body.samples, owner)
        except (RequestError, Overloaded, Unavailable) as error:
            self.bridge.metrics.refused[type(error).__name__] += 1
            raise
        try:
            return await self._queue(body, ticket, None if body.speculation else who, chat)
        except BaseException as error:
            if isinstance(error, RequestError | Unavailable):
                self.bridge.metrics.refused[type(error).__name__] += 1
            self.bridge.release(ticket)
            raise

    async def _queue(self, body: Body, ticket: Ticket, who: str | None, chat: type[ChatReply]) -> Reply:
        engine, facts, owner = self.bridge.engine, served(self.bridge), ticket.owner
        if body.prediction is not None and "prediction" not in facts.drafter.split("+"):
            raise BadField(
                "this server's drafter does not read predictions: start it with --draft prediction+...", "prediction"
            )
        turn: Turn | None = None
        more: dict[str, Any] = {}
        if isinstance(body, ChatRequest):
            ids, turn = await self.reading.conversation(body, owner)
            prompts = [ids]
            more = {"grammar": turn.grammar(grammar_of(body)), "keep_special": turn.keep}
        else:
            prompts, ends = await self.reading.completions(body, owner)
            more = {"stop_token_ids": [*(body.stop_token_ids or ()), *ends]} if ends else {}
        predicted = await self.reading.predicted(body, owner)
        if body.bad_words:
            more["bad_words"] = await self.reading.banned(body.bad_words, owner)
        params = sampling(body, facts, predicted, **more)
        if params.max_tokens >= engine.max_length:
            params = replace(params, max_tokens=engine.max_length, min_tokens=min(params.min_tokens, engine.max_length))
        if params.grammar is not None:
            await self.bridge.compile(params.grammar, owner)
        if self.trial is not None and who is not None and not fixed_by_seed(params, engine.parts.rule.lane):
            params = join(self.trial, who, ticket, params)
        top = wanted(body)
        if top is not None and any(isinstance(prompt, ImagePrompt) for prompt in prompts):
            raise BadField(
                "log-probabilities of a prompt with images are not computed: leave them out", "prompt_logprobs"
            )
        if top is not None:
            check_scores(prompts, body.samples, top)
        scores = None if top is None else await self.bridge.score(ticket, prompts, top)
        given = (ticket, engine.tokenizer, facts.longest, self.settings.details)
        reply: Reply
        if isinstance(body, ChatRequest):
            assert turn is not None
            reply = chat(body, *given, turn)
            reply.prompt_scores = scores
        elif scores is not None or body.echo:
            reply = EchoReply(body, *given).prepare(self.reading.shown(body, prompts), scores)
        else:
            reply = Reply(body, *given)
        reply.prediction = predicted
        if alone(body, params):
            self._answered(body, ticket, prompts, params, reply, scores)
        else:
            await self.bridge.submit(ticket, prompts, params)
        return reply

    def _answered(
        self,
        body: Body,
        ticket: Ticket,
        prompts: list[list[int]],
        params: SamplingParams,
        reply: Reply,
        scores: list[PromptScores] | None,
    ) -> None:
        """End a request that the forward over its prompts has answered."""
        engine = self.bridge.engine
        for prompt in prompts:
            engine.check(prompt, replace(params, max_tokens=1, min_tokens=0))
        ticket.prompt_tokens, ticket.ended, ticket.outcome = sum(map(len, prompts)), ticket.choices, "length"
        for i, choice in enumerate(reply.choices):
            choice.finish = "length"
            if body.max_tokens and scores is not None:
                choice.add(last_event(scores[i], body.top or 0, engine.tokenizer, engine.eos, params.ignore_eos))

    def check_model(self, name: str) -> None:
        """Raise BadField for a model that is not served here."""
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


def reads_images(engine: Engine) -> bool:
    """Whether the served model reads images."""
    return engine.options.images is not None


def served(bridge: Bridge) -> ServedEngine:
    """The facts about the engine that requests are checked against."""
    parts = bridge.engine.parts
    return ServedEngine(parts.drafter.name, parts.rule.name, parts.drafter.max_depth, parts.rule.lossless)
