"""Who performs cells: the contract of executors, and the default one, processes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, runtime_checkable

from outrider.evaluate.sweep.cells import Cell

PATIENCE = 5.0
"""Seconds that a worker has to end by itself."""
WORDS = 300
"""Characters of a dead worker's last words that are told."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something an executor has to say of a submitted cell. what: "started" where it runs; "answer" with plain data; "refused" with
    {error, again}; "lost" with a sentence: its worker or its machine is gone."""

    ticket: int
    what: str
    value: Any


@runtime_checkable
class Executor(Protocol):
    """Performs cells, each at most once for a ticket: it never tries again by itself. Events may come twice, and in any order."""

    def never(self, cell: Cell) -> str | None:
        """Why this cell cannot be placed with all that there is now, also when nothing else runs; None if it can."""
        ...

    def waits(self, cell: Cell) -> str | None:
        """What a submitted cell that has not begun may be waiting for, though nothing of ours runs; None if it has its place."""
        ...

    def room(self, cell: Cell) -> bool:
        """Whether it would begin at once."""
        ...

    def submit(self, ticket: int, cell: Cell) -> None: ...

    def wait(self, seconds: float) -> list[Event]:
        """What has happened, as soon as something has, or nothing after `seconds`."""
        ...

    def cancel(self, ticket: int) -> None:
        """End a cell that runs or waits; nothing more is heard of it, or that it is lost."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


@dataclass(slots=True, eq=False)
class _Worker:
    """One process. words: the file of its stderr. ticket: what it performs; None: it is idle."""

    process: subprocess.Popen[bytes]
    threads: int
    words: Any
    ticket: int | None = None
    rest: bytearray = field(default_factory=bytearray)


class ProcessExecutor:
    """Processes on this machine. A cell of speed runs when nothing else of ours does.

    work: "module:function", called in the processes with a job. workers: most at a time. cores: threads of a cell that names none
    and has the machine to itself; a cell that shares it has one.
    """

    def __init__(self, work: str, workers: int, cores: int) -> None:
        self.work, self.workers, self.cores = work, workers, cores
        self._all: list[_Worker] = []
        self._alone: int | None = None
        self._selector = selectors.DefaultSelector()

    def threads_of(self, cell: Cell) -> int:
        """Threads a cell computes with here."""
        return cell.threads or (self.cores if cell.alone else 1)

    @property
    def busy(self) -> list[_Worker]:
        return [w for w in self._all if w.ticket is not None]

    def never(self, cell: Cell) -> str | None:
        if self.threads_of(cell) > max(self.cores, 1):
            return f"it needs {self.threads_of(cell)} threads, and this machine has {self.cores} cores for it"
        return None

    def waits(self, cell: Cell) -> str | None:
        return None  # its process was started; that it takes long to begin on a busy machine is no want of a place

    def room(self, cell: Cell) -> bool:
        busy = self.busy
        if cell.alone:
            return not busy
        threads = sum(w.threads for w in busy) + self.threads_of(cell)
        return (
            self._alone is None and len(busy) < self.workers and (not busy or threads <= max(self.cores, self.workers))
        )

    def submit(self, ticket: int, cell: Cell) -> None:
        threads = self.threads_of(cell)
        idle = [w for w in self._all if w.ticket is None]
        worker = next((w for w in idle if w.threads == threads), None)
        for other in idle:  # they hold models in memory
            if other is not worker and (cell.alone or (worker is None and len(self._all) >= self.workers)):
                self._end(other)
        worker = worker or self._start(threads)
        worker.ticket = ticket
        self._alone = ticket if cell.alone else self._alone
        line = json.dumps({**cell.job(Path.cwd(), threads), "ticket": ticket}) + "\n"
        assert worker.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died idle: `wait` reports it
            worker.process.stdin.write(line.encode())
            worker.process.stdin.flush()

    def wait(self, seconds: float) -> list[Event]:
        end, events = monotonic() + seconds, list[Event]()
        while not events and (left := end - monotonic()) > 0:
            for key, _ in self._selector.select(left):
                events += self._read(key.data)
            if not self._all:
                return events
        return events

    def cancel(self, ticket: int) -> None:
        for worker in [w for w in self._all if w.ticket == ticket]:
            self._end(worker, kill=True)

    def close(self) -> None:
        for worker in list(self._all):
            self._end(worker, kill=True)
        self._selector.close()

    # ------------------------------------------------------------------ inside
    def _start(self, threads: int) -> _Worker:
        words = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the worker
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "outrider.evaluate.sweep.worker", self.work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            process_group=0,  # Ctrl-C is the driver's
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )
        worker = _Worker(process, threads, words)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        self._all.append(worker)
        return worker

    def _read(self, worker: _Worker) -> list[Event]:
        assert worker.process.stdout is not None
        part = os.read(worker.process.stdout.fileno(), 1 << 20)
        if not part:
            ticket = worker.ticket
            self._end(worker)
            return [] if ticket is None else [Event(ticket, "lost", self._last_words(worker))]
        worker.rest += part
        *lines, rest = worker.rest.split(b"\n")
        worker.rest = bytearray(rest)
        return [self._event(worker, json.loads(line)) for line in lines]

    def _event(self, worker: _Worker, message: Mapping[str, Any]) -> Event:
        ticket = message["ticket"]
        if "started" in message:
            return Event(ticket, "started", f"process {message['started']}")
        worker.ticket = None
        self._alone = None if self._alone == ticket else self._alone
        if "answer" in message:
            return Event(ticket, "answer", message["answer"])
        return Event(ticket, "refused", {"error": message["error"], "again": message["again"]})

    def _last_words(self, worker: _Worker) -> str:
        code = worker.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code and -code in list(signal.Signals) else f"exit code {code}"
        return f"its worker ended ({how})" + (f": {said}" if (said := worker.words) else "")

    def _end(self, worker: _Worker, kill: bool = False) -> None:
        """Forget a worker; its stderr becomes what it said last."""
        self._all.remove(worker)
        self._alone = None if worker.ticket is not None and self._alone == worker.ticket else self._alone
        process = worker.process
        assert process.stdin is not None and process.stdout is not None
        self._selector.unregister(process.stdout)
        if kill:
            process.kill()
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        worker.words.seek(0, os.SEEK_END)
        worker.words.seek(max(0, worker.words.tell() - WORDS))
        said = worker.words.read().decode(errors="replace").strip().splitlines()
        worker.words.close()
        worker.words = said[-1] if said else ""
