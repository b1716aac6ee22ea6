"""HTTP routes of ours in vLLM's server: the page, its data, Prometheus metrics, and which of our parts are live.

Found by the entry point `outrider_http`, which vLLM loads only if VLLM_PLUGINS names it. Numbers only, never text of a client. The
page and `/outrider/state` are those of our own server; vLLM's `--api-key` does not cover these routes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from outrider import __version__
from outrider.integrations.vllm.ledger import find
from outrider.integrations.vllm.monitor import VllmMonitor
from outrider.integrations.vllm.served import Server
from outrider.integrations.vllm.settings import Settings
from outrider.integrations.vllm.status import parts_of
from outrider.integrations.vllm.sums import StepSums, served_name
from outrider.serve.dashboard import PAGE, PAGE_HEADERS
from outrider.telemetry.prometheus import CONTENT_TYPE, Metrics


class Ours(Collector):
    """Our families for vLLM's own registry, whose other families are vLLM's."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Any]:
        """See `Metrics.ours`."""
        yield from self.metrics.ours()


class Endpoint:
    """The plug-in. `required_tasks` None: it needs no particular task of the server."""

    name = "outrider_http"
    required_tasks = None

    def __init__(self) -> None:
        self.watch: Any = None
        self._task: asyncio.Task[None] | None = None

    def attach_router(self, app: Any) -> None:
        """Our addresses."""
        app.add_route("/outrider", self.page, methods=["GET"])
        app.add_route("/outrider/state", self.state, methods=["GET"])
        app.add_route("/outrider/metrics", self.exposition, methods=["GET"])
        app.add_route("/outrider/parts", self.parts, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Begin to watch; without an engine (vLLM's render server) the routes say so."""
        if engine_client is None:
            return
        found = find(engine_client)
        config = engine_client.vllm_config
        server = Server(engine_client, found or StepSums(served_name(config)), found is not None)
        settings = Settings.of(config.additional_config)
        self.watch = VllmMonitor(server, settings.price)
        describe(server)
        self._task = asyncio.create_task(self._run())
        REGISTRY.register(Ours(server.metrics))

    async def _run(self) -> None:
        """Ask the worker, then take a sample, until the server ends. An answer that does not come costs one sample."""
        while True:
            try:
                await self.watch.bridge.ask()
            except Exception as error:
                self.watch.problem = f"{type(error).__name__}: {error}"[:200]
            self.watch.tick()
            await asyncio.sleep(self.watch.period)

    # ------------------------------------------------------------------ routes
    async def page(self, request: Request) -> Response:
        """GET /outrider: the dashboard."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def state(self, request: Request) -> Response:
        """GET /outrider/state: all data of the page; `?after=T` leaves out the history up to time T."""
        if self.watch is None:
            return JSONResponse({"error": "this server has no engine"}, 503)
        try:
            after = float(request.query_params.get("after", "0"))
        except ValueError:
            after = math.nan
        if math.isnan(after):
            return JSONResponse({"error": "after must be a time in seconds"}, 400)
        return JSONResponse(self.watch.state(after), headers={"cache-control": "no-store"})

    async def exposition(self, request: Request) -> Response:
        """GET /outrider/metrics: our metrics alone, under the names that our own server has."""
        if self.watch is None:
            return Response(status_code=503)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Ours(self.watch.bridge.metrics))
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE})

    async def parts(self, request: Request) -> Response:
        """GET /outrider/parts: which of our parts are live; `outrider doctor --vllm` prints it."""
        if self.watch is None:
            return JSONResponse({"error": "this server has no engine"}, 503)
        server = self.watch.bridge
        rows = parts_of(server.config, server.report, server.ledger)
        return JSONResponse({"version": __version__, "parts": rows, "report": server.report})


def describe(server: Server) -> None:
    """Labels of the configuration, for the metrics."""
    speculative, settings = server.config.speculative_config, Settings.of(server.config.additional_config)
    server.metrics.info.update(
        drafter="none" if speculative is None else str(speculative.method),
        rule=settings.rule,
        lossless=str(not settings.allow_lossy or settings.rule == "vllm").lower(),
        longest="0" if speculative is None else str(speculative.num_speculative_tokens),
        slots=str(server.config.scheduler_config.max_num_seqs),
        version=__version__,
    )


__all__ = ["Endpoint", "Ours", "Server", "describe"]
