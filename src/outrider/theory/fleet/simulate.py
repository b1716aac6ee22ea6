"""A fleet of replicas under traffic, step by step: discrete events, continuous batching, chunked prefill, drafts, failures.

A replica decodes at most `slots` sequences together. A step takes every decoding sequence and at most one chunk of prompt rows;
its seconds come from a cost function, and each sequence gets one token and the draft tokens that were accepted, drawn from the
acceptance of the drafter. Nothing of a step is averaged: a request waits for the end of the step it arrives in, a prompt delays
the others by its chunks, and a batch is slower than a single sequence.

Time jumps from event to event. Between two events (an arrival at a replica with a free slot, the end of a text, a failure) the
steps of a replica have one load and one draft length, so they are drawn at once; an arrival cuts them at the next end of a step.
The cost is a few array operations per event, whatever the length of the texts.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from itertools import count

import numpy as np

from outrider.theory.checks import positive_int
from outrider.theory.fleet.nouns import FAILED, OK, REFUSED, Failures, Outcome, Replica, Traffic
from outrider.theory.fleet.server import Server, Steps

_BIN = math.log(1.01)
_BINS = 2800
_LEAST = 1e-6
"""Pauses are counted in bins of 1% from a microsecond to about 10^6 seconds."""


def simulate(
    traffic: Traffic, replica: Replica, replicas: int, *, ongoing: int | None = None, queue: int | None = None,
    failures: Failures | None = None, seed: int = 0,
) -> Outcome:  # fmt: skip
    """What `replicas` copies of `replica` make of the traffic; each request goes to a replica with the fewest open requests.

    ongoing: most open requests of a replica; more wait at the router, first come, first served (Ray Serve's
    `max_ongoing_requests`). None: no limit, they wait at their replica. queue: requests that may wait, at each replica or, with
    `ongoing`, at the router; one more is refused. None: any number. The same seed gives the same outcome.

    >>> replica = Replica(lambda decoding, length, rows: 0.01, slots=4)
    >>> requests = Traffic(np.array([0.0, 0.0]), np.array([100, 300]), np.array([3, 1]))
    >>> out = simulate(requests, replica, 1)
    >>> [round(float(x), 3) for x in out.first], [round(float(x), 3) for x in out.end]
    ([0.01, 0.03], [0.03, 0.03])
    """
    return _Fleet(traffic, replica, positive_int("replicas", replicas), ongoing, queue, failures, seed).run()


class _Fleet:
    """One simulation; see `simulate`."""

    def __init__(
        self, traffic: Traffic, replica: Replica, replicas: int, ongoing: int | None, queue: int | None,
        failures: Failures | None, seed: int,
    ) -> None:  # fmt: skip
        self.traffic, self.replica, self.failures = traffic, replica, failures
        self.ongoing, self.queue = ongoing, queue
        self.rng = np.random.default_rng(seed)
        self.servers = [Server() for _ in range(replicas)]
        self.open = np.zeros(replicas)  # open requests of each replica; infinite while it is down
        self.held: deque[int] = deque()
        self.events: list[tuple[float, int, str, int, int]] = []
        self.tick = count()
        n = len(traffic.arrival)
        self.status = np.full(n, -1, np.int64)
        self.first, self.end = np.full(n, np.nan), np.full(n, np.nan)
        self.where, self.tried = np.full(n, -1, np.int64), np.zeros(n, np.int64)
        self.busy, self.steps, self.undone, self.turn = 0.0, 0, n, 0
        self.gaps = np.zeros(_BINS)
        self.model = Steps(replica, self.rng)

    def run(self) -> Outcome:
        """All events in the order of their times, arrivals first among equals."""
        arrival, n, i = self.traffic.arrival, len(self.traffic.arrival), 0
        if self.failures is not None:
            for r in range(len(self.servers)):
                self._later(self.rng.exponential(self.failures.between), "fail", r)
        while self.undone:
            if i < n and (not self.events or arrival[i] <= self.events[0][0]):
                self._arrive(i, float(arrival[i]))
                i += 1
                continue
            now, _, kind, r, version = heapq.heappop(self.events)
            if kind == "step":
                if version == self.servers[r].version:  # else the segment was cut, or its replica has failed
                    self._finish(r, now)
            elif kind == "fail":
                self._fail(r, now)
            else:
                self._repair(r, now)
        return self._outcome()

    def _outcome(self) -> Outcome:
        late = self.replica.overhead
        bins = _LEAST * np.exp(_BIN * (np.arange(_BINS) + 0.5))
        whole = np.where(self.status == OK, late, np.nan)
        return Outcome(
            self.traffic, self.status, self.first + whole, self.end + whole, self.where, self.busy, self.steps,
            int(self.tried.sum()), bins, self.gaps,
        )  # fmt: skip

    def _later(self, when: float, kind: str, r: int, version: int = 0) -> None:
        heapq.heappush(self.events, (when, next(self.tick), kind, r, version))

    # ---------------------------------------------------------------- the router
    def _arrive(self, i: int, now: float) -> None:
        """Give request i to the replica with the fewest open requests, or hold it, or refuse it; turns break ties."""
        start = self.turn % len(self.open)
        r = start + int(self.open[start:].argmin())
        if start and self.open[:start].min() < self.open[r]:
            r = int(self.open[:start].argmin())
        most = self.replica.slots + self.queue if self.queue is not None else math.inf
        if self.ongoing is not None and self.open[r] >= self.ongoing:
            if self.queue is not None and len(self.held) >= self.queue:
                self._close(i, REFUSED)
            else:
                self.held.append(i)
        elif self.open[r] >= most or self.open[r] == math.inf:
            self._close(i, REFUSED)
        else:
            self.turn += 1
            self._give(i, r, now)

    def _give(self, i: int, r: int, now: float, *, begin: bool = True) -> None:
        server = self.servers[r]
        self.open[r] += 1
        self.where[i], self.tried[i] = r, self.tried[i] + 1
        server.waiting.append(i)
        if not begin:
            return
        if not server.steps:
            self._begin(r, now)
        elif len(server.ids) < self.replica.slots:
            end = server.cut(now)
            if end is not None:
                self._later(end, "step", r, server.version)

    def _close(self, i: int, status: int) -> None:
        self.status[i] = status
        self.undone -= 1

    def _release(self, r: int, now: float, *, begin: bool = True) -> None:
        """Requests that the router held go to replica r as long as it has room. begin: now; else the caller does."""
        while self.held and self.ongoing is not None and self.open[r] < self.ongoing:
            self._give(self.held.popleft(), r, now, begin=begin)

    # ---------------------------------------------------------------- a replica
    def _begin(self, r: int, now: float) -> None:
        server = self.servers[r]
        end = server.begin(now, self.traffic, self.model)
        if end is not None:
            self._later(end, "step", r, server.version)

    def _finish(self, r: int, now: float) -> None:
        """Book the steps of replica r that end now, close the texts that are whole, and go on."""
        server = self.servers[r]
        self.busy += now - server.start
        self.steps += server.steps
        if server.decoding:
            self._count_gaps(server)
        begun, ended = server.finish()
        for i in begun:
            self.first[i] = now
        for i in ended:
            self.end[i] = now
            self._close(i, OK)
        self.open[r] -= len(ended)
        self._release(r, now, begin=False)
        self._begin(r, now)

    def _count_gaps(self, server: Server) -> None:
        took = server.took()
        if isinstance(took, float):
            at = min(_BINS - 1, int(math.log(max(took, _LEAST) / _LEAST) / _BIN))
            self.gaps[at] += server.decoding * server.steps
        else:
            bins = (np.log(np.maximum(took, _LEAST) / _LEAST) / _BIN).astype(int)
            np.add.at(self.gaps, np.minimum(bins, _BINS - 1), server.decoding)

    # ---------------------------------------------------------------- failures
    def _fail(self, r: int, now: float) -> None:
        assert self.failures is not None
        server = self.servers[r]
        lost = [*server.ids, *server.waiting]
        self.busy += max(0.0, now - server.start) if server.steps else 0.0
        self.servers[r] = Server(server.version + 1)
        self.open[r] = math.inf
        self._later(now + self.failures.repair, "repair", r)
        for i in lost:
            self.first[i] = np.nan
            if self.tried[i] > self.failures.retries:
                self._close(i, FAILED)
            else:
                self._arrive(i, now)

    def _repair(self, r: int, now: float) -> None:
        assert self.failures is not None
        self.open[r] = 0.0
        self._later(now + self.rng.exponential(self.failures.between), "fail", r)
        self._release(r, now)
