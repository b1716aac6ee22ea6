"""Several replicas behind one front: who answers, what is added up, and what a replica that is killed takes with it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from outrider.evaluate.experiments.experiment import experiment_from
from outrider.evaluate.experiments.live import LiveExperiment, read
from outrider.evaluate.experiments.placer import ArmPlacer
from outrider.serve.app import create_app
from outrider.serve.replicas import local
from outrider.serve.replicas.calls import Call, Lost, Part, Replicas, conversation_key, ranked
from outrider.serve.replicas.front import create_front
from outrider.serve.replicas.inside import answer
from outrider.serve.replicas.local import STARTS, LocalReplicas
from outrider.serve.server import server_for
from outrider.serve.settings import Settings
from tests.serve.harness import Running, a_port, rewired, until
from tests.serve.toyserver import BODY, toy

ROOT = Path(__file__).parents[2]
WHOLE = {**BODY, "stream": False}


class InProcess:
    """Replicas in this process, each a whole application. One that is cut answers no more, in the middle of a reply too."""

    def __init__(self, count: int, trials: Sequence[Any] = ()) -> None:
        served = Settings("pycode", hosts=("*",))
        given = trials or [None] * count
        self.apps = {f"r{i}": create_app(maker(), served, adaptive=False, trial=given[i]) for i in range(count)}
        self.cut: set[str] = set()
        self.seen: list[tuple[str, str]] = []
        self._lives: list[Any] = []

    async def start(self) -> None:
        self._lives = [app.router.lifespan_context(app) for app in self.apps.values()]
        for life in self._lives:
            await life.__aenter__()

    async def forward(self, call: Call, key: str) -> AsyncIterator[Part]:
        name = ranked(key, [n for n in self.apps if n not in self.cut])[0]
        self.seen.append((name, key))
        async for part in answer(self.apps[name], call):
            if name in self.cut:
                raise Lost("the replica has ended: send it again")
            yield part

    async def ask(self, calls: Sequence[Call]) -> dict[str, list[tuple[int, bytes]]]:
        out: dict[str, list[tuple[int, bytes]]] = {}
        for name, app in self.apps.items():
            if name not in self.cut:
                found = [[part async for part in answer(app, call)] for call in calls]
                out[name] = [(parts[0].status or 0, b"".join(p.body for p in parts)) for parts in found]
        return out

    async def close(self, grace: float) -> None:
        for life in self._lives:
            await life.__aexit__(None, None, None)


def maker() -> Any:
    """Makes a toy engine that a server looks on; it has one drafter, so there is none to select."""
    build = rewired(toy(2))
    return lambda *, sinks, selectable=False: build(sinks=sinks)


@asynccontextmanager
async def fronted(replicas: Any, keeper: Any = None) -> AsyncIterator[Any]:
    """A function that posts to a front of these replicas: status, headers, and the parts of the body as they come."""
    app = create_front(replicas, Settings("pycode", grace=2.0), keeper)

    async def ask(path: str, body: Any = None, **headers: str) -> tuple[int, dict[bytes, bytes], bytes]:
        named = tuple((k.replace("_", "-").encode(), v.encode()) for k, v in headers.items())
        kind = ((b"content-type", b"application/json"),) if body is not None else ()
        call = Call("GET" if body is None else "POST", path, b"", (*kind, *named), json.dumps(body).encode())
        parts = [part async for part in answer(app, call)]
        return parts[0].status or 0, dict(parts[0].headers), b"".join(p.body for p in parts)

    ask.front = app.state.bridge  # type: ignore[attr-defined]
    async with app.router.lifespan_context(app):
        yield ask


def sample(text: bytes, name: str) -> float:
    """The sum of a metric's samples in an exposition."""
    lines = [line for line in text.decode().splitlines() if line.split("{")[0].split(" ")[0] == name]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


# ----------------------------------------------------------------- what is added up


def test_counters_of_two_replicas_add_up_and_the_page_has_each() -> None:
    async def run() -> None:
        replicas = InProcess(2)
        assert isinstance(replicas, Replicas)
        async with fronted(replicas) as ask:
            bodies = [{**WHOLE, "prompt": [i % 16, 1, 2], "max_tokens": 5 + i} for i in range(8)]
            found = await asyncio.gather(*(ask("/v1/completions", b) for b in bodies))
            assert [status for status, *_ in found] == [200] * 8
            tokens = sum(json.loads(body)["usage"]["completion_tokens"] for *_, body in found)
            assert tokens == sum(b["max_tokens"] for b in bodies) and len({n for n, _ in replicas.seen}) == 2
            await ask.front.look(0.0)  # a reading may be a moment old
            _, _, metrics = await ask("/metrics")
            assert sample(metrics, "vllm:generation_tokens_total") == tokens
            assert sample(metrics, "vllm:request_success_total") == 8
            assert sample(metrics, "vllm:e2e_request_latency_seconds_count") == 8
            assert sample(metrics, "outrider_front_requests_total") == 8
            _, _, body = await ask("/outrider/state")
            state = json.loads(body)
            assert state["now"]["emitted"] == tokens == sum(r["emitted"] for r in state["replicas"])
            assert sum(state["outcomes"].values()) == 8 and state["server"]["slots"] == 4
            assert (await ask("/ready"))[0] == 200
            bad = await ask("/v1/completions", {**WHOLE, "model": "other"})
            assert bad[0] == 404 and b"other" in bad[2]

    asyncio.run(run())


def test_a_conversation_stays_with_its_replica() -> None:
    async def run() -> None:
        replicas = InProcess(2)
        async with fronted(replicas) as ask:
            for _ in range(3):
                for i in range(6):
                    await ask("/v1/completions", {**WHOLE, "prompt": [i, i], "max_tokens": 2})
        by_key: dict[str, set[str]] = {}
        for name, key in replicas.seen:
            by_key.setdefault(key, set()).add(name)
        assert len(by_key) == 6 and all(len(names) == 1 for names in by_key.values())

    asyncio.run(run())


def test_a_replica_that_ends_ends_its_own_replies_with_an_error() -> None:
    async def run() -> None:
        replicas = InProcess(2)
        async with fronted(replicas) as ask:
            names = {}
            for i in range(8):
                await ask("/v1/completions", {**WHOLE, "prompt": [i], "max_tokens": 1})
                names[i] = replicas.seen[-1][0]
            mine = [i for i in names if names[i] == names[0]]
            others = [i for i in names if names[i] != names[0]]
            bodies = {i: {**BODY, "prompt": [i], "max_tokens": 400} for i in (*mine[:2], *others[:2])}
            tasks = {i: asyncio.create_task(ask("/v1/completions", b)) for i, b in bodies.items()}
            while len(ask.front.tickets) < len(bodies):
                await asyncio.sleep(0.001)
            replicas.cut.add(names[0])
            found = {i: await task for i, task in tasks.items()}
            for i, (_, _, body) in found.items():
                assert (b"has ended" in body) == (i in mine)
                assert i in mine or body.count(b'"finish_reason":"length"') == 1
            assert ask.front.outcomes["lost"] == len(mine[:2])
            assert sum(ask.front.outcomes.values()) == 8 + len(bodies), "every request is counted once"
            again = await ask("/v1/completions", {**WHOLE, "prompt": [0], "max_tokens": 2})
            assert again[0] == 200 and replicas.seen[-1][0] != names[0]
            before = sample((await ask("/metrics"))[2], "vllm:generation_tokens_total")
            for _ in range(6):
                await ask.front.look(0.0)
            assert sample((await ask("/metrics"))[2], "vllm:generation_tokens_total") >= before
            assert ask.front.sums.gone == 1

    asyncio.run(run())


def test_a_body_that_stops_short_counts_as_lost() -> None:
    """Not a stream, so that nothing can be said in it: the connection ends, and the front still counts the request."""

    class Short(InProcess):
        async def forward(self, call: Call, key: str) -> AsyncIterator[Part]:
            yield Part(200, ((b"content-type", b"application/json"),))
            yield Part(body=b"{")
            raise Lost("the replica has ended: send it again")

    async def run() -> None:
        async with fronted(Short(1)) as ask:
            assert (await ask("/v1/completions", WHOLE))[2] == b"{"
            assert ask.front.outcomes == {"lost": 1} and not ask.front.tickets

    asyncio.run(run())


def test_a_reader_that_leaves_a_full_queue_ends_the_application() -> None:
    ended = list[bool]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            ended.append(True)

    async def run() -> None:
        parts = answer(app, Call("GET", "/"))
        await anext(parts)
        await asyncio.sleep(0)
        await asyncio.wait_for(parts.aclose(), 5.0)  # type: ignore[attr-defined]
        assert ended == [True]

    asyncio.run(run())


@pytest.mark.parametrize("served", [False, True])
def test_only_a_replica_that_never_served_is_given_up(served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the code of a wrong option again and again: another process may have its port, or its model is gone."""
    monkeypatch.setattr(local, "AGAIN_SECONDS", 0.0)
    said = list[str]()

    async def run() -> int:
        command = [sys.executable, "-S", "-c", "import time, sys; time.sleep(0.2); sys.exit(2)"]
        replicas = LocalReplicas(1, lambda port: command, dict(os.environ), "key", 1, said.append)
        starting = asyncio.create_task(replicas.start())
        while not replicas.members or not replicas.members[0].lives:
            await asyncio.sleep(0.01)
        one = replicas.members[0]
        one.ready = served
        for _ in range(1000):
            if one.lives == STARTS + 1 or (one.keeper is not None and one.keeper.done()):
                break
            await asyncio.sleep(0.01)
        await replicas.close(0.0)
        await asyncio.gather(starting, return_exceptions=True)
        return one.lives

    assert asyncio.run(run()) == STARTS + served and any("not tried again" in text for text in said) != served


def test_users_have_one_arm_on_all_replicas_and_one_writer_keeps_the_records(tmp_path: Path) -> None:
    e = experiment_from({"arms": {"off": {"length": 0}, "on": {"length": 3}}, "salt": "x"}, "trial", "here")
    overrides = {"off": {"draft_length": 0}, "on": {"draft_length": 3}}

    async def run() -> dict[str, set[str]]:
        arms: dict[str, set[str]] = {}
        replicas = InProcess(2, [ArmPlacer(e, overrides), ArmPlacer(e, overrides)])
        async with fronted(replicas, LiveExperiment(e, overrides, tmp_path / "s.db")) as ask:
            for i in range(24):
                user = f"u{i % 6}"
                _, headers, _ = await ask(
                    "/v1/completions", {**WHOLE, "prompt": [i % 16], "max_tokens": 4, "user": user}
                )
                arms.setdefault(user, set()).add(headers[b"x-outrider-arm"].decode())
            assert len({n for n, _ in replicas.seen}) == 2
        return arms

    arms = asyncio.run(run())
    assert all(len(found) == 1 for found in arms.values()) and len({a for found in arms.values() for a in found}) == 2
    tally = read("trial", tmp_path / "s.db")[1]
    assert sum(side.requests for side in tally.arms.values()) == 24


# ----------------------------------------------------------------- processes
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are killed by number")
def test_one_of_two_processes_is_killed_under_load() -> None:
    """Only its own open requests fail, with an error within 5 s; the others end; counters add up; it is started again."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    said: list[str] = []

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "tests.serve.toyserver", str(port), "4", "20", "0.01", "0"]

    replicas = LocalReplicas(2, command, env, "test-key-123456", 4, said.append)
    served, port = Settings("pycode", grace=5.0), a_port()
    app = create_front(replicas, served)
    server = server_for(app, served, "127.0.0.1", port)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    front = Running(port, server, thread, app.state.bridge, None)  # type: ignore[arg-type]
    try:
        until(lambda: server.started and sum(r.ready for r in replicas.members) == 2, 120)
        done: dict[int, tuple[float, bytes]] = {}

        def one(i: int) -> None:
            answered = front.call("POST", "/v1/completions", {**BODY, "prompt": [i], "max_tokens": 150})
            done[i] = (time.monotonic(), answered[2])

        clients = [threading.Thread(target=one, args=(i,)) for i in range(8)]
        for client in clients:
            client.start()
        until(lambda: len(app.state.bridge.tickets) == 8)
        owner = {i: ranked(conversation_key({"prompt": [i]}), [r.name for r in replicas.members])[0] for i in range(8)}
        victim = next(r for r in replicas.members if r.name == owner[0])
        assert victim.process is not None
        until(lambda: replicas.open[victim.name] == sum(n == victim.name for n in owner.values()), 20)
        killed = time.monotonic()
        os.kill(victim.process.pid, signal.SIGKILL)
        for client in clients:
            client.join(60)
        lost = {i for i, (_, body) in done.items() if b"has ended" in body}
        assert lost == {i for i in owner if owner[i] == victim.name} and 0 < len(lost) < 8
        assert all(done[i][0] - killed < 5.0 for i in lost)
        assert all(body.count(b'"finish_reason":"length"') == 1 for i, (_, body) in done.items() if i not in lost)
        outcomes = app.state.bridge.outcomes
        until(lambda: sum(outcomes.values()) == 8)  # they are counted behind the last byte
        assert (outcomes["answered"], outcomes["lost"]) == (8 - len(lost), len(lost))
        until(lambda: victim.lives == 2 and victim.ready, 120, lambda: said)
        assert front.call("POST", "/v1/completions", {**WHOLE, "prompt": [0], "max_tokens": 3})[0] == 200
        least = 150 * (8 - len(lost)) + 3
        until(lambda: sample(front.call("GET", "/metrics")[2], "vllm:generation_tokens_total") >= least, 20)
        until(lambda: sample(front.call("GET", "/metrics")[2], "outrider_replicas") == 2, 20)
        assert sample(front.call("GET", "/metrics")[2], "outrider_front_requests_total") == 9
    finally:
        front.stop(40)
