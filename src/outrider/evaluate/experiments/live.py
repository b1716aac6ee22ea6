"""An experiment on a running server: assigns requests, keeps their records, looks, and stops the arms that do harm.

Requests are assigned in the caller's thread, by a hash and a counter. Records go to a thread of their own, which alone holds the
store: it commits each one, and looks when enough new ones are in. A record that cannot be written (a full disk, a lock) is tried
again.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic, time
from typing import Any

from outrider.errors import CapacityError, ConfigError
from outrider.evaluate.experiments.assignment import arm_of, arm_overrides, unit_key, unit_of
from outrider.evaluate.experiments.experiment import Comparison, Experiment, read_experiment
from outrider.evaluate.experiments.tally import STOPPED, ExperimentStatus, Tally
from outrider.evaluate.records import Key
from outrider.evaluate.statistics.sequential import Bounds
from outrider.evaluate.store.store import Store
from outrider.options import EngineOptions

logger = logging.getLogger(__name__)
KIND = "online"
"""Of its run in the store."""
WRITE_RETRY_SECONDS = 1.0
"""Seconds before a record that could not be written is tried again."""
STORE_CLOSE_SECONDS = 10.0
"""Seconds that `close` waits for a store that does not take what is left."""
LOOK_GROWTH = 1.01
"""Growth of the number of requests after which there is another look: looks cost time in proportion to what is known."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a request belongs. label: its arm, as records name it; overrides: sampling parameters it gets besides its own."""

    label: str
    number: int
    unit: str
    overrides: Mapping[str, Any]


class LiveExperiment:
    """One experiment while a server runs. arm_overrides: see `assignment`. Use `start` and `close` around the server's life."""

    def __init__(self, e: Experiment, arm_overrides: Mapping[str, dict[str, Any]], store: str | Path) -> None:
        """Raises ConfigError for a store that cannot be used, or that has this experiment unfinished with another configuration."""
        self.e, self.arm_overrides, self._where = e, arm_overrides, store
        with Store(store) as db:
            self.config = {**asdict(e), "wishes": dict(arm_overrides)}
            known, state = state_of(db, e.name)
            self.run = db.begin(KIND, e.name, self.config)
            records = db.records(self.run)
            self.tally = tally_of(e, records, state if known == self.run else {})
            self.session = 1 + max((key[2] for key in records), default=-1)
            self.status = self.tally.status()
            db.save_experiment(e.name, self.run, self.config, asdict(self.status))
        self._number = 0
        self._mail: queue.SimpleQueue[tuple[Assignment, dict[str, Any]] | None] = queue.SimpleQueue()
        self._closing = math.inf
        self._open: Future[None] = Future()
        self._lost = False
        self._thread = threading.Thread(target=self._write, name="outrider-trial", daemon=True)

    # ------------------------------------------------------------------ for the server
    def start(self) -> None:
        """Begin to take records. Raises what opening the store raised."""
        self._thread.start()
        self._open.result()

    def place(self, who: str) -> Assignment | None:
        """The assignment of the next request of `who`; None if it is in no arm. Each must come back to `ended`, in any order."""
        who = unit_key(self.e, who, time())
        arm = arm_of(self.e, who)
        if arm is None or self._lost:
            return None
        number, self._number = self._number, self._number + 1
        stopped = arm in self.status.stopped
        return Assignment(
            arm + STOPPED * stopped, number, unit_of(self.e, who), self.arm_overrides[self.e.base if stopped else arm]
        )

    def ended(self, place: Assignment, record: dict[str, Any]) -> None:
        """An assigned request has ended: outcome, tokens, later, seconds, queued, prompt_tokens, seeded, counts. Does not wait."""
        self._mail.put((place, {**record, "unit": place.unit}))

    def adopt(self, label: str, unit: str, record: dict[str, Any]) -> None:
        """Keep the record of a request that a replica has placed, by the same hash (`placer`)."""
        number, self._number = self._number, self._number + 1
        self._mail.put((Assignment(label, number, unit, {}), {**record, "unit": unit}))

    def stopped(self) -> list[str]:
        """The arms that were stopped."""
        return list(self.status.stopped)

    def close(self) -> None:
        """Write what has come in and end the thread."""
        self._closing = monotonic() + STORE_CLOSE_SECONDS
        self._mail.put(None)
        self._thread.join()

    # ------------------------------------------------------------------ its thread
    def _write(self) -> None:
        try:
            with Store(self._where) as db:
                self._open.set_result(None)
                self._keep(db)
        except Exception as error:  # the server goes on, without the experiment
            self._lost = True
            if self._open.done():
                logger.exception("the experiment %s has ended", self.e.name)
            else:
                self._open.set_exception(error)

    def _keep(self, db: Store) -> None:
        """Take records until the end, and look when enough are new."""
        taken = look = 0
        while (item := self._mail.get()) is not None:
            place, record = item
            if not self._kept(db, (place.label, place.number, self.session), record):
                return
            self.tally.add(place.label, place.number, self.session, record)
            taken += 1
            if taken >= look:
                look = int(taken * LOOK_GROWTH) + 1
                self._look(db)
        self.tally.flush()
        self._look(db)

    def _kept(self, db: Store, key: Key, record: dict[str, Any]) -> bool:
        """Commit a record, again and again if need be; False when the server ends and the store still refuses."""
        while True:
            try:
                db.append(self.run, key, record)
                return True
            except CapacityError as error:
                if monotonic() > self._closing:
                    logger.error("%d records of %s are lost: %s", 1 + self._mail.qsize(), self.e.name, error)
                    return False
                logger.warning("a record of %s waits: %s", self.e.name, error)
                threading.Event().wait(WRITE_RETRY_SECONDS)

    def _look(self, db: Store) -> None:
        self.status = self.tally.status()
        try:
            db.save_experiment(self.e.name, self.run, self.config, asdict(self.status))
        except CapacityError as error:
            logger.warning("the state of %s waits: %s", self.e.name, error)


def trial_of(file: str | Path, store: str | Path, served: EngineOptions, *, fixed: bool) -> LiveExperiment:
    """The trial of an experiment's file on a server: see `trial_from`."""
    return trial_from(read_experiment(Path(file)), store, served, fixed=fixed)


def trial_from(
    e: Experiment, store: str | Path, served: EngineOptions, *, fixed: bool, name: str | None = None
) -> LiveExperiment:
    """The trial of an experiment on a server with these options, under `name` or its own.

    Raises ConfigError for what it cannot vary, before anything is loaded.
    """
    e = replace(e, name=name or e.name, quality=None)
    return LiveExperiment(e, arm_overrides(e, served, fixed=fixed), store)


def state_of(db: Store, name: str) -> tuple[str | None, dict[str, Any]]:
    """The latest run of an experiment and its saved state; none for a new one. ConfigError for a name that `ab run` has."""
    try:
        run, _, state = db.experiment(name)
    except ConfigError:
        return None, {}
    if db.run(run).kind != KIND:
        raise ConfigError(
            f"{db.name}: {name!r} is an experiment of `ab run`: give this one another name, or another store"
        )
    return run, state


def tally_of(e: Experiment, records: Mapping[Key, dict[str, Any]], state: Mapping[str, Any]) -> Tally:
    """What a store knows of an experiment: its records, and the arms that were stopped."""
    tally = Tally(e)
    for arm, number, session in sorted(records, key=lambda key: (key[2], key[1])):
        tally.add(arm, number, session, records[arm, number, session])
    found = {c["arm"]: comparison_of(c) for c in state.get("comparisons", [])}
    tally.stopped = {arm: found[arm] for arm in state.get("stopped", [])}
    return tally


def comparison_of(data: Mapping[str, Any]) -> Comparison:
    """A comparison from the store, where an open interval is null."""
    speed = {"mean": math.nan, "low": -math.inf, "high": math.inf}
    speed |= {k: v for k, v in data["speed"].items() if v is not None}
    return Comparison(data["arm"], Bounds(**speed), None, tuple(data["vetoes"]), data["decision"])  # type: ignore[arg-type]


def read(name: str, store: str | Path) -> tuple[Experiment, Tally, ExperimentStatus]:
    """An online experiment as it stands in a store, also while a server writes to it. Raises ConfigError if there is none."""
    with Store(store, read_only=True) as db:
        run, config, state = db.experiment(name)
        records = db.records(run)
    e = Experiment(**{k: v for k, v in config.items() if k != "wishes"})
    tally = tally_of(e, records, state)
    return e, tally, tally.status()
