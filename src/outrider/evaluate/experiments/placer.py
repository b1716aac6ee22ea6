"""An experiment's part in one of several servers: requests are placed here, by the hash that all share, and kept by one writer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import time
from typing import Any

from outrider.evaluate.experiments.assignment import arm_of, arm_overrides, unit_key, unit_of
from outrider.evaluate.experiments.experiment import Experiment, read_experiment
from outrider.evaluate.experiments.live import Assignment
from outrider.evaluate.experiments.tally import STOPPED
from outrider.options import EngineOptions

KEPT = 100_000
"""Most records that wait to be taken: those of a front that has gone are not kept for ever."""


class ArmPlacer:
    """Assigns a request by its user alone, so that all replicas agree without a word; hands out how requests ended."""

    def __init__(self, e: Experiment, arm_overrides: Mapping[str, dict[str, Any]]) -> None:
        self.e, self.arm_overrides = e, arm_overrides
        self._stopped: frozenset[str] = frozenset()
        self._ended: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Nothing is opened."""

    def place(self, who: str) -> Assignment | None:
        """As `LiveExperiment.place`; the number is the writer's business."""
        who = unit_key(self.e, who, time())
        arm = arm_of(self.e, who)
        if arm is None:
            return None
        stopped = arm in self._stopped
        overrides = self.arm_overrides[self.e.base if stopped else arm]
        return Assignment(arm + STOPPED * stopped, 0, unit_of(self.e, who), overrides)

    def ended(self, place: Assignment, record: dict[str, Any]) -> None:
        """A request has ended."""
        with self._lock:
            self._ended.append({"label": place.label, "unit": place.unit, "record": record})

    def take(self, stopped: list[str]) -> list[dict[str, Any]]:
        """What has ended since the last call."""
        with self._lock:
            self._stopped = frozenset(stopped)
            out = list(self._ended)
            self._ended.clear()
        return out

    def close(self) -> None:
        """Nothing is open."""


def placer_of(file: str | Path, served: EngineOptions, *, fixed: bool) -> ArmPlacer:
    """The part of an experiment's file that one of several replicas has. See `live.trial_of`."""
    e = replace(read_experiment(Path(file)), quality=None)
    return ArmPlacer(e, arm_overrides(e, served, fixed=fixed))
