"""A thread that does one task at a time while its owner does something else."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable

logger = logging.getLogger(__name__)
Task = Callable[[], None]


class Worker:
    """A thread that does one task at a time, and can be waited for. error: what the last task failed with; off: start no more.

    The thread begins with the first task and ends when its worker is forgotten; between tasks it keeps nothing of its owner alive.
    """

    def __init__(self) -> None:
        self._desk = _Desk()
        self._thread: threading.Thread | None = None
        self.off = False
        weakref.finalize(self, self._desk.close)

    @property
    def error(self) -> str | None:
        return self._desk.error

    @error.setter
    def error(self, told: str | None) -> None:
        self._desk.error = told

    def start(self, task: Task) -> None:
        """Begin a task."""
        self._desk.put(task)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._desk.work, name="outrider-ahead", daemon=True)
            self._thread.start()

    def pause(self) -> None:
        """Drop a task that has not been begun, and wait for one that has."""
        self._desk.clear()


class _Desk:
    """What a worker and its thread share: the thread knows this alone, so that it does not keep the worker alive."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._pending: Task | None = None
        self._busy = self._closed = False
        self.error: str | None = None

    def put(self, task: Task) -> None:
        """A task for the thread, in place of one that it has not begun."""
        with self._lock:
            self._pending = task
            self._lock.notify_all()

    def clear(self) -> None:
        """Drop a task that has not been begun, and wait for one that has."""
        with self._lock:
            self._pending = None
            self._lock.wait_for(lambda: not self._busy)

    def close(self) -> None:
        """Let the thread end. Waits for nothing: the last reference may be dropped by the thread itself."""
        with self._lock:
            self._pending, self._closed = None, True
            self._lock.notify_all()

    def work(self) -> None:
        """Do tasks until the desk is closed."""
        while (task := self._take()) is not None:
            try:
                task()
            except BaseException as error:
                logger.warning("a task beside the step failed", exc_info=True)
                self.error = f"{type(error).__name__}: {error}"[:200]
            del task  # it holds the owner
            with self._lock:
                self._busy = False
                self._lock.notify_all()

    def _take(self) -> Task | None:
        with self._lock:
            self._lock.wait_for(lambda: self._pending is not None or self._closed)
            task, self._pending = self._pending, None
            self._busy = task is not None
            return task
