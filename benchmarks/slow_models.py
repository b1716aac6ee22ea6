"""A model whose passes take a known time, in a module that a process of its own can import."""

from __future__ import annotations

import time

from outrider.models.toy import TableTarget


class Slow:
    """A model whose every pass takes `seconds` longer; everything else is the model's own.

    busy: the time goes by in Python, whose lock other threads wait for, as in a pass of many small operators; otherwise in sleep.
    """

    def __init__(self, model: TableTarget, seconds: float, *, busy: bool = False) -> None:
        self._model, self._seconds, self._busy = model, seconds, busy

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "_model":  # not there yet while a pickle is read
            raise AttributeError(name)
        return getattr(self._model, name)

    def forward(self, rows, kv, *, layers=()):
        """The model's pass, later."""
        if not self._busy:
            time.sleep(self._seconds)
        # a thread's own time: it stands still while others have the lock
        end = time.thread_time() + self._seconds * self._busy
        while time.thread_time() < end:
            pass
        return self._model.forward(rows, kv, layers=layers)
