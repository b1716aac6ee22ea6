"""Checks before every route: host name and API key; and a reply of the right shape for every failure."""

from __future__ import annotations

import base64
import binascii
import json
import logging
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.errors import RequestError
from outrider.serve.dashboard import HEADERS
from outrider.serve.parsing import BadField
from outrider.serve.replies import error_body
from outrider.serve.settings import Settings
from outrider.serve.tickets import EngineFailure, Overloaded, Unavailable
from outrider.telemetry.prometheus import Metrics

logger = logging.getLogger(__name__)
OPEN = frozenset({"/health"})
"""The only paths that need no key."""
OWNER = "outrider.owner"
"""The key of a request's scope that holds the number of its API key."""


class RequestGate:
    """Default-deny middleware. routes: known paths, the only ones used as labels of metrics."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app, self.settings, self.metrics, self.routes = app, settings, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError("this server speaks HTTP only")
        begun = False

        async def count(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                route = scope["path"] if scope["path"] in self.routes else "other"
                self.metrics.responses[route, str(message["status"])] += 1
                message["headers"] = [
                    *message.get("headers", []),
                    *((k.encode(), v.encode()) for k, v in HEADERS.items()),
                ]
            await send(message)

        try:
            refusal = self._refuse(scope)
            await (refusal or self.app)(scope, receive, count)
        except ClientDisconnect:
            pass
        except Exception:
            logger.exception("a route failed")
            if not begun:
                await reply(500, "the server failed while answering this request", "server_error")(
                    scope, receive, count
                )

    def _refuse(self, scope: Scope) -> Response | None:
        if scope["path"] in OPEN:
            return None
        headers = {k.lower(): v.decode("latin-1") for k, v in scope["headers"]}
        if not self.settings.keys:
            host = (
                headers.get(b"host", "").rsplit(":", 1)[0]
                if not headers.get(b"host", "").endswith("]")
                else headers[b"host"]
            )
            if "*" in self.settings.hosts or host in self.settings.hosts:
                return None
            return reply(403, "this host name is not served: start with --allowed-host NAME", "invalid_request_error")
        key = presented(headers.get(b"authorization", "")) or headers.get(b"x-api-key")  # the latter is Anthropic's
        owner = None if key is None else self.settings.owner(key)
        if owner is not None:
            scope[OWNER] = owner
            return None
        wanted = 'Basic realm="outrider"' if scope["path"] == "/" else "Bearer"
        return reply(
            401,
            "a valid API key is needed: send 'Authorization: Bearer KEY'",
            "authentication_error",
            code="invalid_api_key",
            headers={"www-authenticate": wanted},
        )


def presented(header: str) -> str | None:
    """The key of an Authorization header: a bearer token, or the password of Basic (what a browser can send)."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return None


def reply(
    status: int,
    message: str,
    kind: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An error in OpenAI's shape."""
    return JSONResponse(error_body(message, kind, param, code), status, headers)


async def on_error(request: Request, error: Exception) -> Response:
    """Replies to Outrider's and Starlette's exceptions in OpenAI's error format; for /v1/messages it is Anthropic's too."""
    out = _on_error(_explained(request, error))
    if request.url.path.startswith("/v1/messages"):
        body = {"type": "error", **json.loads(bytes(out.body))}
        return JSONResponse(body, out.status_code, {k: v for k, v in out.headers.items() if k != "content-length"})
    return out


def _explained(request: Request, error: Exception) -> Exception:
    """What the router says of an address in a phrase of HTTP, in a sentence that helps."""
    if not isinstance(error, HTTPException) or error.detail != HTTPStatus(error.status_code).phrase:
        return error
    place, more = request.url.path[:80], dict(error.headers or {})
    if error.status_code == 404:
        return HTTPException(404, f"there is nothing at {place}: /openapi.json lists what this server has", more)
    if error.status_code == 405:
        return HTTPException(
            405, f"{place} does not answer {request.method[:16]}: use {more.get('Allow', 'another method')}", more
        )
    return error


def _on_error(error: Exception) -> Response:
    if isinstance(error, BadField):
        status = 404 if error.code == "model_not_found" else 400
        return reply(status, str(error), "invalid_request_error", error.param, error.code)
    if isinstance(error, RequestError):
        code = "context_length_exceeded" if "the context holds" in str(error) else None
        return reply(400, str(error), "invalid_request_error", None, code)
    if isinstance(error, Overloaded):
        headers = {"retry-after": str(error.retry_after)}
        return reply(429, str(error), "rate_limit_error", None, "queue_full", headers)
    if isinstance(error, Unavailable):
        return reply(503, str(error), "server_error", headers={"retry-after": "5"})
    if isinstance(error, EngineFailure):
        return reply(500, str(error), "server_error")
    if isinstance(error, HTTPException):
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return reply(error.status_code, str(error.detail), kind, headers=dict(error.headers or {}))
    raise error
