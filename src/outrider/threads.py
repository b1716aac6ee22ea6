"""One OpenMP thread per core, bound to it. Imports nothing heavy: it must run before torch does.

Unbound, libgomp now and then puts two of its threads on one core; each then waits for the other's time slice, and an
operation of 0.3 ms takes 8 ms, for seconds on end. An OpenMP runtime reads its binding once, when it is loaded with
torch, so it has to be set in the environment before that.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_OURS = ("OMP_PROC_BIND", "OMP_PLACES", "OMP_NUM_THREADS")
_USERS = (*_OURS, "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def bind_threads(threads: int | None = None) -> bool:
    """Set OMP_PROC_BIND=close, OMP_PLACES=cores and OMP_NUM_THREADS for this process and its children.

    threads: how many; None for the physical cores this process may run on. Returns whether the binding was set: it is
    not if torch is imported already, if the user has set any of these variables (OMP_PROC_BIND=false keeps several
    processes on one machine from being bound to the same core), or where the system is not Linux.
    """
    if sys.platform != "linux" or "torch" in sys.modules or any(name in os.environ for name in _USERS):
        return False
    usable = os.sched_getaffinity(0)
    count = threads or min(_cores(usable), quota())
    os.environ.update(dict(zip(_OURS, ("close", "cores", str(count)), strict=True)))
    return True


def thread_notice(threads: int) -> str | None:
    """A sentence if an OpenMP runtime of so many threads does not fit the cores that this process may use."""
    if sys.platform != "linux":
        return None
    cores = min(_cores(os.sched_getaffinity(0)), quota())
    if os.environ.get("OMP_PROC_BIND", "false").lower() not in (
        "false",
        "",
    ):  # bound, this thread sees its own core only
        named = os.environ.get("OMP_NUM_THREADS", "")
        cores = min(int(named), quota()) if named.isdigit() else threads
    if threads == cores:
        return None
    remedy = "unset OMP_NUM_THREADS" if "OMP_NUM_THREADS" in os.environ else f"set OMP_NUM_THREADS={cores}"
    if threads < cores:
        return f"decoding uses {threads} of the {cores} cores it may use: {remedy} (or call torch.set_num_threads({cores}))"
    return f"decoding uses {threads} threads on {cores} cores, which wait for each other: set OMP_NUM_THREADS={cores}"


def quota(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole cores that a container's CPU quota allows, at least 1; a large number where there is no quota."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return max(1, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # also "max": no limit
        return sys.maxsize


def _cores(usable: set[int]) -> int:
    """Physical cores behind the logical processors `usable`; each processor counts where the system does not say."""
    cores = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
