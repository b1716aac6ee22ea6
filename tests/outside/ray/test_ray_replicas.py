"""The server behind Ray Serve: sums over replicas, conversations that stay, a replica that is killed under load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.harness import Running, a_port, until

ROOT = Path(__file__).parents[3]
BODY = {"model": "pycode", "ignore_eos": True, "temperature": 1.0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`outrider serve --replicas 2 --on ray` in a process of its own."""
    log = tmp_path_factory.mktemp("ray") / "log"
    port = a_port()
    words = [
        "serve",
        "--replicas",
        "2",
        "--on",
        "ray",
        "--replica-threads",
        "1",
        "--slots",
        "4",
        "--port",
        str(port),
        "--grace",
        "5",
    ]
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "outrider.cli.main", *words], stdout=out, stderr=out)
    running: Any = Running(port, None, None, None, None)  # type: ignore[arg-type]

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return running.call("GET", "/ready")[0] == 200 and len(state(running)["replicas"]) == 2
        except (OSError, ValueError, KeyError):
            return False

    try:
        until(ready, 240, log.read_text)
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0


def state(running: Running) -> dict[str, Any]:
    """What the page is told."""
    return json.loads(running.call("GET", "/outrider/state")[2])


def sample(text: bytes, name: str) -> float:
    """The sum of a metric's samples."""
    lines = [line for line in text.decode().splitlines() if line.split("{")[0].split(" ")[0] == name]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_counters_add_up_and_a_conversation_stays(served: Running) -> None:
    before = {r["name"]: r["requests"] for r in state(served)["replicas"]}
    for _ in range(4):
        status, _, body = served.call("POST", "/v1/completions", {**BODY, "prompt": "def one(", "max_tokens": 6})
        assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 6

    def more() -> list[int]:
        return sorted(r["requests"] - before[r["name"]] for r in state(served)["replicas"])

    until(lambda: sum(more()) == 4, 30)  # the front asks its replicas now and then
    assert more() == [0, 4]
    for i in range(12):
        served.call("POST", "/v1/completions", {**BODY, "prompt": f"def f{i}(", "max_tokens": 6})
    until(lambda: sum(more()) == 16, 30)
    rows = state(served)["replicas"]
    metrics = served.call("GET", "/metrics")[2]
    assert all(r["requests"] > 0 for r in rows)
    assert sample(metrics, "vllm:generation_tokens_total") == 16 * 6 == sum(r["emitted"] for r in rows)


def test_a_replica_killed_under_load_takes_only_its_own_requests(served: Running) -> None:
    begun = sample(served.call("GET", "/metrics")[2], "outrider_front_requests_total")
    done: dict[int, tuple[float, bytes]] = {}

    def one(i: int) -> None:
        body = {**BODY, "prompt": f"class C{i}:", "max_tokens": 500, "stream": True}
        done[i] = (0.0, served.call("POST", "/v1/completions", body)[2])
        done[i] = (time.monotonic(), done[i][1])

    clients = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for client in clients:
        client.start()
    until(lambda: sum(r["running"] > 0 for r in state(served)["replicas"]) == 2, 60)
    victim = state(served)["replicas"][0]
    killed = time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)
    for client in clients:
        client.join(120)
    lost = {i for i, (_, body) in done.items() if b"has ended" in body}
    assert 0 < len(lost) < 8
    assert all(done[i][0] - killed < 5.0 for i in lost)
    assert all(body.count(b'"finish_reason":"length"') == 1 for i, (_, body) in done.items() if i not in lost)
    until(lambda: len(state(served)["replicas"]) == 2 and state(served)["gone"] == 1, 120)
    least = 16 * 6 + 500 * (8 - len(lost))
    until(lambda: sample(served.call("GET", "/metrics")[2], "vllm:generation_tokens_total") >= least, 30)
    metrics = served.call("GET", "/metrics")[2]
    assert sample(metrics, "outrider_front_requests_total") == begun + 8
    assert sample(metrics, "vllm:generation_tokens_total") >= least
