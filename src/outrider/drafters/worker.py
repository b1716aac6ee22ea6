"""A thread that does one task at a time while its owner does something else."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)
Task = TypeVar("Task")


class Worker(Generic[Task]):
    """A thread that does one task at a time, and can be waited for. error: what the last task failed with; off: start no more."""

    def __init__(self, work: Callable[[Task], None]) -> None:
        self._work = work
        self._lock = threading.Condition()
        self._pending: Task | None = None
        self._busy = False
        self._thread: threading.Thread | None = None
        self.error: str | None = None
        self.off = False

    def start(self, task: Task) -> None:
        """Begin a task. The thread begins with the first one; it ends with the process."""
        with self._lock:
            self._pending = task
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="outrider-ahead", daemon=True)
                self._thread.start()
            self._lock.notify_all()

    def pause(self) -> None:
        """Drop a task that has not been begun, and wait for one that has."""
        with self._lock:
            self._pending = None
            self._lock.wait_for(lambda: not self._busy)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._pending is not None)
                task, self._pending, self._busy = self._pending, None, True
            try:
                assert task is not None
                self._work(task)
            except BaseException as error:
                logger.warning("a task beside the step failed", exc_info=True)
                self.error = f"{type(error).__name__}: {error}"[:200]
            finally:
                with self._lock:
                    self._busy = False
                    self._lock.notify_all()
