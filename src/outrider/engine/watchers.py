"""Who looks on: a controller and sinks. What they raise is theirs: it is counted and told, and ends nobody's text."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from outrider.protocols import Controller, Sink
from outrider.records import StepRecord
from outrider.types import SequenceView

logger = logging.getLogger(__name__)
PATIENCE = 3
"""Failures of a sink after which it gets no more records."""
MOST = 20
"""Different failures that are told."""


class Watchers:
    """Asks and tells them. incidents: what they raised so far. notices: a sentence for each different failure."""

    def __init__(self) -> None:
        self.incidents = 0
        self.notices: list[str] = []
        self._failed: Counter[int] = Counter()

    def wish(self, controller: Controller, views: list[SequenceView]) -> list[int]:
        """How deep the controller would draft each sequence; not at all where it fails."""
        try:
            return [int(w) for w, _ in zip(controller.budget(views), views, strict=True)]
        except Exception as error:
            self._note("the controller", error)
            return [0] * len(views)

    def tell(self, controller: Controller, sinks: Sequence[Sink], record: StepRecord) -> None:
        """Hand out the record of a step."""
        try:
            controller.observe(record)
        except Exception as error:
            self._note("the controller", error)
        for sink in sinks:
            if self._failed[id(sink)] < PATIENCE:
                try:
                    sink(record)
                except Exception as error:  # a full disk, say
                    self._failed[id(sink)] += 1
                    self._note(f"sink {type(sink).__name__}", error)

    def _note(self, who: str, error: Exception) -> None:
        self.incidents += 1
        logger.warning("%s failed", who, exc_info=error)
        said = f"{who} failed ({type(error).__name__}: {error})"[:200] + ": mend it; texts go on without it"
        if said not in self.notices and len(self.notices) < MOST:
            self.notices.append(said)
