"""Limits hold: fair shares, grammars that cost too much, slow bodies, deep bodies, and how soon a slot is free."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from statistics import median
from typing import Any

import pytest

from outrider.automata import Compiler
from outrider.build import build_engine
from outrider.engine.scheduler import Scheduler
from outrider.serve.body import DEPTH
from outrider.serve.bridge import Bridge
from outrider.serve.tickets import Limits, Overloaded
from outrider.telemetry.prometheus import Metrics
from tests.serve.harness import KEY, Running, serving, until

SHORT = {"model": "pycode", "prompt": "def f(", "max_tokens": 4}
LONG = {**SHORT, "max_tokens": 900, "ignore_eos": True}
OTHER = "another-key-1"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class Waits:
    """As much of a sequence as the queue looks at."""

    def __init__(self, request: str) -> None:
        self.request, self.slot, self.cached, self.tokens, self.output = request, -1, 0, [1], []


def test_owners_take_turns_in_the_queue() -> None:
    queue = Scheduler(2)
    for name in ("a1", "a2", "a3", "a4", "b1", "a5", "c1", "b2"):
        queue.waiting.append(Waits(name))  # type: ignore[arg-type]
    queue.admit()  # a1 and a2 run
    queue.share(lambda s: s.request[0])
    assert [s.request for s in queue.waiting] == ["b1", "c1", "b2", "a3", "a4", "a5"]
    queue.share(lambda s: "one")
    assert [s.request for s in queue.waiting] == ["b1", "c1", "b2", "a3", "a4", "a5"]


def test_a_heavy_key_delays_a_light_one_by_no_more_than_a_request() -> None:
    """One key fills the queue; another key's request is served after the next slot that comes free, and a share is a share."""
    limits = Limits(queue=20, per_owner=11, queue_seconds=60)
    with serving(keys=(KEY, OTHER), limits=limits, slots=1) as running:
        body = {**SHORT, "max_tokens": 40, "ignore_eos": True}
        done: list[str] = []

        def ask(key: str) -> None:
            assert running.call("POST", "/v1/completions", body, bearer(key))[0] == 200
            done.append(key)

        heavy = [threading.Thread(target=ask, args=(KEY,)) for _ in range(11)]
        for thread in heavy:
            thread.start()
        until(lambda: running.bridge.held == 11)
        status, headers, reply = running.call("POST", "/v1/completions", body, bearer(KEY))
        assert (
            status == 429 and "this key" in json.loads(reply)["error"]["message"] and int(headers["retry-after"]) >= 1
        )
        before = len(done)
        ask(OTHER)
        assert done.index(OTHER) - before <= 3  # the running one, and those that ended while we connected
        for thread in heavy:
            thread.join()
        assert running.bridge.owned[0] == running.bridge.owned[1] == 0
        assert running.call("POST", "/v1/completions", {**body, "n": 12}, bearer(KEY))[0] == 400


HEAVY: list[dict[str, Any]] = [
    {"type": "string", "pattern": "^(a|b|ab)*(a{1,400}b{1,400}){1,400}$"},
    {"type": "string", "pattern": "(((a{0,90}){0,90}){0,90}){0,90}c"},
    {"type": "array", "minItems": 5000, "maxItems": 9000, "items": {"type": "array", "minItems": 900, "maxItems": 990}},
    {"type": "object", "properties": {f"k{i}": {"enum": [f"v{j}" for j in range(40)]} for i in range(60)}},
]


@pytest.mark.parametrize("schema", HEAVY)
def test_a_heavy_grammar_does_not_stall_the_engine(server: Running, schema: dict[str, Any]) -> None:
    """While it is compiled, refused or served, the longest pause between the tokens of another stream stays short."""
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    answer: list[tuple[int, float]] = []

    def ask() -> None:
        start = time.monotonic()
        status, _, reply = server.call("POST", "/v1/completions", {**SHORT, "max_tokens": 8, "response_format": wanted})
        assert set(json.loads(reply)) >= {"error"} or status == 200
        answer.append((status, time.monotonic() - start))

    with server.stream(LONG) as sock:
        sock.settimeout(20)
        thread = threading.Thread(target=ask)
        thread.start()
        longest, last = 0.0, time.monotonic()
        while thread.is_alive():
            assert sock.recv(65536)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        thread.join()
    status, seconds = answer[0]
    assert status in (200, 400, 503)
    assert longest < max(2.0, 0.5 * seconds)  # a machine that is busy makes both longer


def test_the_engine_finds_a_grammar_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine(slots=1)
    engine.compile_grammar('json:{"type":"object"}')
    grammars = engine.parts.pipeline.grammars
    assert grammars is not None
    with monkeypatch.context() as patched:
        patched.setattr(Compiler, "make", lambda *_: pytest.fail("compiled twice"))
        one, two = grammars.start('json:{"type":"object"}'), grammars.start('json:{"type":"object"}')
    token = engine.encode("{")[0]
    assert one.allowed([])[token] and not one.allowed([token])[token]
    one.follow([token])
    assert not one.allowed([])[token] and two.allowed([])[token]  # copies do not share their place
    for i in range(100):
        engine.compile_grammar(f"regex:a{i}")
    assert len(grammars.kept) <= 64


@pytest.mark.parametrize("depth", [DEPTH - 1, DEPTH, DEPTH + 1, 500])
def test_nesting_is_bounded(server: Running, depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    status, _, reply = server.call("POST", "/v1/completions", {**SHORT, "metadata": value})
    message = json.loads(reply)["error"]["message"]
    assert status == 400 and ("nested too deeply" in message) is (depth + 1 > DEPTH)


def test_a_slow_body_is_cut() -> None:
    with serving(slots=1, body_seconds=0.4) as running, socket.create_connection(("127.0.0.1", running.port)) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n")
        sock.sendall(b'Content-Length: 100\r\n\r\n{"model"')
        sock.settimeout(30)
        assert b" 408 " in sock.recv(4096)
        assert running.bridge.held == 0


def test_headers_are_bounded(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        sock.settimeout(30)
        answer = b""
        try:
            for _ in range(100):
                sock.sendall(b"X-Filler: " + b"x" * 4000 + b"\r\n")
            while part := sock.recv(4096):
                answer += part
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused while we were still sending
        assert b" 200 " not in answer


def test_a_disconnect_frees_the_slot_within_a_step() -> None:
    """Commands are obeyed before the next step: the engine takes no step with a request after its abort was sent."""
    engine = build_engine(slots=2)
    bridge = Bridge(lambda: engine, Metrics("m"))
    taken: list[tuple[int, int]] = []
    step = engine.step

    def counted(*deliver: Any) -> Any:
        events = step(*deliver)
        taken.append((len(bridge.tickets), len(engine.scheduler.running)))
        return events

    engine.step = counted  # type: ignore[method-assign]

    async def play() -> None:
        from outrider.params import SamplingParams

        await bridge.start()
        for _ in range(5):
            ticket = bridge.reserve(1)
            await bridge.submit(ticket, [[5, 6, 7]], SamplingParams(max_tokens=900, ignore_eos=True))
            events = bridge.events(ticket)
            await anext(events)
            before = len(taken)
            bridge.release(ticket)
            while engine.scheduler.free < 2:
                await asyncio.sleep(0)
            assert len(taken) - before <= 1  # at most the step that was under way
        await bridge.close(0.1)

    asyncio.run(play())


def test_a_full_server_refuses_before_any_work() -> None:
    bridge = Bridge(lambda: build_engine(slots=1), Metrics("m"), Limits(queue=1))

    async def play() -> None:
        await bridge.start()
        bridge.reserve(2)
        start = time.thread_time()  # of this thread alone, however busy the machine is
        for _ in range(1000):
            with pytest.raises(Overloaded):
                bridge.reserve(1)
        assert time.thread_time() - start < 0.5  # 0.5 ms each, where 50 ms are allowed
        for ticket in list(bridge.tickets.values()):
            bridge.release(ticket)
        await bridge.close(0.1)

    asyncio.run(play())


def test_the_time_of_a_wrong_key_does_not_tell_where_it_differs() -> None:
    """Medians of samples in random order, within 5%: a rank test sees the hundredth of a microsecond that the place of a string in
    memory makes. The control compares byte by byte, and its medians are far apart."""
    from outrider.serve.settings import Settings, digest

    right = "k" * 4000
    early, late = ("x" + right[1:]).encode(), (right[:-1] + "x").encode()
    coins = random.Random(11)
    settings = Settings("m", (digest(right),))

    def bytewise(key: str) -> int | None:
        return next((None for a, b in zip(key, right, strict=True) if a != b), 0)

    def early_over_late(check: Any, samples: int) -> float:
        times: dict[bytes, list[float]] = {early: [], late: []}
        for _ in range(2 * samples):
            raw = early if coins.random() < 0.5 else late
            key = raw.decode()  # a new object each time: where a string lies in memory changes the time of copying it
            start = time.perf_counter()
            assert check(key) is None
            times[raw].append(time.perf_counter() - start)
        return median(times[early]) / median(times[late])

    assert 0.95 < early_over_late(settings.owner, 10_000) < 1.05
    assert early_over_late(bytewise, 300) < 0.5
