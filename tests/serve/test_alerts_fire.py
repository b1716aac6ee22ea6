"""Every built-in alert is seen to fire on a real server, also where the measure it would like is missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from outrider.build import Engine
from outrider.control.adaptive import Outlook
from outrider.models.toy import TableTarget
from outrider.serve.tickets import Limits
from outrider.serve.watch import Monitor
from outrider.telemetry.alerts import CONDITIONS, Alerts, WindowSample
from outrider.verify import load_rule
from tests.contract.scripted import Budgets, Scripted
from tests.serve.harness import Running, serving, until

V, DEPTH = 16, 4
BODY = {"model": "pycode", "prompt": [3, 1, 4], "max_tokens": 300, "temperature": 1.0, "ignore_eos": True}


class Target(TableTarget):
    """Each token is followed by the next one, nearly always. fails, sleeps: what its next passes do."""

    def __init__(self, sure: float = 9.0) -> None:
        table = torch.zeros(V, V)
        for t in range(V):
            table[t, (t + 1) % V] = sure
        super().__init__(table)
        self.fails = False
        self.sleeps = 0.0

    def forward(self, *given: Any, **more: Any) -> Any:
        time.sleep(self.sleeps)
        if self.fails:
            raise RuntimeError("broken")
        return super().forward(*given, **more)


class Liar:
    """An exact rule that states a tenth of the risk it takes. honest: for now it tells the truth."""

    def __init__(self, honest: bool) -> None:
        self.right, self.honest = load_rule("speculative_sampling"), honest

    def __getattr__(self, name: str) -> Any:
        return getattr(self.right, name)

    def __call__(self, *args: Any) -> Any:
        v = self.right(*args)
        if self.honest:
            return v
        return type(v)(v.path, v.next_token, v.judged, tuple(0.1 * r for r in v.risk), v.spread, v.bias)


def engine_with(wrong: int, rule: Any = None, target: Target | None = None) -> Engine:
    """wrong: which of the four drafted tokens is the first that is wrong; 4: none."""

    def drafts(view: Any, k: int) -> list[int]:
        return [(view.tokens[-1] + 1 + i + (5 if i >= wrong else 0)) % V for i in range(k)]

    rule = rule or load_rule("speculative_sampling")
    parts = (target or Target(), Scripted(drafts, DEPTH), rule, Budgets(lambda s: DEPTH))
    return Engine(*parts, slots=2, max_length=600, allow_lossy=True)


@contextmanager
def watched(engine: Engine, body: dict[str, Any] | None = None, clients: int = 1, **options: Any) -> Iterator[Running]:
    """A server under traffic whose alerts look often and hold for a moment, over a minute: some need a thousand steps."""
    stop = threading.Event()

    def quick(watch: Monitor) -> None:
        watch.period, watch.window, watch.alerts.hold = 0.05, 60.0, 0.1

    with serving(engine=engine, arrange=quick, **options) as running:

        def traffic() -> None:
            while not stop.is_set():
                running.call("POST", "/v1/completions", {**BODY, **(body or {})})

        threads = [threading.Thread(target=traffic) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield running
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def fires(running: Running, name: str) -> None:
    """Wait until it does, and until the metrics say so."""
    rows = lambda: {r["name"] for r in running.watch.alerts.table() if r["firing"]}  # noqa: E731
    until(lambda: name in rows(), 60, lambda: (rows(), running.watch.reading()))
    text = running.call("GET", "/metrics")[2].decode()
    assert f'outrider_alert_firing{{alert="{name}",model_name="pycode"}} 1.0' in text


def test_drafts_that_never_fit_are_seen_without_any_measure_of_cost() -> None:
    """A fixed length: nobody knows what a plain step takes, and that takes no threshold away."""
    with watched(engine_with(0), fixed=True) as running:
        fires(running, "rejections_above_break_even")
        fires(running, "speculation_loses")
        assert running.watch.break_even() is None and running.watch.speedup() is None


def test_drafts_that_never_fit_are_seen_when_their_requests_do_not_follow_the_controller() -> None:
    """Requests with seeds of their own draft whatever the controller says, which has gone to length 0, where break-even is none."""
    with watched(engine_with(0), {"seed": 7}) as running:
        running.watch.outlook = lambda: Outlook(1, 0, 1.0, 0.01, None)  # type: ignore[method-assign]
        fires(running, "rejections_above_break_even")


def test_a_speed_is_that_of_what_was_decoded() -> None:
    """The controller's choice may be plain decoding, at speed 1: seeded requests that draft for nothing are slower all the same."""
    with watched(engine_with(0), {"seed": 7}) as running:
        until(lambda: running.watch.reading().drafts > 100)
        running.watch.speeds = lambda: [  # type: ignore[method-assign]
            {"length": 0, "tokens_per_step": 1.0, "cost": 1.0, "speedup": 1.0},
            {"length": 4, "tokens_per_step": 1.0, "cost": 3.0, "speedup": 0.33},
        ]
        assert running.watch.speedup() == pytest.approx(1 / 3, abs=0.1)
        assert 0.0 < (running.watch.break_even() or 0.0) < 0.5
        fires(running, "speculation_loses")


def test_few_drafts() -> None:
    with watched(engine_with(4), {"speculation": {"mode": "off"}}, fixed=True) as running:
        fires(running, "few_drafts")


def test_acceptance_suspicious() -> None:
    with watched(engine_with(4, target=Target(sure=30.0)), fixed=True) as running:
        fires(running, "acceptance_suspicious")


def test_quality_spent() -> None:
    rule = load_rule("tv_budget:per_token=0.3")
    with watched(engine_with(0, rule, Target(sure=1.0)), fixed=True) as running:
        fires(running, "quality_spent")


def test_not_exact() -> None:
    with watched(engine_with(0, Liar(honest=False), Target(sure=0.0)), fixed=True) as running:
        fires(running, "not_exact")


def test_residuals_changed() -> None:
    """An engine that was right and breaks."""
    rule = Liar(honest=True)
    with watched(engine_with(0, rule, Target(sure=0.0)), fixed=True) as running:
        until(lambda: running.watch.reading().judged > 300)
        assert not running.bridge.metrics.residuals.changed
        rule.honest = False
        fires(running, "residuals_changed")


def test_queue_full() -> None:
    target = Target()
    target.sleeps = 0.005
    with watched(engine_with(4, target=target), clients=6, fixed=True, limits=Limits(queue=0)) as running:
        fires(running, "queue_full")


@pytest.mark.parametrize("stream", [False, True])
def test_requests_fail(stream: bool) -> None:
    """As an error, or, where the reply has begun with 200, as its last event: no status says so then."""
    target = Target()
    target.sleeps = 0.01
    with watched(engine_with(4, target=target), {"stream": stream}, fixed=True) as running:
        until(lambda: running.watch.reading().emitted > 0)
        assert running.watch.reading().failed == 0
        target.fails = True
        fires(running, "requests_fail")
        target.fails = False


def test_engine_silent() -> None:
    target = Target()
    with watched(engine_with(4, target=target), fixed=True, limits=Limits(hang_seconds=0.5)) as running:
        until(lambda: running.watch.reading().emitted > 0)
        assert running.bridge.alive
        target.sleeps = 3.0
        rows = lambda: {r["name"] for r in running.watch.alerts.table() if r["firing"]}  # noqa: E731
        until(lambda: "engine_silent" in rows())
        target.sleeps = 0.0
        until(lambda: "engine_silent" not in rows())


def test_every_condition_has_a_test_here() -> None:
    from pathlib import Path

    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{c.name}"' in text for c in CONDITIONS)


def test_no_threshold_vanishes_with_the_trouble() -> None:
    """Whatever is unknown: all drafts rejected is an alert, and so is an engine that does not come round."""
    alerts = Alerts(hold=0.0)
    worst = WindowSample(judged=1000, rejected=1000, accepted=0, drafts=1000, steps=1000, emitted=1000, alive=False)
    said = {n.name for n in alerts.look(worst, 0.0)}
    assert {"rejections_above_break_even", "speculation_loses", "engine_silent"} <= said
    fine = WindowSample(judged=1000, rejected=300, accepted=700, drafts=400, steps=500, emitted=1200)
    assert {n.name for n in alerts.look(fine, 1.0) if not n.firing} == said
