"""What the requests of an experiment on live traffic say so far.

The decision compares the k-th unit of an arm with the next units of the base: m base units to one of the arm, m fixed by the
shares. Units are drawn independently and land in arms by chance, so these differences have the mean that the arms differ by, and
their confidence sequence (`sequential`) may be looked at after every request.

Harm is watched by counting: of the units that meet their first error, under equal arms each is in the arm rather than the base
with probability pi = share / (share + share of the base), whatever came before. The mixture over larger probabilities,

    E = 1 / (1 - pi) * integral over t in [pi, 1] of (t / pi)^k ((1 - t) / (1 - pi))^(f - k) dt,

k of f in the arm, is an e-process: it reaches 1 / a with probability at most a. The same for requests that clients leave early.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scipy.special import betainc, betaln

from outrider.evaluate.experiments.assignment import shares_of
from outrider.evaluate.experiments.experiment import Comparison, Experiment, decide
from outrider.evaluate.statistics.sequential import bounds
from outrider.records import Counts
from outrider.telemetry.ledger import ledger

STOPPED = " (stopped)"
"""Behind the name of an arm in the record of a request that would have got it, and got the base instead."""
HELD = 200
"""Requests that one which does not end may hold back."""
HARM = ("error", "abort")
"""Outcomes that are counted against an arm."""
SHORTEST = 8
"""Later tokens below which the speed of a request is no value: a few steps are mostly chance."""
STATEMENTS = 1 + len(HARM)
"""What may be claimed of one arm: its speed, and each kind of harm."""


@dataclass(slots=True)
class ArmTally:
    """What is known of one arm. later, seconds: tokens after the first ones and what they took. values: log tokens per second of
    its units, in order; open: units without a value yet, their requests as [requests, later, seconds]. harmed: units by kind of
    harm. engine_seeded: counts of requests whose noise was ours (see `StepRecord.engine_seeded`)."""

    requests: int = 0
    tokens: int = 0
    later: int = 0
    seconds: float = 0.0
    counts: Counts = field(default_factory=Counts)
    engine_seeded: Counts = field(default_factory=Counts)
    outcomes: dict[str, int] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    open: dict[str, list[float]] = field(default_factory=dict)
    units: set[str] = field(default_factory=set)
    valued: set[str] = field(default_factory=set)
    harmed: dict[str, set[str]] = field(default_factory=lambda: {kind: set() for kind in HARM})

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a request."""
        unit, outcome = record["unit"], record["outcome"]
        self.requests, self.tokens = self.requests + 1, self.tokens + record["tokens"]
        self.units.add(unit)
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        for counts in (self.counts, *(() if record["seeded"] else (self.engine_seeded,))):
            counts.merge(Counts(**record["counts"]))
        if outcome in HARM:
            self.harmed[outcome].add(unit)
        if record["later"] >= SHORTEST and record["seconds"] > 0:
            self.later, self.seconds = self.later + record["later"], self.seconds + record["seconds"]
            if unit not in self.valued:
                sums = self.open.setdefault(unit, [0, 0, 0.0])
                self.open[unit] = [sums[0] + 1, sums[1] + record["later"], sums[2] + record["seconds"]]

    def close(self, unit: str) -> None:
        """Turn an open unit into a value."""
        _, later, seconds = self.open.pop(unit)
        self.values.append(math.log(later / seconds))
        self.valued.add(unit)


@dataclass(frozen=True, slots=True)
class ExperimentStatus:
    """Where an online experiment stands. groups: units of the base with a value; comparisons: as offline; stopped: arms that are
    no longer given to anybody."""

    groups: int
    total: int | None
    comparisons: list[Comparison]
    stopped: tuple[str, ...]


class Tally:
    """Takes records in any order and counts them in the order of their arrival.

    A request that still runs holds back those that came after it, but no more than HELD: counting what ends first would favour
    short requests. session: how often the server had been started; what a killed server never recorded holds nothing back.
    """

    def __init__(self, e: Experiment) -> None:
        self.e = e
        self.arms = {arm: ArmTally() for arm in e.arms}
        self.stopped: dict[str, Comparison] = {}
        self._session = self._next = 0
        self._early: dict[int, tuple[str, Mapping[str, Any]]] = {}

    def add(self, arm: str, number: int, session: int, record: Mapping[str, Any]) -> None:
        """One request: its arm, its place in the order of arrival, and how it ended."""
        if session != self._session:
            self.flush()
            self._session, self._next = session, 0
        if number < self._next:
            self._count(arm, record)
            return
        self._early[number] = (arm, record)
        while self._next in self._early or len(self._early) > HELD:
            if self._next in self._early:
                self._count(*self._early.pop(self._next))
            self._next += 1

    def flush(self) -> None:
        """Count what waits for requests that will not be recorded any more."""
        for number in sorted(self._early):
            self._count(*self._early.pop(number))

    def _count(self, arm: str, record: Mapping[str, Any]) -> None:
        if arm not in self.arms or record["outcome"] == "refused":
            return
        unit, side = record["unit"], self.arms[arm]
        if self.e.window is not None:  # a stretch of time is over when a request of another one is counted
            for every in self.arms.values():
                for over in [u for u in every.open if u != unit]:
                    every.close(over)
        side.add(record)
        if self.e.window is None and unit in side.open and side.open[unit][0] >= self.e.each:
            side.close(unit)

    def status(self) -> ExperimentStatus:
        """What the requests say now. An arm that was found worse or vetoed stays so."""
        found = [self.stopped.get(arm) or self._compare(arm) for arm in self.e.others]
        self.stopped |= {c.arm: c for c in found if c.decision in ("worse", "vetoed")}
        return ExperimentStatus(len(self.arms[self.e.base].values), None, found, tuple(self.stopped))

    def _compare(self, arm: str) -> Comparison:
        share = self.e.level / (len(self.e.others) * STATEMENTS)
        speed = bounds(self._differences(arm), share, self.e.g)
        vetoes = self._vetoes(arm, share)
        return Comparison(arm, speed, None, vetoes, decide(self.e, speed, None, vetoes))

    def _differences(self, arm: str) -> list[float]:
        """The arm's units, each less the mean of as many of the base's next units as the shares give it; or the other way round."""
        shares = shares_of(self.e)
        mine, base = self.arms[arm].values, self.arms[self.e.base].values
        many = max(1, round(shares[self.e.base] / shares[arm]))
        few = max(1, round(shares[arm] / shares[self.e.base]))
        return [a - b for a, b in zip(_means(mine, few), _means(base, many), strict=False)]

    def _vetoes(self, arm: str, share: float) -> tuple[str, ...]:
        mine, base, shares = self.arms[arm], self.arms[self.e.base], shares_of(self.e)
        chance = shares[arm] / (shares[arm] + shares[self.e.base])
        out = []
        for kind in HARM:
            ours, all_ = len(mine.harmed[kind]), len(mine.harmed[kind]) + len(base.harmed[kind])
            if log_evidence(ours, all_, chance) >= math.log(1 / share):
                what = "met an error" if kind == "error" else "were left early"
                out.append(f"{ours} of its users {what}, {all_ - ours} of the base's")
        if not ledger(mine.engine_seeded, level=1e-4).agrees:
            c = mine.engine_seeded
            out.append(f"the ledger disagrees: predicted {c.risk:.1f} rejections, observed {c.rejected}")
        return tuple(out)


def _means(values: list[float], size: int) -> list[float]:
    """Means of whole groups of `size`, in order."""
    return [sum(values[i : i + size]) / size for i in range(0, len(values) - size + 1, size)]


def log_evidence(ours: int, both: int, chance: float) -> float:
    """Natural log of the e-process of the module: `ours` of `both` units with harm are in an arm that has `chance` of each."""
    rest = both - ours
    tail = float(betainc(rest + 1, ours + 1, 1 - chance))  # the beta distribution's mass above `chance`
    if tail <= 0:
        return -math.inf
    scale = -ours * math.log(chance) - rest * math.log1p(-chance) - math.log1p(-chance)
    return scale + float(betaln(ours + 1, rest + 1)) + math.log(tail)
