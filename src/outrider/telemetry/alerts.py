"""Built-in alerts: conditions on windowed sums, with hysteresis, for servers without an external monitor.

A condition fires when it has held for `hold` seconds and clears when its opposite, at another threshold, has held as long, so that
a value near a threshold does not fire repeatedly. Every rate needs a minimum of traffic. Conditions still work when a measurement
is missing: a default replaces it. An alert contains numbers of this module and the served model's name, never text of a client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

WINDOW = 60.0
"""Seconds over which rates are formed."""
HOPELESS = 0.9
"""Rejections per judged token above which no draft is cheap enough, if break-even was never measured: nine of ten steps that draft
gain nothing."""
FEW = 300
"""Least number of judged draft tokens in the window for a meaningful share."""
LEAST_COST = 1.1
"""Time of a step with drafts relative to a plain one, if it was never measured: hardly any drafter costs less."""


@dataclass(frozen=True, slots=True)
class WindowSample:
    """The inputs of the conditions: sums of the latest WINDOW seconds, and present estimates. None: not known.

    judged, rejected, accepted, emitted: tokens. steps: of sequences. drafts: steps that verified a draft. bias: total variation
    spent. overloaded, failed: refused and failed requests. speedup: of recent decoding over plain decoding. break_even:
    rejections per judged token at which drafts gain nothing. deep: whether the drafter can draft at all. doubted, changed: of
    `detect.Residuals`. alive: whether the engine thread has a recent heartbeat.
    """

    judged: int = 0
    rejected: int = 0
    accepted: int = 0
    steps: int = 0
    drafts: int = 0
    emitted: int = 0
    bias: float = 0.0
    overloaded: int = 0
    failed: int = 0
    speedup: float | None = None
    break_even: float | None = None
    deep: bool = True
    alive: bool = True
    doubted: bool = False
    changed: bool = False

    @property
    def rejection(self) -> float:
        """Rejections per judged token; 0 when none was judged."""
        return self.rejected / self.judged if self.judged else 0.0


@dataclass(frozen=True, slots=True)
class Condition:
    """An alert. value: the compared value, None if it is unknown now. fire, clear: levels. above: whether it fires above `fire`."""

    name: str
    severity: str
    summary: str
    value: Callable[[WindowSample], float | None]
    fire: float
    clear: float
    above: bool = True
    hold: float = 60.0

    def bad(self, value: float) -> bool:
        return value > self.fire if self.above else value < self.fire

    def good(self, value: float) -> bool:
        return value < self.clear if self.above else value > self.clear


def _excess(r: WindowSample) -> float | None:
    """Rejection probability over break-even."""
    if r.judged < FEW:
        return None
    return r.rejection / max(HOPELESS if r.break_even is None else r.break_even, 1e-6)


def _speed(r: WindowSample) -> float | None:
    """Speed of recent decoding over plain decoding; if it was not measured, the upper bound from the accepted tokens."""
    if not r.judged:
        return None
    if r.speedup is None:
        return None if r.judged < FEW else (1 + r.accepted / max(r.drafts, 1)) / LEAST_COST
    return r.speedup


CONDITIONS: tuple[Condition, ...] = (
    Condition(
        "rejections_above_break_even",
        "warning",
        "drafts are rejected more often than speculation can pay for",
        _excess,
        1.0,
        0.95,
    ),
    Condition(
        "acceptance_suspicious",
        "info",
        "nearly no draft is rejected: look for repetition loops",
        lambda r: r.rejection if r.judged >= 1000 else None,
        0.01,
        0.02,
        above=False,
    ),
    Condition(
        "speculation_loses",
        "warning",
        "speculation costs more than it saves",
        _speed,
        0.97,
        1.0,
        above=False,
    ),
    Condition(
        "not_exact",
        "critical",
        "rejections do not agree with the rule's own prediction: the output may not be exact",
        lambda r: float(r.doubted),
        0.5,
        0.5,
        hold=0.0,
    ),
    Condition(
        "residuals_changed",
        "critical",
        "rejections began to disagree with the rule's own prediction: something in the engine changed",
        lambda r: float(r.changed),
        0.5,
        0.5,
        hold=0.0,
    ),
    Condition(
        "quality_spent",
        "warning",
        "the lossy rule spends more than 1% total variation per token",
        lambda r: r.bias / r.emitted if r.emitted >= 100 else None,
        0.01,
        0.008,
    ),
    Condition(
        "queue_full",
        "warning",
        "requests are refused because the queue is full",
        lambda r: r.overloaded,
        2.5,
        0.5,
        hold=5.0,
    ),
    Condition(
        "few_drafts",
        "info",
        "hardly a step drafts: on this traffic, or with this draft, speculation does not pay",
        lambda r: r.drafts / r.steps if r.deep and r.steps >= 1000 else None,
        0.1,
        0.3,
        above=False,
    ),
    Condition(
        "engine_silent", "critical", "the engine is dead or hangs", lambda r: float(not r.alive), 0.5, 0.5, hold=0.0
    ),
    Condition("requests_fail", "critical", "requests fail", lambda r: r.failed, 0.5, 0.5, hold=0.0),
)


@dataclass(frozen=True, slots=True)
class Notice:
    """An alert that began or ended. since, at: seconds of the clock passed in."""

    name: str
    severity: str
    summary: str
    firing: bool
    value: float | None
    threshold: float
    since: float
    at: float


@dataclass(slots=True)
class _State:
    turned: float | None = None  # since when it has been on the way to the other state
    since: float | None = None  # since when it fires
    value: float | None = None


@dataclass(slots=True)
class Alerts:
    """The conditions of one server. hold: overrides every condition's own, for tests and demonstrations."""

    conditions: tuple[Condition, ...] = CONDITIONS
    hold: float | None = None
    _states: dict[str, _State] = field(default_factory=dict)

    def look(self, reading: WindowSample, now: float) -> list[Notice]:
        """The alerts that began and ended at time `now`. An unknown value counts towards the end of an alert."""
        out: list[Notice] = []
        for c in self.conditions:
            state = self._states.setdefault(c.name, _State())
            value = c.value(reading)
            state.value = value if value is not None else state.value
            firing = state.since is not None
            turning = (value is None or c.good(value)) if firing else (value is not None and c.bad(value))
            if not turning:
                state.turned = None
                continue
            state.turned = now if state.turned is None else state.turned
            if now - state.turned < (c.hold if self.hold is None else self.hold):
                continue
            began = now if state.since is None else state.since
            state.since, state.turned = (None if firing else now), None
            level = c.clear if firing else c.fire
            out.append(Notice(c.name, c.severity, c.summary, not firing, value, level, began, now))
        return out

    def table(self) -> list[dict[str, object]]:
        """The state of every condition, firing ones first: for the page and for metrics."""
        rows = []
        for c in self.conditions:
            s = self._states.get(c.name, _State())
            row = {"name": c.name, "severity": c.severity, "summary": c.summary, "firing": s.since is not None}
            rows.append(row | {"value": s.value, "threshold": c.fire, "above": c.above, "since": s.since})
        return sorted(rows, key=lambda row: not row["firing"])
