"""Checks free memory before weights or caches are allocated, so that too large a model gives an error, not a killed process."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from outrider.errors import CapacityError
from outrider.nn.large_pages import ask_for

SMALL = 1 << 20
"""Bytes below which memory is taken at once."""
SPARE = 20
"""One part of so many of what is free may be taken before it is needed."""


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can still be allocated on `device`; None if the system does not report it.

    On the CPU: the memory the kernel counts as available, or the rest of the process's control group limit, if that is less.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    known = [n for n in (meminfo(), _control_group()) if n is not None]
    return min(known) if known else None


def require_memory(size: int, device: torch.device, what: str, remedy: str) -> None:
    """Raise CapacityError unless `size` bytes are available for `what`."""
    free = available_memory(device)
    if free is not None and size > free:
        raise CapacityError(f"{what} needs {_readable(size)}, {_readable(free)} are available on {device}: {remedy}")


def require_weights(parameters: int, dtype: torch.dtype, device: torch.device, role: str) -> None:
    """Raise CapacityError unless that many numbers fit. role: the model's role in messages: "target", "draft"."""
    remedy = f"choose a smaller {role} or dtype, or free memory"
    require_memory(parameters * dtype.itemsize, device, f"the weights of the {role}", remedy)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU memory is taken when it is first written, so that room for what may never come costs nothing.

    In large pages, which caches are read faster in, a few numbers here and there take all of it: those are for what is a small part
    of the free memory.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < SMALL:
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise CapacityError(
            f"{_readable(size)} could not be reserved: lower max_length or the number of slots"
        ) from None
    if size <= (available_memory(device) or 0) // SPARE:
        ask_for(room)
    return torch.frombuffer(room, dtype=dtype).view(shape)


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def meminfo() -> int | None:
    """Bytes that the kernel counts as available; None if it does not report them."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _control_group() -> int | None:
    """The rest of a container's memory limit; reclaimable file pages (inactive_file) count as free."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((root / "memory.current").read_text())
        fields = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(fields.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
