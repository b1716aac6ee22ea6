"""Access to an engine: one thread at a time, in order of arrival, and only in the process that built it."""

from __future__ import annotations

import os
import threading
from collections import deque
from types import TracebackType

import torch

from outrider.errors import CapabilityError

_SPAWN = (
    "start the process with multiprocessing's 'spawn' (multiprocessing.get_context('spawn'), or set_start_method('spawn')) and "
    "build the engine there"
)
_used: set[int] = set()
"""The process that has built an engine; after a fork the child finds its parent's number here."""


class Turns:
    """A fair, reentrant lock: threads get it in the order they asked for it.

    Entering raises CapabilityError in a process forked from the one that made it: the compute threads do not exist after a fork,
    and waiting for them would block for ever.
    """

    def __init__(self) -> None:
        check_process()
        self._process = os.getpid()
        _used.add(self._process)
        self._door = threading.Lock()
        self._queue: deque[threading.Lock] = deque()
        self._owner: int | None = None
        self._depth = 0

    @property
    def waiting(self) -> int:
        """How many threads wait for their turn."""
        return len(self._queue)

    def __enter__(self) -> None:
        if os.getpid() != self._process:
            raise CapabilityError(
                f"this engine was built before its process was forked, and cannot compute here: {_SPAWN}"
            )
        me = threading.get_ident()
        if self._owner == me:
            self._depth += 1
            return
        turn = (
            threading.Lock()
        )  # allocated outside `_door`: a garbage collection inside it could run a finaliser that takes the same lock
        turn.acquire()
        with self._door:
            if self._owner is None:
                self._owner = me
                return
            self._queue.append(turn)
        self._wait(turn)
        self._owner = me

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._depth:
            self._depth -= 1
        else:
            self._hand_over()

    def _wait(self, turn: threading.Lock) -> None:
        try:
            turn.acquire()
        except BaseException:  # an interrupt: leave the queue, or pass the turn on if it has just been granted
            with self._door:
                waiting = turn in self._queue
                if waiting:
                    self._queue.remove(turn)
            if not waiting:
                self._hand_over()
            raise

    def _hand_over(self) -> None:
        with self._door:
            if self._queue:
                self._owner = -1  # taken: the next in the queue has it
                self._queue.popleft().release()
            else:
                self._owner = None


def check_process() -> None:
    """Raise CapabilityError in a process forked from one that computed with an engine: the compute threads do not exist here.

    A process with one compute thread needs no others, and may build engines of its own.
    """
    if _used and os.getpid() not in _used and torch.get_num_threads() > 1:
        raise CapabilityError(f"this process was forked from one that has used an engine, and cannot compute: {_SPAWN}")
