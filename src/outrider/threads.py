"""One OpenMP thread per core, and a single one for small work. Imports nothing heavy: it must run before torch does.

Threads are not bound to cores. Two processes that bind theirs choose the same cores and wait for each other while other cores are
idle, and a bound thread cannot leave a core to a process that needs all of it. The native decoder ensures that its threads do not
share a core while another is free (models/native/crew.h).
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
from pathlib import Path

_NUMBER = "OMP_NUM_THREADS"
_USERS = (_NUMBER, "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def set_threads(threads: int | None = None) -> bool:
    """Set OMP_NUM_THREADS for this process and its children. An OpenMP runtime reads it once, when it is loaded with torch.

    threads: how many; None for the physical cores this process may run on. Returns whether it was set: not if torch is already
    imported, if the user has set any variable of this kind, or if the system is not Linux.
    """
    if sys.platform != "linux" or "torch" in sys.modules or any(name in os.environ for name in _USERS):
        return False
    os.environ[_NUMBER] = str(threads or usable_cores())
    return True


def thread_notice(threads: int) -> str | None:
    """A sentence if an OpenMP runtime of so many threads does not fit the cores that this process may use."""
    if sys.platform != "linux":
        return None
    cores = usable_cores()
    bound = os.environ.get("OMP_PROC_BIND", "false").lower() not in ("false", "")
    if bound:  # by the user; this thread sees its own core only
        named = os.environ.get("OMP_NUM_THREADS", "")
        cores = min(int(named), quota()) if named.isdigit() else threads
    if threads == cores:
        return None
    remedy = "unset OMP_NUM_THREADS" if "OMP_NUM_THREADS" in os.environ else f"set OMP_NUM_THREADS={cores}"
    if threads < cores:
        return f"decoding uses {threads} of the {cores} cores it may use: {remedy} (or call torch.set_num_threads({cores}))"
    return f"decoding uses {threads} threads on {cores} cores, which wait for each other: set OMP_NUM_THREADS={cores}"


def quota(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole cores that a container's CPU quota allows, at least 1; a large number without a quota."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return max(1, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # also "max": no limit
        return sys.maxsize


def usable_cores() -> int:
    """Physical cores that this process may use, at least 1."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return min(_cores(os.sched_getaffinity(0)), quota())


def _cores(usable: set[int]) -> int:
    """Physical cores of the logical processors `usable`; each processor counts if the system does not report them."""
    cores = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


FEW = 1 << 18
"""Numbers that one thread processes in less than 0.1 ms: hardly more than the cost of starting another thread, which on a busy
machine may begin only milliseconds later, while its part of the work waits."""


class serially:
    """Inside, this thread works alone if `numbers`, the size of the data, is at most FEW. Other threads are not affected.

    It depends only on the size, so that results have the same bits on a busy machine and on an idle one.
    """

    __slots__ = ("_openmp", "_threads")

    def __init__(self, numbers: int) -> None:
        self._openmp, self._threads = _openmp() if numbers <= FEW else None, 1

    def __enter__(self) -> None:
        if self._openmp is not None:
            self._threads = self._openmp.omp_get_max_threads()
            if self._threads > 1:
                self._openmp.omp_set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._openmp is not None and self._threads > 1:
            self._openmp.omp_set_num_threads(self._threads)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded, which determines torch's number of threads; None if torch uses another one."""
    import torch

    try:
        library = ctypes.CDLL(None)
        return library if library.omp_get_max_threads() == torch.get_num_threads() else None
    except (OSError, TypeError, AttributeError):
        return None
