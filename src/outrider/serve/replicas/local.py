"""Replicas as processes of this machine: each is `outrider serve` on a port of its own, started again when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from outrider.errors import ConfigError
from outrider.serve.address import reserve
from outrider.serve.replicas.calls import Call, Lost, Part, ranked
from outrider.serve.replicas.http import Unreachable, request
from outrider.serve.tickets import Unavailable

ASK_SECONDS = 4.0
"""Seconds a replica has to say how it is."""
AGAIN_SECONDS = 1.0
"""Seconds before a replica that has ended is started again; twice as many after each that ended at once, up to a minute."""
STEADY_SECONDS = 30.0
"""A replica that lasted this long did not end at once."""
STARTS = 2
"""Times that a replica is started before it counts as one that cannot be."""
START_SECONDS = 600.0
"""Seconds in which the first replica must serve."""
ROOM = 1.25
"""A replica may have this many times the mean number of open requests before conversations go elsewhere."""


@dataclass(slots=True)
class _Replica:
    """One process. ready: it serves. lives: how often it was started. code: its last exit code."""

    name: str
    port: int = 0
    process: asyncio.subprocess.Process | None = None
    ready: bool = False
    lives: int = 0
    keeper: asyncio.Task[None] | None = None
    code: int | None = None


@dataclass(slots=True)
class LocalReplicas:
    """`count` processes. command: the command line of one on a port. environment: theirs, in which OUTRIDER_API_KEY is `key`: only
    the front has it. slots: sequences that one decodes together. say: gets a sentence about each that ends."""

    count: int
    command: Callable[[int], list[str]]
    environment: dict[str, str]
    key: str
    slots: int
    say: Callable[[str], None]
    open: Counter[str] = field(default_factory=Counter)
    members: list[_Replica] = field(default_factory=list)
    _closing: bool = False

    async def start(self) -> None:
        self.members = [_Replica(f"replica-{i}") for i in range(self.count)]
        for replica in self.members:
            replica.keeper = asyncio.create_task(self._keep(replica))
        end = monotonic() + START_SECONDS
        while not any(r.ready for r in self.members):
            if all(r.code and r.lives >= STARTS for r in self.members):  # they have printed why
                raise ConfigError("no replica could be started: see above")
            if monotonic() > end:
                raise ConfigError(
                    f"no replica served within {START_SECONDS:g} s: start one without --replicas to see why"
                )
            await asyncio.sleep(0.1)
            await self._probe()

    async def _keep(self, replica: _Replica) -> None:
        """Run its process for as long as this server runs."""
        pause, served, refused = AGAIN_SECONDS, False, 0
        while not self._closing:
            with reserve("127.0.0.1", 0) as free:
                replica.port = free.getsockname()[1]
            began = monotonic()
            replica.process = await asyncio.create_subprocess_exec(
                *self.command(replica.port),
                stdin=asyncio.subprocess.DEVNULL,
                env=self.environment,
                process_group=0,
            )
            replica.lives += 1
            replica.code = await replica.process.wait()
            served, replica.ready = served or replica.ready, False
            if self._closing:
                return
            refused = refused + 1 if replica.code == 2 else 0
            if refused == STARTS and not served:  # wrong options, and no port that another was faster to take
                self.say(f"{replica.name} cannot be started (exit code 2, see above): it is not tried again")
                return
            pause = AGAIN_SECONDS if monotonic() - began > STEADY_SECONDS else min(60.0, 2 * pause)
            self.say(f"{replica.name} has ended (exit code {replica.code}): starting it again in {pause:g} s")
            await asyncio.sleep(pause)

    async def _probe(self) -> None:
        for replica in self.members:
            if replica.process is not None and not replica.ready:
                replica.ready = (await self._one(replica, Call("GET", "/ready")))[0] == 200

    # ------------------------------------------------------------------ requests
    def _order(self, key: str) -> list[_Replica]:
        """Replicas that serve, in the order in which this conversation tries them: its own, unless that has far more to do."""
        by_name = {r.name: r for r in self.members if r.ready}
        order = ranked(key, list(by_name)) if key else sorted(by_name, key=lambda n: self.open[n])
        most = max(self.slots, ROOM * (sum(self.open[n] for n in by_name) + 1) / max(1, len(by_name)))
        return [by_name[n] for n in sorted(order, key=lambda n: self.open[n] >= most)]

    async def forward(self, call: Call, key: str) -> AsyncIterator[Part]:
        for replica in self._order(key):
            self.open[replica.name] += 1
            try:
                async for part in request(replica.port, call, self.key):
                    yield part
                return
            except Unreachable:
                replica.ready = False  # it has just ended: the request reached nobody
            finally:
                self.open[replica.name] -= 1
        raise Unavailable("no replica serves: try again in some seconds")

    async def ask(self, calls: Sequence[Call]) -> dict[str, list[tuple[int, bytes]]]:
        await self._probe()
        ready = [r for r in self.members if r.ready]
        answers = await asyncio.gather(*(self._all_of(r, calls) for r in ready))
        return {r.name: a for r, a in zip(ready, answers, strict=True) if all(status for status, _ in a)}

    async def _all_of(self, replica: _Replica, calls: Sequence[Call]) -> list[tuple[int, bytes]]:
        return [await self._one(replica, call) for call in calls]

    async def _one(self, replica: _Replica, call: Call) -> tuple[int, bytes]:
        """Status and body; status 0 where there is no answer."""
        status, body = 0, bytearray()
        try:
            async with asyncio.timeout(ASK_SECONDS):
                async for part in request(replica.port, call, self.key):
                    status = part.status or status
                    body += part.body
        except (Unreachable, Lost, TimeoutError):
            return 0, b""
        return status, bytes(body)

    async def close(self, grace: float) -> None:
        self._closing = True
        alive = [r.process for r in self.members if r.process is not None and r.process.returncode is None]
        for process in alive:
            process.send_signal(signal.SIGTERM)
        keepers = [r.keeper for r in self.members if r.keeper is not None]
        _, late = await asyncio.wait(keepers, timeout=grace + 10.0) if keepers else (set(), set())
        for process in alive if late else ():
            if process.returncode is None:
                process.kill()
        for task in late:
            task.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)


def environment(key: str, threads: int) -> dict[str, str]:
    """Of a replica's process."""
    return {**os.environ, "OUTRIDER_API_KEY": key, "OMP_NUM_THREADS": str(threads)}
