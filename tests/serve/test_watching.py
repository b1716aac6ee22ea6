"""Watching: a played drop of acceptance fires and clears, the webhook hears of it, and what is shown adds up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.build import Engine
from outrider.cli.serve import past_of
from outrider.control.adaptive import Outlook
from outrider.errors import ConfigError
from outrider.evaluate.store.store import Store
from outrider.integrations.watch import Watch
from outrider.models.toy import TableTarget
from outrider.records import PHASES, Counts, StepRecord
from outrider.serve.watch import Monitor
from outrider.serve.webhook import Webhook, check_url, post
from outrider.telemetry.ledger import ledger
from outrider.telemetry.prometheus import Metrics
from outrider.verify import load_rule
from tests.contract.scripted import Budgets, Scripted
from tests.serve.harness import Running, serving, until

V, DEPTH = 16, 4
BODY = {"model": "pycode", "prompt": [3, 1, 4], "max_tokens": 400, "temperature": 0, "ignore_eos": True}


class Receiver:
    """What a webhook gets: fails the first request, redirects the second, keeps the others."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.tries = 0

    @contextmanager
    def listening(self) -> Iterator[str]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.tries += 1
                data = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status = {1: 500, 2: 307}.get(outer.tries, 204)
                self.send_response(status)
                if status == 307:
                    self.send_header("location", "/elsewhere")
                self.end_headers()
                if status == 204:
                    outer.got.append(data)

            def log_message(self, *_: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/hook"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class Drafts:
    """Right drafts of a cyclic text, the fourth token wrong; or none right."""

    def __init__(self) -> None:
        self.good = True

    def __call__(self, view: Any, k: int) -> list[int]:
        shift = [0, 0, 0, 5] if self.good else [5] * DEPTH
        return [(view.tokens[-1] + 1 + i + shift[i]) % V for i in range(k)]


def engine_with(drafts: Drafts) -> Engine:
    table = torch.zeros(V, V)
    for t in range(V):
        table[t, (t + 1) % V] = 9.0
    parts = (TableTarget(table), Scripted(drafts, DEPTH), load_rule("speculative_sampling"), Budgets(lambda s: DEPTH))
    return Engine(*parts, slots=2, max_length=600)


def test_a_played_drop_of_acceptance_fires_and_clears() -> None:
    drafts, receiver, stop = Drafts(), Receiver(), threading.Event()

    def quick(watch: Monitor) -> None:
        watch.period, watch.window, watch.alerts.hold = 0.05, 0.6, 0.2
        watch.outlook = lambda: Outlook(1, DEPTH, 1.3, 0.01, 0.5)  # type: ignore[method-assign]
        # so cheap that even useless drafts lose nothing: otherwise a second alert fires a window later
        watch.speeds = lambda: [{"length": DEPTH, "cost": 0.5}]  # type: ignore[method-assign]
        assert watch.webhook is not None
        watch.webhook.pauses = (0.01, 0.01, 0.01)

    with (
        receiver.listening() as url,
        serving(engine=engine_with(drafts), fixed=True, webhook=url, arrange=quick) as running,
    ):

        def traffic() -> None:
            while not stop.is_set():
                assert running.call("POST", "/v1/completions", BODY)[0] == 200

        thread = threading.Thread(target=traffic)
        thread.start()
        try:
            until(lambda: running.watch.reading().judged > 300)
            time.sleep(0.5)
            assert receiver.got == [] and not any(row["firing"] for row in running.watch.alerts.table())
            drafts.good = False
            until(lambda: len(receiver.got) == 1)
            assert firing(running) == {"rejections_above_break_even"}
            drafts.good = True
            until(lambda: len(receiver.got) == 2)
            assert firing(running) == set()
        finally:
            stop.set()
            thread.join()
        began, ended = receiver.got
        assert [began["status"], ended["status"]] == ["firing", "resolved"]
        assert {began["alert"], ended["alert"]} == {"rejections_above_break_even"}
        assert began["value"] > 1 > ended["value"] and ended["since"] == began["at"] < ended["at"]
        keys = {"status", "alert", "severity", "summary", "model", "value", "threshold", "since", "at"}
        assert set(began) == set(ended) == keys  # numbers and our own words: nothing of a request
        assert receiver.tries == 4  # two attempts failed, and no redirect was followed
        assert not running.bridge.metrics.residuals.doubted  # worse drafts, honestly judged, are no reason to doubt


def firing(running: Running) -> set[str]:
    """The built-in alerts that /metrics says are firing; the page's data must agree."""
    lines = running.call("GET", "/metrics")[2].decode().splitlines()
    found = {
        line.split('alert="')[1].split('"')[0] for line in lines if "alert_firing{" in line and line.endswith(" 1.0")
    }
    state = json.loads(running.call("GET", "/outrider/state")[2])
    assert found == {row["name"] for row in state["alerts"] if row["firing"]}
    return found


def test_a_dishonest_rule_is_caught_and_a_repeated_seed_is_not() -> None:
    """Evidence counts requests whose noise is their own: a client that repeats a seed repeats its luck, which proves nothing."""
    right = load_rule("speculative_sampling")

    class Liar:
        """States a tenth of the risk it takes."""

        def __getattr__(self, name: str) -> Any:
            return getattr(right, name)

        def __call__(self, *args: Any) -> Any:
            v = right(*args)
            return type(v)(v.path, v.next_token, v.judged, tuple(0.1 * r for r in v.risk), v.spread, v.bias)

    for rule, seed, doubted in ((Liar(), None, True), (right, None, False), (Liar(), 7, False)):
        engine = Engine(
            TableTarget(torch.zeros(V, V)),
            Scripted(lambda v, k: [1] * k, 2),
            rule,
            Budgets(lambda s: 2),
            slots=2,
            max_length=600,  # type: ignore[arg-type]
        )
        with serving(engine=engine, fixed=True) as running:
            body = {**BODY, "temperature": 1.0} | ({} if seed is None else {"seed": seed})
            for _ in range(3):
                assert running.call("POST", "/v1/completions", body)[0] == 200
            until(lambda: not running.bridge.tickets)
            assert running.bridge.metrics.residuals.doubted is doubted
            text = running.call("GET", "/metrics")[2].decode()
            value = float(text.split("outrider_exactness_log_evalue{")[1].split("} ")[1].split()[0])
            assert (value > 13.8) is doubted
            book = json.loads(running.call("GET", "/outrider/state")[2])["ledger"]
            assert (book["low"] <= book["observed"] <= book["high"]) is not doubted
            evidence = running.bridge.metrics.evidence
            assert (evidence.judged == running.bridge.metrics.counts.judged) is (seed is None)
            assert f'outrider_evidence_rejections_total{{model_name="pycode"}} {float(book["observed"])}' in text
            assert f'outrider_spec_decode_ledger_high{{model_name="pycode"}} {book["high"]}' in text
            watched = Watch(running.url)
            watched.once()
            assert {k: watched.state()["ledger"][k] for k in ("predicted", "observed", "low", "high")} == {
                k: pytest.approx(book[k]) for k in ("predicted", "observed", "low", "high")
            }


def test_a_canary_that_is_repeated_with_its_seed_pushes_no_interval() -> None:
    """An unlucky text that comes a thousand times is one draw of luck, and none once its client chose the seed."""
    metrics = Metrics("m")
    one, seconds = Counts(judged=60, rejected=20, risk=14.0, spread=9.0), dict.fromkeys(PHASES, 0.0)
    for _ in range(1000):
        metrics(StepRecord(60, 1, 1, 0, seconds, one))
    book = ledger(metrics.evidence)
    assert not ledger(metrics.counts).agrees and book.agrees and book.judged == 0
    assert 'outrider_spec_decode_ledger_high{model_name="m"} 0.0' in metrics.text().decode()
    metrics(StepRecord(60, 1, 1, 0, seconds, one, engine_seeded=one))
    assert ledger(metrics.evidence) == ledger(one)


def test_cost_and_resources() -> None:
    with serving(slots=2, price=3.6, arrange=lambda w: setattr(w, "period", 0.05)) as running:
        assert running.call("POST", "/v1/completions", {**BODY, "max_tokens": 60})[0] == 200
        until(lambda: running.watch.unit_cost() is not None)
        state = json.loads(running.call("GET", "/outrider/state")[2])
        use, up = state["resources"], state["server"]["uptime"]
        assert use["cost"] == pytest.approx(up * 1e-3, rel=0.05, abs=1e-4)
        now, then = running.watch.history[-1], running.watch.history[0]
        rate = (now["emitted"] - then["emitted"]) / (now["t"] - then["t"])
        assert running.watch.unit_cost() == pytest.approx(1e-3 / rate * 1e6, rel=1e-6)
        assert use["memory"] > 50e6 and 0 <= use["kv"] < 1 and use["cores"] >= 1
        until(lambda: running.watch.latency()["per_token"]["median"] is not None)
        for name in ("first", "per_token"):
            found = json.loads(running.call("GET", "/outrider/state")[2])["resources"][name]
            assert 0 < found["median"] <= found["high"] < 60
        text = running.call("GET", "/metrics")[2].decode()
        for name in ("cost_dollars_total", "cost_dollars_per_million_tokens", "kv_cache_usage_ratio"):
            assert f"\noutrider_{name}{{" in text, name
        assert "\nprocess_cpu_seconds_total " in text


def test_the_controller_shows_what_it_measured(server: Running) -> None:
    for _ in range(3):
        assert server.call("POST", "/v1/completions", {**BODY, "prompt": "def f(", "max_tokens": 300})[0] == 200
    speeds = json.loads(server.call("GET", "/outrider/state")[2])["speeds"]
    assert speeds[0] == {"length": 0, "tokens_per_step": 1.0, "cost": 1.0, "speedup": 1.0}
    assert all(s["speedup"] == pytest.approx(s["tokens_per_step"] / s["cost"]) for s in speeds)


def test_past_runs_come_from_the_store_and_only_if_asked(server: Running, tmp_path: Path) -> None:
    assert server.call("GET", "/outrider/runs")[0] == 404
    assert past_of(tmp_path / "none.db")() == {"runs": [], "experiments": []}, "it may come yet"
    with pytest.raises(ConfigError):
        past_of(tmp_path)
    with Store(tmp_path / "runs.db") as store:
        run = store.begin("bench", "first", {"x": 1})
        store.append(
            run, ("arm", 0, 0), {"counts": {"judged": 10, "rejected": 4, "risk": 3.5, "spread": 2.0, "bias": 0.0}}
        )
        store.finish(run, {"speedup": 1.5})
        trial = store.begin("ab", "trial", {"arms": 2})
        store.save_experiment("trial", trial, {"arms": 2}, {"verdict": "faster"})
        store.finish(trial, {"verdict": "faster"})
    with serving(engine=engine_with(Drafts()), fixed=True, past=past_of(tmp_path / "runs.db")) as running:
        found = json.loads(running.call("GET", "/outrider/runs")[2])
        assert {r["name"] for r in found["runs"]} == {"first", "trial"}
        first = next(r for r in found["runs"] if r["name"] == "first")
        assert first["summary"] == {"speedup": 1.5} and first["ledger"]["arm"]["rejected"] == 4
        assert found["experiments"] == [{"name": "trial", "state": {"verdict": "faster"}}]
        assert running.call("POST", "/outrider/runs", {})[0] == 405  # it is read, never written


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "file:///etc/passwd", "hooks.example", "http://", "http://a b/", "http://h:99999/"]
)
def test_the_webhook_is_a_web_address(url: str) -> None:
    with pytest.raises(ConfigError):
        check_url(url)
    assert check_url("https://hooks.example:8443/x?y=1") == "https://hooks.example:8443/x?y=1"


def test_a_webhook_that_is_not_there_loses_notices_and_nothing_else() -> None:
    assert not post("http://127.0.0.1:9/", b"{}", 1.0)
    import asyncio

    from outrider.telemetry.alerts import Notice

    async def deliver() -> Webhook:
        hook = Webhook("http://127.0.0.1:9/", "m", pauses=(0.0,))
        task = asyncio.create_task(hook.run())
        hook.put(Notice("x", "info", "y", True, 1.0, 0.5, 0.0, 0.0))
        while not hook.lost:
            await asyncio.sleep(0.01)
        task.cancel()
        return hook

    hook = asyncio.run(deliver())
    assert (hook.sent, hook.lost) == (0, 1)


def test_the_page_is_told_why_it_is_not_faster(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    notices = ["decoding is slow: nobody installed a compiler; install one"]
    monkeypatch.setattr(type(server.bridge.engine), "notices", property(lambda engine: notices))
    assert json.loads(server.call("GET", "/outrider/state")[2])["server"]["notices"] == notices
