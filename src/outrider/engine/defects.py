"""Who looks on, and what fails beside the texts: it is counted and told, and ends nobody's text."""

from __future__ import annotations

import logging
from collections import Counter

from outrider.engine.parts import Defect, Hooks
from outrider.records import StepRecord
from outrider.types import SequenceView

logger = logging.getLogger(__name__)
PATIENCE = 3
"""Failures of a sink after which it gets no more records."""
MOST = 20
"""Different failures that are told."""


class Watchers:
    """Asks the controller, tells the sinks, and counts what fails. notices: a sentence for each different failure of these."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self.defects: Counter[str] = Counter()
        self.notices: list[str] = []
        self._failed: Counter[int] = Counter()

    def depths(self, views: list[SequenceView]) -> list[int]:
        """How deep the controller would draft each sequence; not at all where it fails."""
        try:
            return [int(w) for w, _ in zip(self.hooks.controller.budget(views), views, strict=True)]
        except Exception as error:
            self._failure("controller", "the controller", error)
            return [0] * len(views)

    def tell(self, record: StepRecord) -> None:
        """Hand out the record of a step."""
        try:
            self.hooks.controller.observe(record)
        except Exception as error:
            self._failure("controller", "the controller", error)
        for sink in self.hooks.sinks:
            if self._failed[id(sink)] < PATIENCE:
                try:
                    sink(record)
                except Exception as error:  # a full disk, say
                    self._failed[id(sink)] += 1
                    self._failure("sink", f"sink {type(sink).__name__}", error)

    def defect(self, kind: str, message: str) -> None:
        """Count a defect and tell whoever listens; what that raises is logged, for a slot may be about to be freed."""
        self.defects[kind] += 1
        if self.hooks.on_defect is not None:
            try:
                self.hooks.on_defect(Defect(kind, message))
            except Exception:
                logger.warning("on_defect failed", exc_info=True)

    def _failure(self, kind: str, who: str, error: Exception) -> None:
        logger.warning("%s failed", who, exc_info=error)
        said = f"{who} failed ({type(error).__name__}: {error})"[:200] + ": mend it; texts go on without it"
        self.defect(kind, said)
        if said not in self.notices and len(self.notices) < MOST:
            self.notices.append(said)
