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
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.routing import Route
from typer.testing import CliRunner

from outrider.cli.main import app as command
from outrider.cli.serve_replicas import FRONTS, without
from outrider.errors import ConfigError
from outrider.evaluate.experiments.experiment import experiment_from
from outrider.evaluate.experiments.live import LiveExperiment, read
from outrider.evaluate.experiments.placer import ArmPlacer
from outrider.serve.app import create_app
from outrider.serve.replicas import local
from outrider.serve.replicas.calls import Call, Lost, Part, Replicas, conversation_key, ranked
from outrider.serve.replicas.front import create_front
from outrider.serve.replicas.inside import answer
from outrider.serve.replicas.local import STARTS, LocalReplicas
from outrider.serve.replicas.sums import Sums
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


# ----------------------------------------------------------------- who answers
@settings(max_examples=40)
@given(st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=8, unique=True), st.text(max_size=8))
def test_a_replica_that_goes_moves_only_its_own_conversations(names: list[str], key: str) -> None:
    first, *rest = ranked(key, names)
    for gone in names:
        assert ranked(key, [n for n in names if n != gone])[0] == (rest[0] if gone == first else first)


def test_conversations_spread_evenly() -> None:
    """3,000 keys over 3 replicas: 1,000 each, +- 6.1 standard deviations of 25.8 (one in a billion)."""
    first = [ranked(str(i), ["a", "b", "c"])[0] for i in range(3000)]
    assert all(abs(first.count(n) - 1000) < 158 for n in "abc")


def test_later_turns_of_a_conversation_are_the_same_conversation() -> None:
    opening = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    later = [*opening, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "more"}]
    key = conversation_key({"messages": opening, "max_tokens": 3})
    assert key == conversation_key({"messages": later, "temperature": 0.5})
    assert key != conversation_key({"messages": [opening[0], {"role": "user", "content": "bye"}]})
    assert conversation_key({"prompt": "a" * 5000}) == conversation_key({"prompt": "a" * 5000 + "b"})
    assert conversation_key([1]) == ""
    said = {"input": opening, "instructions": "be brief"}
    assert conversation_key(said) == conversation_key({**said, "input": later})
    assert conversation_key(said) != conversation_key({**said, "instructions": "be long"})
    assert conversation_key({"input": "hello"}) != conversation_key({"input": "bye"})
    mine = {"system": "be brief", "messages": opening[1:]}
    assert conversation_key(mine) == conversation_key({**mine, "messages": later[1:]}) != key


def test_the_front_has_every_address_of_one_server() -> None:
    """And what its options promise to browsers."""
    one = create_app(maker(), Settings("toy"))
    all_of_them = create_front(InProcess(2), Settings("toy", cors=("https://page.example",)))
    routes = [
        {(r.path, tuple(sorted(r.methods or ()))) for r in app.routes if isinstance(r, Route)} for app in (one, all_of_them)
    ]
    assert routes[0] == routes[1]
    from_a_page = (b"origin", b"https://page.example"), (b"access-control-request-method", b"POST")
    asked = Call("OPTIONS", "/v1/messages", b"", from_a_page)

    async def run() -> list[Part]:
        return [part async for part in answer(all_of_them, asked)]

    head = asyncio.run(run())[0]
    assert head.status == 200 and dict(head.headers)[b"access-control-allow-origin"] == b"https://page.example"


def test_options_of_the_front_are_not_passed_on() -> None:
    words = [
        "serve",
        "--replicas",
        "2",
        "--port=80",
        "--slots",
        "4",
        "--allow-open",
        "--api-key",
        "secret",
        "--draft=none",
    ]
    assert without(words, FRONTS) == ["serve", "--slots", "4", "--draft=none"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--replica-threads 2", "add --replicas"),
        ("--max-replicas 2", "add --replicas"),
        ("--replicas 2 --restarts 1", "leave --restarts out"),
        ("--replicas 2 --log-level loud", "no log level 'loud'"),
        ("--replicas 2 --on ray --max-replicas 1", "below --replicas 2"),
        ("--replicas 2 --on ray --store runs.db", "leave --store out"),
        ("--replicas 2 --on ray --port 0", "name the --port"),
        ("--replicas 2 --on moon", "local or ray"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    found = CliRunner().invoke(command, ["serve", *words.split()])
    assert isinstance(found.exception, ConfigError) and said in str(found.exception)


# ----------------------------------------------------------------- what is added up
def reading(uptime: float, emitted: int, pid: int) -> tuple[dict[str, Any], str]:
    """What a replica says; only what the sums read."""
    now = {
        "t": 1.0,
        "emitted": emitted,
        "sequence_steps": emitted,
        "running": 1,
        "waiting": 0,
        "length": 2,
        "speedup": 1.0,
    }
    now |= {"judged": 0, "accepted": 0, "rejected": 0, "risk": 0.0, "spread": 0.0, "bias": 0.0, "failed": 0}
    server = {"uptime": uptime, "pid": pid, "ready": True, "slots": 2, "queue": 3}
    state = {"server": server, "now": now, "positions": {"judged": [emitted], "accepted": []}, "outcomes": {"stop": 1}}
    state |= {"refused": {}, "ledger": {"agrees": True, "log_evidence": 0.0}, "alerts": [], "requests": []}
    state |= {"resources": {"memory": 5, "kv": 0.5}}
    text = f'# TYPE tokens_total counter\ntokens_total{{model="a\\"b"}} {emitted}\n# TYPE load gauge\nload 1.0\n'
    return state, text


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 50), st.booleans()), max_size=20))
def test_a_sum_never_falls_and_is_what_was_counted(steps: list[tuple[str, int, bool]]) -> None:
    """Replicas count on, start again from 0, and are not heard of for a while, in either case."""
    sums, uptime, counted, total, last = Sums(), {"a": 1.0, "b": 1.0}, {"a": 0, "b": 0}, 0, 0.0
    pids = {"a": 0, "b": 0}
    for name, more, again in steps:
        if again:
            uptime[name], counted[name], pids[name] = 0.0, 0, pids[name] + 1
        uptime[name] += 1.0
        counted[name] += more
        total += more
        if more % 2:
            sums.forget([name])
        sums.update({name: reading(uptime[name], counted[name], pids[name])})
        seen = sample(sums.exposition(), "tokens_total")
        state = sums.state(0.0)
        assert state is not None
        assert seen == total == state["now"]["emitted"] == state["positions"]["judged"][0] >= last
        assert sample(sums.exposition(), "load") == len(sums.live) == state["now"]["running"]
        last = seen


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
        until(lambda: len(app.state.bridge.tickets) == 8, 20)
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
