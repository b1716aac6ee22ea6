"""The observers of an engine, and failures outside the text itself: they are counted and reported, and end no request."""

from __future__ import annotations

import logging
from collections import Counter

from outrider.engine.parts import Defect, Hooks
from outrider.records import StepRecord
from outrider.types import SequenceView

logger = logging.getLogger(__name__)
MAX_SINK_FAILURES = 3
"""A sink that has failed this often gets no more records."""
MAX_NOTICES = 20
"""At most this many different failures become notices."""


class Watchers:
    """Asks the controller, calls the sinks, and counts their failures. notices: a sentence for each different failure."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self.defects: Counter[str] = Counter()
        self.notices: list[str] = []
        self._failed: Counter[int] = Counter()

    def depths(self, views: list[SequenceView]) -> list[int]:
        """The controller's draft length for each sequence; zeros if it fails."""
        try:
            return [int(w) for w, _ in zip(self.hooks.controller.budget(views), views, strict=True)]
        except Exception as error:
            self._failure("controller", "the controller", error)
            return [0] * len(views)

    def tell(self, record: StepRecord) -> None:
        """Pass the record of a step to the controller and the sinks."""
        try:
            self.hooks.controller.observe(record)
        except Exception as error:
            self._failure("controller", "the controller", error)
        for sink in self.hooks.sinks:
            if self._failed[id(sink)] < MAX_SINK_FAILURES:
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
        message = f"{who} failed ({type(error).__name__}: {error})"[:200] + ": mend it; texts go on without it"
        self.defect(kind, message)
        self.notice(message)

    def notice(self, message: str) -> None:
        """Tell users a sentence, once."""
        if message not in self.notices and len(self.notices) < MAX_NOTICES:
            self.notices.append(message)
