"""The application: a list of routes, a lifespan, and the document that describes them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from outrider import __version__
from outrider.errors import CapabilityError, ConfigError

try:
    from pydantic.json_schema import models_json_schema
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ConfigError("the server needs starlette and uvicorn: pip install 'outrider[serve]'") from error

from outrider.build import Engine
from outrider.control.adaptive import Adaptive
from outrider.control.registry import load_controller
from outrider.errors import OutriderError
from outrider.models.tokenizer import disable_bpe_cache
from outrider.protocols import Controller, Drafter, Rule, Target
from outrider.serve.access import Log, Statistics
from outrider.serve.agents import Agents
from outrider.serve.bridge import Bridge
from outrider.serve.chat.fields import ChatRequest
from outrider.serve.dashboard import PAGE, PAGE_HEADERS
from outrider.serve.experiment import ARM, LiveExperimentHook, Placer
from outrider.serve.live import Live, Past
from outrider.serve.messages.fields import CountRequest, MessageRequest
from outrider.serve.middleware import RequestGate, on_error
from outrider.serve.requests import CompletionRequest
from outrider.serve.responses.fields import ResponseRequest
from outrider.serve.routes import OpenAI
from outrider.serve.settings import Settings
from outrider.serve.tokenizing import DetokenizeRequest, TokenizeRequest, Tokenizing
from outrider.serve.watch import Monitor
from outrider.serve.webhook import Webhook
from outrider.telemetry.prometheus import CONTENT_TYPE, Metrics

logger = logging.getLogger(__name__)


def create_app(
    build: Callable[..., Engine],
    settings: Settings,
    *,
    adaptive: bool = True,
    past: Past | None = None,
    trial: LiveExperimentHook | None = None,
) -> Starlette:
    """The server for the engine that `build` makes (in the engine's own thread).

    build: called with these arguments of `build_engine`: sinks and, if needed, controller and selectable.
    adaptive: set the draft length by load, "never slower than plain decoding"; otherwise the engine keeps its controller.
    past: reads the runs and experiments that the page shows; None: none are shown. trial: an experiment on the requests.
    `app.state.bridge` is the bridge and `app.state.watch` the monitor, for the code that runs the app.
    """
    metrics = Metrics(settings.model)
    wiring: dict[str, Any] = {"sinks": (metrics,)}
    if adaptive:
        wiring["controller"] = controller_for
    if trial is not None:
        wiring["selectable"] = True
    bridge = Bridge(lambda: build(**wiring), metrics, settings.limits, lambda engine: prepare(engine, metrics))
    v1 = OpenAI(bridge, settings, trial)
    hook = Webhook(settings.webhook, settings.model) if settings.webhook else None
    watch = Monitor(bridge, settings.price, hook)
    live = Live(bridge, settings, v1, watch, past)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await bridge.start()
        if trial is not None:
            trial.start()
        watching = asyncio.create_task(watch.run())
        telling = asyncio.create_task(Statistics(bridge).run())
        if getattr(bridge.engine.tokenizer, "chat_template", None):
            v1.reading.begin()  # said in the log, and known before the first conversation
        yield
        watching.cancel()
        telling.cancel()
        await bridge.close(settings.grace)
        v1.reading.close()
        for ticket in list(bridge.tickets.values()):  # replies that were still open are recorded too
            bridge.release(ticket)
        if trial is not None:
            await asyncio.to_thread(trial.close)

    routes = [*routes_of(bridge, metrics, v1, live), *ended_route(trial)]
    known = frozenset(route.path for route in routes)
    handlers: dict[Any, Any] = {OutriderError: on_error, HTTPException: on_error}
    guard = Middleware(RequestGate, settings=settings, metrics=metrics, routes=known)
    layers = [*shared_with(settings.cors), Middleware(Log), guard]
    app = Starlette(routes=routes, middleware=layers, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    app.state.bridge, app.state.watch = bridge, watch
    return app


def shared_with(origins: tuple[str, ...]) -> list[Middleware]:
    """What lets pages of other origins read replies, if the operator names any. It answers before a key is asked for."""
    if not origins:
        return []
    from starlette.middleware.cors import CORSMiddleware

    headers = ["x-request-id", ARM]
    options = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"], "expose_headers": headers, "max_age": 600}
    return [Middleware(CORSMiddleware, allow_origins=list(origins), **options)]


def routes_of(bridge: Bridge, metrics: Metrics, v1: OpenAI, live: Live) -> list[Route]:
    """Every address of the server."""
    agents, tokens = Agents(v1), Tokenizing(v1)
    return [
        Route("/", page),
        Route("/health", Health(bridge).health),
        Route("/ready", Health(bridge).ready),
        Route("/metrics", exposition(metrics)),
        Route("/version", version),
        Route("/openapi.json", openapi),
        Route("/v1/models", v1.models),
        Route("/v1/models/{id:path}", v1.model),
        Route("/v1/completions", v1.completions, methods=["POST"]),
        Route("/v1/chat/completions", v1.chat, methods=["POST"]),
        Route("/v1/responses", agents.responses, methods=["POST"]),
        Route("/v1/messages", agents.messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", agents.count_tokens, methods=["POST"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokens.info),
        Route("/outrider/state", live.state),
        Route("/outrider/runs", live.runs),
        Route("/outrider/play", live.play, methods=["POST"]),
    ]


def ended_route(trial: LiveExperimentHook | None) -> list[Route]:
    """POST /outrider/ended, for the front of several replicas: what became of the requests of an experiment."""
    if not isinstance(trial, Placer):
        return []

    async def ended(request: Request) -> Response:
        stopped = json.loads(await request.body())
        return JSONResponse(trial.take([str(name) for name in stopped]))

    return [Route("/outrider/ended", ended, methods=["POST"])]


def controller_for(drafter: Drafter, rule: Rule, target: Target) -> Controller:
    """The controller that sets the draft length by load; a fixed 0 if the drafter drafts nothing.

    target: if its forwards read more for more rows (`row_work`), lengths are predicted by that.
    """
    depth, work = drafter.max_depth, getattr(target, "row_work", None)
    return load_controller("adaptive", depth, depth, invariant=rule.lane == "gumbel", work=work)


def prepare(engine: Engine, metrics: Metrics) -> None:
    """Warm an engine up and describe it to the metrics. Runs in the engine's thread, before it serves."""
    engine.warm_up()
    if engine.options.images is not None:
        try:
            engine.images.prove()
        except (CapabilityError, ConfigError) as error:
            logger.warning("images are not read: %s", error)
    disable_bpe_cache(engine.tokenizer)
    parts = engine.parts
    metrics.info.update(
        drafter=parts.drafter.name,
        rule=parts.rule.name,
        lossless=str(parts.rule.lossless).lower(),
        longest=str(parts.drafter.max_depth),
        slots=str(engine.scheduler.slots),
        version=__version__,
    )
    if isinstance(engine.controller, Adaptive):
        look = engine.controller.outlook
        metrics.gauges.update(
            spec_decode_length=("Draft length chosen for the present load.", lambda: look().length),
        )


async def page(request: Request) -> Response:
    """GET /: the dashboard."""
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)


def exposition(metrics: Metrics) -> Callable[[Request], Awaitable[Response]]:
    """GET /metrics"""

    async def handler(request: Request) -> Response:
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE})

    return handler


async def version(request: Request) -> Response:
    """GET /version"""
    return JSONResponse({"version": __version__})


async def openapi(request: Request) -> Response:
    """GET /openapi.json"""
    return JSONResponse(document())


class Health:
    """Probes: whether the process is alive, and whether it is ready for requests."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge

    async def health(self, request: Request) -> Response:
        """GET /health: 200 with an empty body; 503 if the engine thread has died or has no recent heartbeat."""
        return Response(status_code=200 if self.bridge.alive else 503)

    async def ready(self, request: Request) -> Response:
        """GET /ready: 200, or 503 with the reason: loading, draining, hung or broken."""
        if self.bridge.ready:
            return PlainTextResponse("ready\n")
        why = "draining" if self.bridge.draining else f"no step for {self.bridge.heartbeat_age:.0f} s"
        return PlainTextResponse(f"not ready: {why}\n", 503)


def document() -> dict[str, Any]:
    """OpenAPI 3.1; the schemas of request bodies come from the models that validate them."""
    bodies = (
        CompletionRequest, ChatRequest, ResponseRequest, MessageRequest, CountRequest, TokenizeRequest, DetokenizeRequest,
    )  # fmt: skip
    models = [(body, "validation") for body in bodies]
    _, schema = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    fail = {"description": "an error in OpenAI's shape", "content": {"application/json": {}}}
    codes = ("400", "401", "404", "408", "413", "415", "429", "500", "503")
    replies = {"200": {"description": "done", "content": {"application/json": {}, "text/event-stream": {}}}}
    replies |= dict.fromkeys(codes, fail)

    def post(name: str, summary: str) -> dict[str, Any]:
        body = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}, "required": True}
        return {"post": {"summary": summary, "requestBody": body, "responses": replies}}

    def get(summary: str) -> dict[str, Any]:
        ok = {"200": {"description": summary}, "401": fail, "503": {"description": "not serving"}}
        return {"get": {"summary": summary, "responses": ok}}

    return {
        "openapi": "3.1.0",
        "info": {"title": "Outrider", "version": __version__},
        "paths": {
            "/v1/completions": post("CompletionRequest", "Continue prompts"),
            "/v1/chat/completions": post("ChatRequest", "Answer a conversation"),
            "/v1/responses": post("ResponseRequest", "OpenAI's newer interface, without stored state"),
            "/v1/messages": post("MessageRequest", "Anthropic's interface"),
            "/v1/messages/count_tokens": post("CountRequest", "Tokens of the prompt that a message would have"),
            "/tokenize": post("TokenizeRequest", "The tokens of a text or of a conversation"),
            "/detokenize": post("DetokenizeRequest", "The text of tokens"),
            "/tokenizer_info": get("The settings of the tokenizer"),
            "/outrider/play": post("CompletionRequest", "One streamed sample with the origin of every token"),
            "/v1/models": get("The served model"),
            "/health": get("Alive"),
            "/ready": get("Ready for requests"),
            "/metrics": get("Prometheus metrics"),
            "/outrider/state": get("What the page shows"),
            "/outrider/runs": get("Runs and experiments of the store"),
        },
        "components": {
            "schemas": schema.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
