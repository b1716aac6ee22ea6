"""A server that is shut down, and one whose engine fails, dies, hangs or takes too long: what becomes of its requests."""

from __future__ import annotations

import gc
import json
import logging
import threading
import time
from types import SimpleNamespace

import pytest

from outrider.build import build_engine
from outrider.serve.engine_thread import EngineThread
from outrider.serve.tickets import Limits
from tests.serve.harness import serving, until
from tests.serve.test_robustness import LONG, SHORT, free


def test_shutdown_lets_running_requests_finish() -> None:
    """And no thread is left: `serving` checks it."""
    with serving(slots=2, grace=20.0) as running:
        body = {**LONG, "max_tokens": 250, "stream_options": {"include_usage": True}}
        sock = running.stream(body)
        stopping = threading.Thread(target=running.stop, args=(30.0,))
        stopping.start()
        until(lambda: running.bridge.draining)
        rest = b""
        while part := sock.recv(65536):
            rest += part
        stopping.join(30)
        sock.close()
        assert b"[DONE]" in rest
        assert b'"completion_tokens":250' in rest
        assert b'"error":' not in rest


def test_shutdown_ends_late_requests_with_an_error() -> None:
    with serving(slots=1, grace=0.1) as running:
        sock = running.stream({**LONG, "n": 3})
        running.stop(30.0)
        rest = b""
        while part := sock.recv(65536):
            rest += part
        sock.close()
        assert b"shutting down" in rest
        assert b"[DONE]" in rest


def test_a_failing_step_ends_its_requests_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    engine = build_engine(slots=2)
    with caplog.at_level(logging.CRITICAL), serving(engine=engine) as running:
        engine = running.bridge.engine
        right = engine.step
        engine.step = lambda *_: (_ for _ in ()).throw(RuntimeError("planted"))  # type: ignore[method-assign]
        status, _, reply = running.call("POST", "/v1/completions", SHORT)
        assert (status, json.loads(reply)["error"]["type"]) == (500, "server_error")
        assert "planted" not in reply.decode()
        engine.step = right  # type: ignore[method-assign]
        assert running.call("GET", "/ready")[0] == 200
        assert running.call("POST", "/v1/completions", SHORT)[0] == 200
        assert free(running) == 2


@pytest.mark.parametrize("more", [{}, {"prompt_logprobs": 0}, {"echo": True, "logprobs": 1}])
def test_only_faults_of_the_server_are_logged(caplog: pytest.LogCaptureFixture, more: dict[str, int]) -> None:
    """A prompt that is refused is the client's affair: it wrote a traceback. What fails here is logged, with its cause."""
    engine = build_engine(slots=2)
    with serving(engine=engine) as running, caplog.at_level(logging.WARNING):
        wrong = {"model": "pycode", "prompt": [900_000], "max_tokens": 1, **more}
        status, _, reply = running.call("POST", "/v1/completions", wrong)
        assert (status, caplog.records) == (400, []) and "vocabulary" in reply.decode()
        running.bridge.engine.check = running.bridge.engine.submit = _fails  # type: ignore[method-assign]
        status, _, reply = running.call("POST", "/v1/completions", {**SHORT, **more})
        assert status == 500 and "planted" not in reply.decode()
        assert [str(r.exc_info[1]) for r in caplog.records if r.exc_info] == ["planted"]


def _fails(*_: object, **__: object) -> None:
    raise RuntimeError("planted")


@pytest.mark.parametrize("where", ["_step", "admit", "_score"])
def test_a_dead_engine_thread_is_told_at_once(caplog: pytest.LogCaptureFixture, where: str) -> None:
    """Those who wait for a token, to be queued, or for a prompt's scores hear it now and not at their deadline; /health says it."""
    engine = build_engine(slots=2)
    with caplog.at_level(logging.CRITICAL), serving(engine=engine) as running:
        setattr(running.bridge.worker, where, lambda *_: (_ for _ in ()).throw(SystemExit("planted")))
        status, _, reply = running.call(
            "POST", "/v1/completions", {**SHORT, "prompt_logprobs": 0}
        )  # waits 30 s, not 600
        assert status == 500 and "died" in json.loads(reply)["error"]["message"]
        assert running.call("GET", "/health")[0] == running.call("GET", "/ready")[0] == 503
        assert running.call("POST", "/v1/completions", SHORT)[0] == 503
        assert running.bridge.held == 0 and not running.bridge.tickets
        assert running.server.state() == b"-"


def test_the_end_of_the_thread_is_known_before_anybody_is_told() -> None:
    """Requests that are open then are told. One that comes after must see that the thread executes nothing any more: otherwise it
    would wait for its deadline, in the moments before the thread is gone."""
    seen: list[bool] = []
    idle = SimpleNamespace(busy=False)
    worker = EngineThread(
        lambda: idle, None, lambda call: call(), lambda mail: None, lambda: seen.append(worker.running), 1.0
    )  # type: ignore[arg-type,return-value]
    worker.start()
    worker.started.result(10)
    assert worker.running
    worker.command(lambda: (_ for _ in ()).throw(SystemExit("planted")))
    worker.join(10)
    assert seen == [False] and worker.broken and not worker.running


def test_a_hung_engine_is_noticed_and_forgiven() -> None:
    engine = build_engine(slots=2)
    with serving(engine=engine, limits=Limits(hang_seconds=0.6)) as running:
        time.sleep(1.0)
        assert running.call("GET", "/ready")[0] == 200  # idle is not hung
        engine = running.bridge.engine
        right, gate = engine.step, threading.Event()
        engine.step = lambda *a: (gate.wait(20), right(*a))[1]  # type: ignore[method-assign]
        answer: list[int] = []
        thread = threading.Thread(target=lambda: answer.append(running.call("POST", "/v1/completions", SHORT)[0]))
        thread.start()
        until(lambda: running.call("GET", "/health")[0] == 503)
        assert running.call("GET", "/ready")[0] == 503
        assert running.call("POST", "/v1/completions", SHORT)[0] == 503
        gate.set()
        thread.join(20)
        assert answer == [200]
        until(lambda: running.call("GET", "/ready")[0] == 200)


def test_a_request_that_takes_too_long_ends() -> None:
    with serving(slots=1, limits=Limits(request_seconds=0.5)) as running:
        status, _, reply = running.call("POST", "/v1/completions", {**LONG, "n": 4})
        assert status == 503
        assert "longer than this server allows" in json.loads(reply)["error"]["message"]
        until(lambda: free(running) == 1)


def test_what_was_frozen_before_the_tests_is_frozen_after_a_server() -> None:
    """Of this suite: thawed by one server, millions of objects would be looked at by every server that begins after it."""
    frozen = gc.get_freeze_count()
    with serving(slots=1):
        pass
    assert gc.get_freeze_count() == frozen > 100_000
