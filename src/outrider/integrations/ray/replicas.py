"""The server behind Ray Serve: a deployment of replicas, each with its engine, and a front that checks, routes and adds up.

Ray Serve starts replicas, probes them, starts lost ones again, drains those it ends, and adds some while requests queue. The front
is Serve's ingress; it names a request's conversation as its session, and Serve's consistent hashing keeps a session on its replica.
"""

# pyright: reportMissingImports=false
# Ray is not among what the code is checked with: `make test-ray` has it.
from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from outrider.errors import ConfigError
from outrider.integrations.ray import connect
from outrider.options import EngineOptions
from outrider.serve.replicas.calls import Call, Lost, Part
from outrider.serve.settings import Settings
from outrider.serve.tickets import Unavailable

NAME, ENGINE, FRONT = "outrider", "engine", "front"
"""Of the application in Serve, and of its two deployments."""
ASK_SECONDS = 4.0
FRONT_CALLS = 10_000
"""Requests that may be in the front at once; the replicas' own queues are what refuses."""
FRONT_CPUS = 0.1
ENDED = "the replica that answered this request has ended: send it again"
ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is deployed. replicas: how many, at least; most: up to how many while requests queue, None: no more.

    threads: of a replica, and its CPUs. address: of the cluster, None: one is started. experiment: its file, whose records go to
    `store`.
    """

    host: str
    port: int
    replicas: int
    most: int | None
    threads: int
    address: str | None
    experiment: str | None
    store: str


class Replica:
    """One engine with the server's application around it, called by the front."""

    async def __init__(self, options: EngineOptions, settings: Settings, experiment: str | None) -> None:
        """Returns when it serves. Raises what the engine's construction raises."""
        from ray import serve

        from outrider.build import build_engine
        from outrider.evaluate.experiments.placer import placer_of
        from outrider.serve.app import create_app

        trial = None if experiment is None else placer_of(experiment, options, fixed=options.follows == "fixed")
        self.name = serve.get_replica_context().replica_id.unique_id
        build = partial(build_engine, **asdict(options))
        self.app = create_app(build, settings, adaptive=False, trial=trial)
        self._life = self.app.router.lifespan_context(self.app)
        await self._life.__aenter__()

    async def answer(self, call: Call) -> AsyncIterator[Part]:
        """The reply to a client's request, part by part."""
        from outrider.serve.replicas.inside import answer

        parts = answer(self.app, call)
        try:
            async for part in parts:
                yield part
        finally:
            await parts.aclose()  # type: ignore[attr-defined]

    async def ask(self, calls: Sequence[Call]) -> tuple[str, list[tuple[int, bytes]]]:
        """Its name, and the whole reply to each call."""
        from outrider.serve.replicas.inside import answer

        out: list[tuple[int, bytes]] = []
        for call in calls:
            parts = [part async for part in answer(self.app, call)]
            out.append((next(p.status for p in parts if p.status), b"".join(p.body for p in parts)))
        return self.name, out

    async def check_health(self) -> None:
        """What /health says."""
        if not self.app.state.bridge.alive:
            raise RuntimeError("the engine is dead or hangs")

    async def __del__(self) -> None:
        with contextlib.suppress(Exception):
            await self._life.__aexit__(None, None, None)


class RayReplicas:
    """The replicas of a deployment, by its handle."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def start(self) -> None:
        """Serve has started them already."""

    async def forward(self, call: Call, key: str) -> AsyncIterator[Part]:
        from ray.exceptions import RayError
        from ray.serve.exceptions import BackPressureError, RayServeException

        options: dict[str, Any] = {"stream": True} | ({"session_id": key} if key else {})
        parts = self.handle.options(**options).answer.remote(call)
        ended = False
        try:
            async for part in parts:
                yield part
            ended = True
        except BackPressureError:
            raise Unavailable("every replica's queue is full: try again later") from None
        except (RayError, RayServeException) as error:
            ended = True
            raise Lost(ENDED) from error
        finally:
            if not ended:  # the client has left
                parts.cancel()

    async def ask(self, calls: Sequence[Call]) -> dict[str, list[tuple[int, bytes]]]:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            asked = self.handle.broadcast("ask", list(calls))
            found = await asked.results_async(timeout_s=ASK_SECONDS, return_exceptions=True)
        except (RayError, RayServeException):  # none is there yet, or any more
            return {}
        return dict(x for x in found if not isinstance(x, BaseException))

    async def close(self, grace: float) -> None:
        """Serve ends them."""


class Front:
    """Serve's ingress."""

    def __init__(self, handle: Any, settings: Settings, keeper: tuple[EngineOptions, str, str] | None) -> None:
        self._handle, self._settings, self._keeper = handle, settings, keeper

    def __serve_build_asgi_app__(self) -> Any:
        from outrider.evaluate.experiments.live import trial_of
        from outrider.serve.replicas.front import create_front

        keeper = None
        if self._keeper is not None:  # the front keeps the records of an experiment: there is one of it
            options, file, store = self._keeper
            keeper = trial_of(file, store, options, fixed=True)
        return create_front(RayReplicas(self._handle), self._settings, keeper)


def application(options: EngineOptions, asked: Deployment, settings: Settings) -> Any:
    """The bound application: what `serve.run` takes."""
    from dataclasses import replace

    from ray import serve
    from ray.serve.config import RequestRouterConfig

    environment = {"env_vars": {"OMP_NUM_THREADS": str(asked.threads), "OMP_PROC_BIND": "false"}}
    inner = replace(settings, keys=(), hosts=("*",))  # only the front can call it
    size: dict[str, Any] = {"num_replicas": asked.replicas}
    if asked.most is not None:
        least = asked.replicas
        size = {"autoscaling_config": {"min_replicas": least, "max_replicas": asked.most, "initial_replicas": least,
                                       "target_ongoing_requests": options.slots}}  # fmt: skip
    engine = serve.deployment(
        name=ENGINE,
        max_ongoing_requests=options.slots + settings.limits.queue + 8,  # its own queue refuses first, with 429
        ray_actor_options={"num_cpus": asked.threads, "runtime_env": environment},
        request_router_config=RequestRouterConfig(request_router_class=ROUTER.replace(":", ".")),
        graceful_shutdown_timeout_s=settings.grace + 5.0,
        health_check_period_s=2.0,
        health_check_timeout_s=settings.limits.hang_seconds,
        **size,
    )(Replica).bind(options, inner, asked.experiment)
    keeper = None if asked.experiment is None else (options, asked.experiment, asked.store)
    front = serve.deployment(
        name=FRONT,
        max_ongoing_requests=FRONT_CALLS,
        ray_actor_options={"num_cpus": FRONT_CPUS},
        graceful_shutdown_timeout_s=settings.grace + 10.0,
    )(serve.ingress()(Front))
    return front.bind(engine, settings, keeper)


def serve_on_ray(options: EngineOptions, asked: Deployment, settings: Settings) -> None:
    """Deploy, and wait for Ctrl-C or SIGTERM; then drain.

    Raises ConfigError where the cluster has no room for the replicas, and for an experiment that they cannot place.
    """
    import sys

    from outrider.evaluate.experiments.placer import placer_of

    if asked.experiment is not None:
        # a wrong one is told before anything is started
        placer_of(asked.experiment, options, fixed=options.follows == "fixed")
    here = {} if asked.address else {"num_cpus": (asked.most or asked.replicas) * asked.threads + 1}
    ray = connect(asked.address, **here)
    from ray import serve

    fits = sum(int(n["Resources"].get("CPU", 0) // asked.threads) for n in ray.nodes() if n["Alive"])
    if fits < asked.replicas:
        raise ConfigError(
            f"{asked.replicas} replicas of {asked.threads} CPUs each do not fit into this cluster, which has room for {fits}: "
            "ask for fewer, or for smaller ones with --replica-threads"
        )
    serve.start(http_options={"host": asked.host, "port": asked.port})
    told = threading.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: told.set())
    try:
        serve.run(application(options, asked, settings), name=NAME, route_prefix="/")
        key = ", key needed" if settings.keys else ""
        print(f"outrider: {settings.model} on http://{asked.host}:{asked.port}{key}, {asked.replicas} replicas on Ray "
              "(Ctrl-C ends it)", file=sys.stderr, flush=True)  # fmt: skip
        while not told.wait(0.5):
            pass
    finally:
        serve.shutdown()
        ray.shutdown()
