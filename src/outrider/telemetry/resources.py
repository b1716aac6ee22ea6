"""What this process uses of the machine, read from /proc where there is one."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

STATM = Path("/proc/self/statm")


def memory_bytes() -> int:
    """Resident memory now; where that cannot be read, the most there ever was."""
    try:
        return int(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def cpu_seconds() -> float:
    """Processor time of all threads since the process began."""
    return time.process_time()
