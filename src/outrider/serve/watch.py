"""Monitoring over time: samples of the sums every second, rates over a window, alerts and cost."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import monotonic, time
from typing import Any, Protocol, cast, runtime_checkable

from outrider.control.acceptance import break_even
from outrider.control.adaptive import Adaptive, Outlook
from outrider.serve.bridge import Bridge
from outrider.serve.webhook import Webhook
from outrider.telemetry.alerts import HOPELESS, WINDOW, Alerts, WindowSample
from outrider.telemetry.prometheus import Histogram, Metrics, drafts, quantile
from outrider.telemetry.resources import cpu_seconds, memory_bytes

KEPT = 600
"""Samples kept."""


@runtime_checkable
class Source(Protocol):
    """What is watched: a bridge, or another engine's server. metrics: its sums. alive: whether it answers. tickets: its open
    requests. failures: requests that it failed."""

    tickets: Any
    failures: int

    @property
    def metrics(self) -> Metrics: ...

    @property
    def alive(self) -> bool: ...


@dataclass
class Watching(ABC):
    """The history of one server, whatever engine it has. price: dollars per hour of the machine, None if unknown. period: seconds
    between two samples. webhook: gets every alert that begins or ends. clock: seconds since the epoch.

    A subclass says what the engine's controller estimates (`outlook`, `speeds`), whether it drafts (`deep`), how full its cache is
    (`kv_usage`), and what is shown besides.
    """

    bridge: Source
    price: float | None = None
    webhook: Webhook | None = None
    alerts: Alerts = field(default_factory=Alerts)
    period: float = 1.0
    window: float = WINDOW
    clock: Callable[[], float] = time
    history: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))
    began: float = field(default_factory=monotonic)

    def __post_init__(self) -> None:
        """Add the monitored values to the metrics."""
        gauges = self.bridge.metrics.gauges
        residuals = self.bridge.metrics.residuals
        gauges["exactness_log_evalue"] = (
            "Natural logarithm of the evidence against exactness over this server's life (alarm at 13.8).",
            lambda: residuals.log_evidence,
        )
        gauges["residual_log_detector"] = (
            "Natural logarithm of the change detector on rejections minus predicted rejections (alarm at 20.7).",
            lambda: None if residuals.log_detector == float("-inf") else residuals.log_detector,
        )
        gauges["spec_decode_speedup_ratio_estimate"] = (
            "Estimated speed of recent decoding over plain decoding.",
            self.speedup,
        )
        gauges["spec_decode_break_even_rejection_probability"] = (
            f"Rejection probability per judged token at which speculation gains nothing; {HOPELESS} if it was never measured.",
            lambda: HOPELESS if (level := self.break_even()) is None else level,
        )
        gauges["engine_alive"] = ("1 while the engine thread has a recent heartbeat.", lambda: float(self.bridge.alive))
        self.bridge.metrics.kv_usage = self.kv_usage
        gauges["kv_cache_usage_ratio"] = ("Share of the KV cache that running requests hold.", self.kv_usage)
        if self.price is not None:
            gauges["cost_dollars_per_million_tokens"] = ("Price of a million tokens, latest minute.", self.unit_cost)
        if self.price is not None:
            self.bridge.metrics.counters["cost_dollars"] = ("Price of the time since the start.", self.cost)
        self.bridge.metrics.alerts = lambda: [(str(row["name"]), bool(row["firing"])) for row in self.alerts.table()]

    async def run(self) -> None:
        """Take samples and send alerts until cancelled."""
        sender = asyncio.create_task(self.webhook.run()) if self.webhook else None
        try:
            while True:
                self.tick()
                await asyncio.sleep(self.period)
        finally:
            if sender is not None:
                sender.cancel()

    def tick(self) -> None:
        """Take one sample and check the alerts."""
        self.history.append(self.sample())
        for notice in self.alerts.look(self.reading(), self.clock()):
            if self.webhook is not None:
                self.webhook.put(notice)

    # ------------------------------------------------------------------ samples
    def sample(self) -> dict[str, Any]:
        """The sums now. Everything is cumulative: readers form differences, and ratios of them."""
        m, c = self.bridge.metrics, self.bridge.metrics.counts
        look = self.outlook()
        sums = {name: getattr(c, name) for name in ("emitted", "proposed", "accepted", "rejected", "judged")}
        sums |= {name: getattr(c, name) for name in ("risk", "spread", "bias")}
        evidence = {name: getattr(m.evidence, name) for name in ("judged", "rejected", "risk", "spread")}
        return sums | {
            "t": self.clock(),
            "evidence": evidence,
            "steps": m.steps,
            "sequence_steps": c.steps,
            "seconds": dict(m.seconds),
            "running": m.running if self.bridge.tickets else 0,
            "waiting": m.waiting if self.bridge.tickets else 0,
            "length": look.length if look else None,
            "speedup": look.speedup if look else None,
            **dict(zip(("compared", "plain"), self.compared(), strict=True)),
            "overloaded": m.refused["Overloaded"],
            "failed": sum(n for (_, code), n in m.responses.items() if code == "500") + self.bridge.failures,
            "drafts": drafts(c),
            "cpu": cpu_seconds(),
            "latency": {name: tuple(h.counts) for name, h in self._latencies()},
        }

    @property
    @abstractmethod
    def deep(self) -> bool:
        """Whether the drafter can draft at all."""

    @abstractmethod
    def outlook(self) -> Outlook | None:
        """The estimates of the controller, if it is adaptive."""

    @abstractmethod
    def speeds(self) -> list[dict[str, Any]]:
        """Measured draft lengths at the present load: tokens per step, cost of a step over a plain one, speed over plain."""

    def compared(self) -> tuple[float, float]:
        """Seconds of the steps that could be compared with plain decoding, and seconds that it would have taken for their tokens,
        each step at its own load; zeros where nobody compares."""
        return 0.0, 0.0

    @abstractmethod
    def kv_usage(self) -> float:
        """Tokens in the cache over its capacity, 0 .. 1."""

    def reading(self) -> WindowSample:
        """Sums over the window, and the present estimates."""
        if not self.history:
            return WindowSample()
        now, then = self.history[-1], self._then()
        names = ("judged", "rejected", "accepted", "drafts", "emitted", "bias", "overloaded", "failed")
        residuals = self.bridge.metrics.residuals
        return WindowSample(
            **{name: now[name] - then[name] for name in names},
            steps=now["sequence_steps"] - then["sequence_steps"],
            speedup=self.speedup(),
            break_even=self.break_even(),
            deep=self.deep,
            alive=self.bridge.alive,
            doubted=residuals.doubted,
            changed=residuals.changed,
        )

    def break_even(self) -> float | None:
        """Rejections per judged token at which drafts gain nothing: for the chosen length, or, while that is plain decoding, the
        highest value of any length. None if no length was ever measured."""
        look = self.outlook()
        if look is not None and look.break_even is not None:
            return look.break_even
        levels = [break_even(s["length"], s["cost"]) for s in self.speeds() if s["length"]]
        return max((x for x in levels if x is not None), default=None)

    def speedup(self) -> float | None:
        """Speed over plain decoding of the window's steps, including drafts the controller did not choose (a request with its own
        seed does not follow it): each step at its own load where that was measured (`compared`), for most of the window's time;
        else tokens per step, divided by the measured cost of the nearest draft length at the present load. None if steps drafted
        and no cost was measured, or nothing is known."""
        look = self.outlook()
        if look is None or not self.history:
            return look.speedup if look else None
        now, then = self.history[-1], self._then()
        of = {k: now[k] - then[k] for k in ("sequence_steps", "drafts", "proposed", "accepted")}
        compared, plain = (now[k] - then[k] for k in ("compared", "plain"))
        if compared > 0.5 * (sum(now["seconds"].values()) - sum(then["seconds"].values())):
            return plain / compared
        if not of["drafts"]:
            return look.speedup
        length = of["proposed"] / of["drafts"]
        near = min((s for s in self.speeds() if s["length"]), key=lambda s: abs(s["length"] - length), default=None)
        if near is None:
            return None
        share = of["drafts"] / of["sequence_steps"]
        return (1 + of["accepted"] / of["sequence_steps"]) / (1 + share * (near["cost"] - 1))

    def _then(self) -> dict[str, Any]:
        """The sample at the beginning of the window: the oldest that is not older."""
        end = self.history[-1]["t"]
        return next(s for s in self.history if s["t"] >= end - self.window)

    # ------------------------------------------------------------------ cost and use
    def cost(self) -> float | None:
        """Dollars since the start."""
        return None if self.price is None else self.price * (monotonic() - self.began) / 3600

    def unit_cost(self) -> float | None:
        """Dollars per million tokens at the latest minute's rate; None while nothing is emitted."""
        if self.price is None or len(self.history) < 2:
            return None
        now, then = self.history[-1], self._then()
        tokens = now["emitted"] - then["emitted"]
        return self.price / 3600 * (now["t"] - then["t"]) / tokens * 1e6 if tokens else None

    def resources(self) -> dict[str, Any]:
        """Memory, processor time, cache, latency and cost, as the page shows them."""
        unit, look = self.unit_cost(), self.outlook()
        plain = unit * look.speedup if unit is not None and look is not None and look.speedup else None
        out: dict[str, Any] = {"memory": memory_bytes(), "cores": os.cpu_count(), "kv": self.kv_usage()}
        out |= self.latency()
        return out | {"price": self.price, "cost": self.cost(), "per_million": unit, "plain_per_million": plain}

    def _latencies(self) -> list[tuple[str, Histogram]]:
        return [("first", self.bridge.metrics.first_token), ("per_token", self.bridge.metrics.per_token)]

    def latency(self) -> dict[str, dict[str, float | None]]:
        """Seconds to the first token, and per later token, of the requests that ended in the window: median and 95th percentile."""
        if not self.history:
            return {name: {"median": None, "high": None} for name, _ in self._latencies()}
        now, then = self.history[-1]["latency"], self._then()["latency"]
        out: dict[str, dict[str, float | None]] = {}
        for name, histogram in self._latencies():
            new = [b - a for a, b in zip(then[name], now[name], strict=True)]
            out[name] = {key: quantile(histogram.bounds, new, q) for key, q in (("median", 0.5), ("high", 0.95))}
        return out


@dataclass
class Monitor(Watching):
    """The history of our own server; `bridge` is its `Bridge`."""

    @property
    def own(self) -> Bridge:
        """The bridge, with its engine."""
        return cast(Bridge, self.bridge)

    @property
    def deep(self) -> bool:
        """Whether the drafter can draft at all."""
        return self.own.engine.parts.drafter.max_depth > 0

    def outlook(self) -> Outlook | None:
        """The estimates of the controller, if it is adaptive."""
        controller = self.own.engine.controller
        return controller.outlook() if isinstance(controller, Adaptive) else None

    def speeds(self) -> list[dict[str, Any]]:
        """Measured draft lengths at the present load: tokens per step, cost of a step over a plain one, speed over plain."""
        controller = self.own.engine.controller
        return [asdict(s) for s in controller.speeds()] if isinstance(controller, Adaptive) else []

    def compared(self) -> tuple[float, float]:
        """The controller's sums, if it is adaptive."""
        controller = self.own.engine.controller
        return (controller.compared, controller.plain) if isinstance(controller, Adaptive) else (0.0, 0.0)

    def kv_usage(self) -> float:
        """Share of the pages (without pages, of the capacity) that sequences hold, 0 .. 1; 0 while the model is loaded."""
        if self.own.worker.engine is None:
            return 0.0
        kv = self.own.engine.parts.kv
        if (used := getattr(kv, "usage", None)) is not None:
            return used
        return sum(kv.length) / (kv.slots * kv.capacity)
