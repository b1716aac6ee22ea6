"""The sums of replicas' counters, those of replicas that are gone included: a total never falls because a replica died."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from outrider.records import Counts
from outrider.telemetry.ledger import ledger

ADDED = ("counter", "histogram")
"""Kinds of metrics that are added; of the others every replica's value is given, with its name as a label."""
PRESENT = ("running", "waiting")
"""Sums of a state that end with their replica."""
MOST_SILENT = 64
"""Replicas that may come back; of more, the oldest count as ended."""
NOT_SUMS = ("t", "length", "speedup")
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass(slots=True)
class Family:
    """One metric of one or more replicas."""

    kind: str
    text: str
    samples: Samples = field(default_factory=dict)


def read_metrics(text: str) -> dict[str, Family]:
    """Name -> family of an exposition in Prometheus' text format. Raises ValueError."""
    out: dict[str, Family] = {}
    for found in text_string_to_metric_families(text):
        family = out.setdefault(found.name, Family(found.type, found.documentation))
        for s in found.samples:
            if not s.name.endswith("_created"):
                family.samples[s.name, tuple(sorted(s.labels.items()))] = s.value
    return out


@dataclass(slots=True)
class Life:
    """What a replica said last, from one start of its process to its end. uptime: seconds since the start."""

    name: str
    uptime: float
    state: dict[str, Any]
    metrics: dict[str, Family]


class Sums:
    """The latest reading of each replica, and what the ones before it add up to.

    live: replicas that answer. silent: those that have not answered for a while; they may yet, and are then not counted twice.
    """

    def __init__(self) -> None:
        self.live: dict[str, Life] = {}
        self.silent: dict[str, Life] = {}
        self._ended = 0
        self._metrics: dict[str, Family] = {}
        self._now: dict[str, Any] = {}
        self._told: dict[str, Any] = {}

    @property
    def gone(self) -> int:
        """Replicas that have ended, or seem to have."""
        return self._ended + len(self.silent)

    def update(self, found: Mapping[str, tuple[dict[str, Any], str]]) -> None:
        """New readings by replica, later than all before: state and exposition. One that is missing keeps its last."""
        for name, (state, text) in found.items():
            uptime = float(state["server"]["uptime"])
            old = self.live.get(name) or self.silent.pop(name, None)
            again = old is not None and (state["server"]["pid"] != old.state["server"]["pid"] or uptime < old.uptime)
            if old is not None and again:  # started again: its counters began at 0
                self._retire(old)
            self.live[name] = Life(name, uptime, state, read_metrics(text))

    def forget(self, names: Iterable[str]) -> None:
        """These replicas do not answer any more."""
        self.silent |= {name: self.live.pop(name) for name in names if name in self.live}
        while len(self.silent) > MOST_SILENT:
            self._retire(self.silent.pop(next(iter(self.silent))))

    def _retire(self, life: Life) -> None:
        """Keep the sums of one that has ended."""
        self._ended += 1
        add_families(self._metrics, life.metrics)
        add(self._now, past(life))
        add(self._told, counted(life.state))

    # ------------------------------------------------------------------ what is shown
    def exposition(self, more: Iterable[str] = ()) -> bytes:
        """Prometheus' text: sums under the names that one server has, other values by replica. more: lines of the front."""
        total: dict[str, Family] = {}
        add_families(total, self._metrics)
        for life in (*self.live.values(), *self.silent.values()):
            add_families(total, life.metrics)
        lines: list[str] = []
        for name, family in total.items():
            lines += described(name, family.kind, family.text)
            lines += [sample(n, labels, value) for (n, labels), value in family.samples.items()]
        for name in dict.fromkeys(n for life in self.live.values() for n in life.metrics if n not in total):
            have = [(life.name, life.metrics[name]) for life in self.live.values() if name in life.metrics]
            lines += described(name, have[0][1].kind, have[0][1].text)
            for who, family in have:
                lines += [
                    sample(n, (*labels, ("replica", who)), value) for (n, labels), value in family.samples.items()
                ]
        return ("\n".join([*lines, *more]) + "\n").encode()

    def state(self, clock: float) -> dict[str, Any] | None:
        """What one server's page is told, of all replicas together; None while none has been heard of."""
        if not self.live:
            return None
        states = [life.state for life in self.live.values()]
        now: dict[str, Any] = {}
        for part in [self._now, *map(past, self.silent.values()), *(s["now"] for s in states)]:
            add(now, {k: v for k, v in part.items() if k not in NOT_SUMS})
        now |= {"t": clock} | {k: states[0]["now"][k] for k in ("length", "speedup")}
        book = ledger(Counts(**now["evidence"]))
        told: dict[str, Any] = {}
        for part in [self._told, *(counted(life.state) for life in (*self.silent.values(), *self.live.values()))]:
            add(told, part)
        server = states[0]["server"] | {k: sum(s["server"][k] for s in states) for k in ("slots", "queue")}
        server |= {
            "uptime": max(s["server"]["uptime"] for s in states),
            "ready": any(s["server"]["ready"] for s in states),
        }
        agrees = all(s["ledger"]["agrees"] for s in states)
        ledgers = {
            "predicted": book.predicted,
            "observed": book.observed,
            "low": book.low,
            "high": book.high,
            "agrees": agrees,
        }
        ledgers["log_evidence"] = max(s["ledger"]["log_evidence"] for s in states)
        alerts = [
            max((s["alerts"][i] for s in states), key=lambda a: bool(a["firing"]))
            for i in range(len(states[0]["alerts"]))
        ]
        resources = states[0]["resources"] | {"memory": sum(s["resources"]["memory"] or 0 for s in states)}
        resources |= {"kv": sum(s["resources"]["kv"] for s in states) / len(states)}
        requests = [r for s in states for r in s["requests"]][:64]
        return states[0] | {"server": server, "now": now, "ledger": ledgers, "alerts": alerts, "resources": resources} | {
            **told, "requests": requests, "history": [],
            "replicas": [row_of(life) for life in self.live.values()], "gone": self.gone,
        }  # fmt: skip


def row_of(life: Life) -> dict[str, Any]:
    """One replica's line on the page."""
    now = life.state["now"]
    steps = now["sequence_steps"]
    return {
        "name": life.name,
        "pid": life.state["server"]["pid"],
        "ready": life.state["server"]["ready"],
        "uptime": life.uptime,
        **{k: now[k] for k in ("running", "waiting", "emitted", "judged", "rejected", "risk", "failed")},
        "tokens_per_step": now["emitted"] / steps if steps else None,
        "requests": sum(life.state["outcomes"].values()),
    }


def past(life: Life) -> dict[str, Any]:
    """What remains of a replica's sums when it is gone."""
    return {k: v for k, v in life.state["now"].items() if k not in (*PRESENT, *NOT_SUMS)}


def counted(state: Mapping[str, Any]) -> dict[str, Any]:
    """The counts of a state beside `now`."""
    return {k: state[k] for k in ("positions", "outcomes", "refused")}


def add(total: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add numbers, and numbers in lists and mappings, name by name."""
    for name, value in part.items():
        if isinstance(value, Mapping):
            inner = total.setdefault(name, {})
            add(inner, value)
        elif isinstance(value, list | tuple):
            old = list(total.get(name, ()))
            long = max(len(old), len(value))
            pad = [(*x, *[0] * (long - len(x))) for x in (old, value)]
            total[name] = [a + b for a, b in zip(*pad, strict=True)]
        elif isinstance(value, int | float):
            total[name] = total.get(name, 0) + value


def add_families(total: dict[str, Family], part: Mapping[str, Family]) -> None:
    """Add what may be added."""
    for name, family in part.items():
        if family.kind in ADDED:
            mine = total.setdefault(name, Family(family.kind, family.text))
            for key, value in family.samples.items():
                mine.samples[key] = mine.samples.get(key, 0.0) + value


def described(name: str, kind: str, text: str) -> list[str]:
    """The two lines above a family. A counter's name ends in _total there."""
    name = f"{name}_total" if kind == "counter" else f"{name}_info" if kind == "info" else name
    kind = "gauge" if kind == "info" else kind
    return [f"# HELP {name} {escape(text)}", f"# TYPE {name} {kind}"]


def sample(name: str, labels: Iterable[tuple[str, str]], value: float) -> str:
    """One line."""
    inside = ",".join(f'{k}="{escape(v, quote=True)}"' for k, v in labels)
    number = "+Inf" if value == float("inf") else repr(float(value))
    return f"{name}{{{inside}}} {number}" if inside else f"{name} {number}"


def escape(text: str, quote: bool = False) -> str:
    """As the format wants it."""
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quote else text
