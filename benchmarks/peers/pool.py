"""The worker processes: started once, asked one at a time, and stopped (SIGSTOP) while another one is measured.

A stopped process cannot spin in an OpenMP barrier, poll a queue or collect garbage: one engine has the machine. It cannot see that
its parent is gone either, so that every worker has a `keeper`, which ends it and all that it started.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arms import HERE, Worker
from .keeper import descendants, stat_of


class WorkerError(RuntimeError):
    """A worker answered with an error, ended, or did not answer in time."""


@dataclass(slots=True)
class Running:
    """A started worker."""

    worker: Worker
    process: subprocess.Popen[str]
    keeper: subprocess.Popen[bytes]
    log: Path
    versions: dict[str, str] = field(default_factory=dict)
    load_seconds: float = 0.0
    rss_gb: float = 0.0


def installed(worker: Worker) -> str | None:
    """The version of the distribution a worker needs (the name of its program), or None: the peer is absent."""
    if not worker.python.exists():
        return None
    if worker.program is not None:
        return worker.program.name if worker.program.exists() else None
    code = f"from importlib.metadata import version; print(version({worker.needs!r}))"
    done = subprocess.run([worker.python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def start(worker: Worker, load: Mapping[str, Any], threads: int, logs: Path, timeout: float = 600) -> Running:
    """Start a worker, wait until it has loaded, and stop it. Raises WorkerError."""
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{worker.name}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [worker.python, HERE / worker.script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env=_environment(worker, threads),
            start_new_session=True,
        )
    running = Running(worker, process, kept(process.pid), log)
    try:
        answer = _exchange(running, {**load, "threads": threads, "options": worker.options}, timeout)
    except WorkerError:
        end(running)
        raise
    running.versions, running.load_seconds = answer["versions"], answer["seconds"]
    running.rss_gb = rss_gb(process.pid)
    pause(process.pid)
    return running


def kept(pid: int) -> subprocess.Popen[bytes]:
    """Start the keeper of a worker: its input is open as long as this process lives, however it ends."""
    command = [sys.executable, "-S", "-m", f"{HERE.name}.keeper", str(pid)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, cwd=HERE.parent, start_new_session=True)


def ask(running: Running, command: Mapping[str, Any], warm: Mapping[str, Any], timeout: float = 300) -> dict[str, Any]:
    """Wake a worker, let it warm up untimed, run the command, stop it again. Adds `cpu`: processor seconds that the command took
    in all its threads, those that spin included."""
    pid = running.process.pid
    resume(pid)
    try:
        _exchange(running, warm, timeout)
        before = cpu_seconds(pid)
        found = _exchange(running, command, timeout)
        return {**found, "cpu": cpu_seconds(pid) - before}
    finally:
        running.rss_gb = max(running.rss_gb, rss_gb(running.process.pid))
        pause(running.process.pid)


def end(running: Running, patience: float = 15) -> None:
    """Close a worker's input and wait; kill what is left of its processes."""
    family = descendants(running.process.pid)
    resume(running.process.pid)
    assert running.process.stdin is not None
    with suppress(BrokenPipeError, subprocess.TimeoutExpired):
        running.process.stdin.close()
        running.process.wait(patience)
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    running.keeper.kill()  # before the worker's number is free for another process
    running.process.wait()
    running.keeper.wait()
    assert running.keeper.stdin is not None
    running.keeper.stdin.close()
    if running.process.stdout is not None:
        running.process.stdout.close()


def _environment(worker: Worker, threads: int) -> dict[str, str]:
    """An empty value in the worker's own takes a variable away."""
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    common = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    # GNU's OpenMP may stack both threads on one core unless they are bound; Intel's (vLLM) binds by itself.
    bound = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"} if "LD_PRELOAD" not in worker.env else {}
    for name in ("OMP_PROC_BIND", "OMP_PLACES"):
        keep.pop(name, None)
    return {name: value for name, value in (keep | common | bound | worker.env).items() if value}


def _exchange(running: Running, message: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """One line out, one line back."""
    process, name = running.process, running.worker.name
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(dict(message)) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise WorkerError(f"{name} has ended: see {running.log}") from None
    # A worker writes one line per message, so nothing is ever left in the text buffer for select to miss.
    if not select.select([process.stdout], [], [], timeout)[0]:
        raise WorkerError(f"{name} did not answer within {timeout:.0f} s: see {running.log}")
    line = process.stdout.readline()
    if not line:
        raise WorkerError(f"{name} has ended: see {running.log}")
    answer = json.loads(line)
    if "error" in answer:
        raise WorkerError(f"{name}: {answer['error']}: see {running.log}")
    return answer


def in_turn(
    running: Mapping[str, Running],
    rounds: int,
    order: random.Random,
    command_of: Callable[[int], Mapping[str, Any]],
    warm: Mapping[str, Any],
) -> dict[str, list[dict[str, Any]]]:
    """What the workers answered, by name: a round gives all the same command, in random order. They are ended afterwards.

    command_of: by round; round -1 only warms up. warm: what differs in the untimed run before each.
    """
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    try:
        for turn in range(-1, rounds):
            command = command_of(turn)
            for name in order.sample(list(running), len(running)):
                found = ask(running[name], command, {**command, **warm})
                if turn >= 0:
                    samples[name].append(found)
    finally:
        for process in running.values():
            with suppress(WorkerError):
                end(process)
    return samples


def rss_gb(pid: int) -> float:
    """Resident memory of a process and everything it started, in 10^9 bytes; pages they share count once each."""
    pages = 0
    for member in descendants(pid):
        try:
            pages += int(Path(f"/proc/{member}/statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return pages * os.sysconf("SC_PAGESIZE") / 1e9


def cpu_seconds(pid: int) -> float:
    """Processor time that the living threads of a process and of everything it started have had."""
    spent = 0
    for member in descendants(pid):
        for thread in Path(f"/proc/{member}/task").glob("*/schedstat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                spent += int(thread.read_text().split()[0])
    return spent / 1e9


def pause(pid: int, patience: float = 2.0) -> None:
    """Stop a family, children first, and wait until none of it runs: the signal takes effect a little later."""
    family = descendants(pid)
    for member in reversed(family):
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGSTOP)
    give_up = time.monotonic() + patience
    while any(_state(member) in "RSD" for member in family) and time.monotonic() < give_up:
        time.sleep(0.002)


def resume(pid: int) -> None:
    """Let a family go on, parents first."""
    for member in descendants(pid):
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGCONT)


def _state(pid: int) -> str:
    """One letter: R running, S sleeping, D waiting for a device, T stopped, Z ended."""
    return next(iter(stat_of(pid)), "Z")
