"""One watched server over time: pages become sums, sums become figures, alerts and what the page at `/` shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import monotonic, time
from typing import Any

from outrider import __version__
from outrider.errors import ConfigError, printable
from outrider.integrations.watch.conditions import Look, conditions_for, doubted, look
from outrider.integrations.watch.figures import cannot, document, finite, missing
from outrider.integrations.watch.flavours import FLAVOURS, WANTED, Flavour, flavour_of
from outrider.integrations.watch.identity import Identity, ask, without_metrics
from outrider.integrations.watch.page import MOST_BYTES, parse
from outrider.integrations.watch.readers import Seen, Sums
from outrider.integrations.watch.sums import Continued, Span
from outrider.records import Counts
from outrider.telemetry.alerts import WINDOW, Alerts, Notice
from outrider.web import Fault, base_of, get

KEPT = 600
"""Samples kept."""
JUMPS, JUMP_SECONDS = 3, 60.0
"""A server that begins anew as often as this within as many seconds is rather several behind one address."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading: seconds since the epoch, sums of all lives, values of the moment, how often the server had begun anew."""

    t: float
    sums: Sums
    gauges: dict[str, float]
    lives: int


@dataclass(slots=True)
class Watch:
    """A server that is watched from outside, whatever engine it runs: Outrider, vLLM, SGLang or llama.cpp, told apart by its
    metrics.

    url: its address, with or without /metrics or /v1. key: sent as a bearer token to that address and to no other. seconds: for one
    answer. window: seconds over which alerts and recent figures are formed. say: told each problem, once. heard: gets every
    reading. clock: seconds since the epoch. audited, accused: whether texts of the server are audited, and with which outcome.

    >>> watch = Watch("http://127.0.0.1:8000")     # doctest: +SKIP
    >>> watch.tick()                               # doctest: +SKIP
    >>> watch.reading()["since_start"]["tokens_per_pass"]  # doctest: +SKIP
    """

    url: str
    key: str | None = field(default=None, repr=False)
    seconds: float = 5.0
    window: float = WINDOW
    say: Callable[[str], object] = lambda sentence: None
    clock: Callable[[], float] = time
    heard: Callable[[dict[str, Any]], object] | None = None
    audited: bool = False
    accused: Callable[[], bool] = lambda: False
    history: deque[Sample] = field(default_factory=lambda: deque(maxlen=KEPT))
    alerts: Alerts = field(default_factory=Alerts)
    faults: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    identity: Identity = field(default_factory=Identity)
    sums: Continued = field(default_factory=Continued)
    flavour: Flavour | None = None
    seen: Seen | None = None
    answers: bool = False
    began: float = field(default_factory=monotonic)
    _without: str = ""
    _said: set[str] = field(default_factory=set)
    _restarts: deque[float] = field(default_factory=lambda: deque(maxlen=1000))

    def __post_init__(self) -> None:
        self.url = base_of(self.url.strip().rstrip("/").removesuffix("/metrics"), "the address")
        self._conditions()

    # ------------------------------------------------------------------ reading
    def read(self) -> Seen:
        """One page, read. Raises Fault."""
        try:
            answer = get(f"{self.url}/metrics", self.key, seconds=self.seconds, most=MOST_BYTES)
        except Fault as fault:
            if fault.code in (404, 405, 501):  # something answers, and has no such page: say what it is
                self._without = self._without or without_metrics(self.url, self.key, min(self.seconds, 2.0), fault)
                raise Fault("none", self._without) from None
            raise
        page = parse(answer.body, WANTED)
        found = flavour_of(page)
        if found is None:
            known = ", ".join(f.name for f in FLAVOURS)
            what = "nothing that watch knows as a metric" if page.samples else "no metrics that watch knows"
            raise Fault("unknown", f"{self.url}/metrics answers with {what}: it reads those of {known}")
        for name in sorted(page.odd):
            self.fault(f"odd {name}", f"{name} has a value that no such metric can have: it is left out")
        self.flavour = found
        return found.read(page)

    def tick(self) -> list[Notice]:
        """Read once and judge the alerts; the ones that began or ended. Never raises: a page that cannot be read is a fault."""
        try:
            seen = self.read()
        except Fault as fault:
            self.answers = False
            self.fault(fault.kind, str(fault))
        else:
            self.answers = True
            self._take(seen)
        notices = self.alerts.look(self.look(), self.clock())
        if self.heard is not None:
            self.heard(self.reading())
        return notices

    def once(self) -> None:
        """Read once. Raises ConfigError where that is impossible."""
        try:
            self._take(self.read())
        except Fault as fault:
            raise ConfigError(str(fault)) from None
        self.answers = True

    def _take(self, seen: Seen) -> None:
        now, new = self.clock(), self.seen is None
        anew = self.sums.add(seen)
        self.seen = seen
        if anew:
            self._restarts.append(now)
            self.fault(
                "restart", "the server has begun anew: what it counted after the last reading is lost, the rest is kept"
            )
            if sum(t > now - JUMP_SECONDS for t in self._restarts) >= JUMPS:
                jumps = (
                    "its counters jump back and forth: several servers answer at this address; watch each at its own"
                )
                self.fault("several", jumps)
        gone = sorted({name.partition("/")[0] for name in self.sums.gone})
        for name in gone if not anew else ():
            self.fault(f"gone {name}", f"{name!r} has vanished from its metrics: figures that need it stand still")
        if new or anew:
            self.identity = ask(self.url, self.key, min(self.seconds, 2.0), seen.model)
        self.history.append(Sample(now, self.sums.now(), seen.gauges, self.sums.lives))
        self._conditions()

    def _conditions(self) -> None:
        gauges = {} if self.seen is None else self.seen.gauges
        self.alerts.conditions = conditions_for(self.sums.now(), gauges, audited=self.audited)

    def fault(self, kind: str, sentence: str) -> None:
        """Count a problem of a kind; its sentence is said, and kept for the page, the first time."""
        self.faults[kind] = self.faults.get(kind, 0) + 1
        if kind not in self._said and len(self._said) < 50:
            self._said.add(kind)
            self.problems.append(printable(sentence))
            self.say(printable(sentence))

    # ------------------------------------------------------------------ figures
    def lifetime(self) -> Span:
        """Everything counted: since the server began, and over its later lives."""
        return Span(self.history[-1].sums if self.history else {})

    def recent(self) -> Span:
        """The window."""
        then, now = self._ends()
        return Span({}) if then is None or now is None else Span.between(then.sums, now.sums, now.t - then.t)

    def _ends(self) -> tuple[Sample, Sample] | tuple[None, None]:
        """The samples at the ends of the window. A copy is looked through: readings come from another thread."""
        kept = list(self.history)
        if not kept:
            return None, None
        return next(s for s in kept if s.t >= kept[-1].t - self.window), kept[-1]

    def look(self) -> Look:
        """The window as the alerts read it."""
        gauges = self.seen.gauges if self.seen is not None and self.answers else {}
        then, now = self._ends()
        lives = 0 if then is None or now is None else now.lives - then.lives
        return look(self.recent(), gauges, answers=self.answers, lives=lives, accused=self.accused())

    def reading(self) -> dict[str, Any]:
        """What is known now, as plain data that JSON has: `outrider watch --once --json` prints it."""
        whole, gauges = self.lifetime(), {} if self.seen is None else self.seen.gauges
        recent = document(self.recent()) if len(self.history) > 1 else None
        return finite(
            {
                "url": self.url,
                "answers": self.answers,
                "engine": None if self.seen is None else self.seen.flavour,
                "version": self.identity.version,
                "model": self.identity.model,
                "watched_by": f"outrider {__version__}",
                "at": self.history[-1].t if self.history else None,
                "since_start": document(whole),
                "recent": recent,
                "passes_counted_by": "" if self.seen is None else self.seen.how,
                "now": {
                    k: gauges.get(k)
                    for k in ("running", "waiting", "kv", "length", "speedup", "break_even", "evidence")
                },
                "reported_acceptance_length": gauges.get("reported"),
                "restarts": max(0, self.sums.lives - 1),
                "alerts": [row["name"] for row in self.alerts.table() if row["firing"]],
                "cannot_tell": cannot(self.flavour, whole, gauges),
                "problems": list(self.problems),
                "faults": dict(self.faults),
            }
        )

    def state(self, after: float = 0.0) -> dict[str, Any]:
        """What the page shows, in the shape of our server's /outrider/state. after: leaves out the history up to this time."""
        whole, gauges = self.lifetime(), {} if self.seen is None else self.seen.gauges
        kept = list(self.history)  # readings come from another thread
        return finite(
            {
                "server": {
                    "model": self.identity.model or self.url.partition("://")[2],
                    "watched": self.url,
                    "engine": None if self.seen is None else self.seen.flavour,
                    "version": self.identity.version,
                    "uptime": monotonic() - self.began,
                    "longest": max(round(gauges.get("length", 0.0)), len(whole.at("accepted_at"))),
                    "ready": self.answers,
                    "notices": self.problems[-20:],
                    "missing": missing(whole, gauges),
                    "cannot": cannot(self.flavour, whole, gauges),
                    "how": "" if self.seen is None else self.seen.how,
                    "restarts": max(0, self.sums.lives - 1),
                },
                "now": _row(kept[-1] if kept else Sample(self.clock(), {}, {}, 0)),
                "positions": {"judged": whole.judged_at(), "accepted": whole.at("accepted_at")},
                "rejections": whole.rejections(),
                "ledger": _ledger(whole, gauges) if "risk" in whole.sums else None,
                "outlook": _outlook(gauges),
                "speeds": [],
                "resources": self._resources(gauges),
                "alerts": self.alerts.table(),
                "requests": [],
                "outcomes": {k: round(v) for k, v in whole.under("ended").items()},
                "refused": {},
                "history": [_row(s) for s in kept if s.t > after],
            }
        )

    def _resources(self, gauges: dict[str, float]) -> dict[str, Any]:
        recent = self.recent()
        out = {"memory": gauges.get("memory"), "kv": gauges.get("kv"), "cores": None, "price": None}
        return out | {name: recent.quantiles(name) for name in ("first", "per_token")}


def _outlook(gauges: dict[str, float]) -> dict[str, Any] | None:
    """What our own server's controller expects."""
    if "speedup" not in gauges:
        return None
    length, running = (round(gauges.get(k, 0.0)) for k in ("length", "running"))
    return {
        "speedup": gauges["speedup"],
        "break_even": gauges.get("break_even"),
        "length": length,
        "sequences": running,
    }


def _ledger(whole: Span, gauges: dict[str, float]) -> dict[str, Any]:
    from outrider.telemetry.ledger import ledger

    told = whole.under("evidence")  # older servers of ours say their sums alone
    book = ledger(evidence_of(told) if told else whole.counts())
    evidence = gauges.get("evidence")
    agrees = book.agrees if evidence is None else not doubted(gauges)
    return {k: v for k, v in asdict(book).items() if k != "judged"} | {"agrees": agrees, "log_evidence": evidence}


def evidence_of(told: dict[str, float]) -> Counts:
    """The sums of an interval, by their names."""
    get = lambda name: told.get(name, 0.0)  # noqa: E731
    return Counts(judged=round(get("judged")), rejected=round(get("rejected")), risk=get("risk"), spread=get("spread"))


def _row(s: Sample) -> dict[str, Any]:
    """A sample as the page's history has it. Rejections that are an interval are drawn by their least."""
    span = Span(s.sums)
    found = span.rejections()
    rejected = None if found is None else found[0]
    judged = span.get("judged")
    names = ("emitted", "proposed", "accepted", "drafts", "steps", "risk", "spread", "bias", "cpu")
    return {name: span.get(name) for name in names} | {
        "t": s.t,
        "evidence": span.under("evidence") or None,
        "sequence_steps": span.get("passes"),
        "rejected": rejected,
        "judged": judged if judged is not None or rejected is None else (span.get("accepted") or 0.0) + rejected,
        "seconds": span.phases(),
        "running": s.gauges.get("running"),
        "waiting": s.gauges.get("waiting"),
        "length": s.gauges.get("length"),
        "speedup": s.gauges.get("speedup"),
    }
