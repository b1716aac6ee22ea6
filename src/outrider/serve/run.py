"""Running the application: uvicorn with our shutdown, on threads that leave the engine its cores."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from outrider.serve.bridge import Bridge
from outrider.serve.settings import Settings


class Server(uvicorn.Server):
    """uvicorn that drains on the first signal: nothing new, what runs may finish for `grace` seconds, then ends with an error."""

    def __init__(self, config: uvicorn.Config, bridge: Bridge, grace: float) -> None:
        super().__init__(config)
        self.bridge, self.grace = bridge, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first drains, a second one ends at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.bridge.drain()

    async def shutdown(self, sockets: list | None = None) -> None:
        """Settle the requests beside uvicorn's own wait for their connections."""
        settled = asyncio.create_task(self.bridge.settle(0.0 if self.force_exit else self.grace))
        await super().shutdown(sockets)
        settled.cancel()
        await asyncio.gather(settled, return_exceptions=True)


def server_for(
    app: Starlette, settings: Settings, host: str, port: int, ready: Callable[[], None] | None = None
) -> Server:
    """A server for `app`; serve it with `run()` or, inside a loop, `await serve()`."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        lifespan="on",
        ws="none",
        backlog=2048,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(settings.grace) + 3,
        h11_max_incomplete_event_size=16384,
    )
    return Server(config, app.state.bridge, settings.grace)


def unbind() -> None:
    """Let this thread run on every core: an OpenMP runtime has bound it to the first, where the engine's own work is."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
