"""What a watch leaves in a store: a record of every minute, with the share of the ledger that is certain, and the audit's
verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outrider.evaluate.store.store import Store
from outrider.integrations.watch.figures import document
from outrider.integrations.watch.sums import Span
from outrider.integrations.watch.watcher import Sample, Watch


class Log:
    """A run of kind `watch`. Its records are numbered on when an interrupted watch of the same name and address goes on.

    every: seconds of a record. A record that cannot be written is not lost: the next one holds its time too.
    """

    def __init__(self, where: str | Path, name: str, watch: Watch, every: float = 60.0) -> None:
        """Raises ConfigError when the store cannot be used, or another watch is writing this run. Use it in one thread."""
        self.watch, self.every = watch, every
        self.store = Store(where)
        self.run = self.store.begin("watch", name, {"url": watch.url, "every": every})
        known = self.store.records(self.run)
        self.number = max((item for _, item, _ in known), default=-1) + 1
        self.since: Sample | None = None

    def tick(self, asked: Callable[[], dict[str, Any] | None] = lambda: None) -> bool:
        """Write a record if it is time; whether one was written. asked: says what the watch's own requests have shown, which is
        some work. Raises CapacityError when the store cannot be written."""
        now = self.watch.history[-1] if self.watch.history else None
        if now is None or (self.since is not None and now.t - self.since.t < self.every):
            return False
        if self.since is None:  # what was counted before we looked belongs to no minute of ours
            self.since = now
            return False
        self._write(self.since, now, asked())
        return True

    def _write(self, then: Sample, now: Sample, asked: dict[str, Any] | None) -> None:
        span = Span.between(then.sums, now.sums, now.t - then.t)
        counts = span.counts()
        if span.get("risk") is None:  # a ledger of rejections that nobody predicted would look like one that disagrees
            counts.judged = counts.rejected = 0
        data = {
            "at": now.t,
            "seconds": span.seconds,
            "tokens": round(span.get("emitted") or 0),
            "counts": asdict(counts),
            "figures": document(span),
            "now": now.gauges,
            "restarts": now.lives - then.lives,
            "alerts": [row["name"] for row in self.watch.alerts.table() if row["firing"]],
            "asked": asked,
        }
        engine = "unknown" if self.watch.seen is None else self.watch.seen.flavour
        self.store.append(self.run, (engine, self.number, 0), data)
        self.number += 1
        self.since = now

    def close(self, asked: dict[str, Any] | None = None) -> None:
        """Write what is left, finish the run with its last reading, and close the store."""
        now = self.watch.history[-1] if self.watch.history else None
        try:
            if now is not None and self.since is not None and now.t > self.since.t:
                self._write(self.since, now, asked)
            self.store.finish(self.run, self.summary(asked))
        finally:
            self.store.close()

    def summary(self, asked: dict[str, Any] | None) -> dict[str, Any]:
        """What a list of runs shows first, and behind it the last reading."""
        reading = self.watch.reading()
        whole, audit = reading["since_start"], (asked or {}).get("audit")
        head = {"engine": reading["engine"], "tokens_per_pass": whole["tokens_per_pass"], "tokens": whole["tokens"]}
        head |= {"audit": audit["outcome"]} if audit else {"restarts": reading["restarts"]}
        return head | {"reading": reading, "asked": asked}
