"""Memory in pages of 2 MiB instead of 4 KiB, where the system has them (Linux, transparent huge pages not switched off).

A step of decoding reads all weights once, front to back. In small pages an address has to be looked up every 4 KiB (in a virtual
machine twice, one look-up inside of the other), and processors stop reading ahead at the end of a page. docs/machine.md has
what large pages gain. They change where numbers lie, and no number.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

LARGE = 2 << 20
"""Bytes of a large page."""
CHUNK = 128 << 20
"""Bytes of address space that are reserved at a time. They take no memory until they are written."""
LEAST = 64 << 10
"""Smaller pieces are left to malloc."""
ALIGNED = 64
_SMALL = mmap.PAGESIZE
_AT_ONCE = 64 * LARGE
_COLLAPSE = 25  # MADV_COLLAPSE, since Linux 6.1
_OWN = np.uint64(
    1 << 63 | 1 << 56
)  # in pagemap: present, and mapped by this process alone (which the page of zeros is not)


def wanted() -> bool:
    """Whether this process asks the system for large pages: OUTRIDER_LARGE_PAGES=0 switches it off."""
    return sys.platform == "linux" and os.environ.get("OUTRIDER_LARGE_PAGES") != "0"


def ask_for(room: mmap.mmap) -> None:
    """Have the system take large pages for a range when it is written first."""
    if wanted():
        with suppress(OSError):  # a kernel without large pages
            room.madvise(mmap.MADV_HUGEPAGE)


class LargePages:
    """Memory for tensors that live about as long as one another, such as a model's weights: pieces of chunks in large pages.

    A matrix of its own is often smaller than a large page, and two of them seldom lie in one. A chunk is given back when the last
    tensor in it is gone. Not for use by several threads.
    """

    def __init__(self) -> None:
        self._chunk: Tensor | None = None
        self._used = 0

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Shaped[Tensor, "..."]:
        """As `torch.empty`: numbers are whatever they are. On a CPU the first one is aligned to 64 bytes."""
        size = dtype.itemsize * torch.Size(shape).numel()
        if torch.device(device).type != "cpu" or size < LEAST or not wanted():
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        if self._chunk is None or self._used + size > len(self._chunk):
            self._chunk, self._used = _chunk(max(size, CHUNK)), 0
        if self._chunk is None:  # the system has no room for a whole chunk
            return torch.empty(tuple(shape), dtype=dtype)
        piece = self._chunk[self._used : self._used + size]
        self._used = -(-(self._used + size) // ALIGNED) * ALIGNED
        return piece.view(dtype).view(tuple(shape))

    def copy(self, x: Shaped[Tensor, "..."], dtype: torch.dtype) -> Shaped[Tensor, "..."]:
        """The same numbers in another type."""
        return self.empty(x.shape, dtype, x.device).copy_(x)


def _chunk(size: int) -> Tensor | None:
    """Bytes that begin with a large page and end with one; None if there is no such room."""
    size = -(-size // LARGE) * LARGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        room = mmap.mmap(-1, size + LARGE, flags=flags)
    except OSError:
        return None
    ask_for(room)
    every = torch.frombuffer(room, dtype=torch.uint8)
    before = -every.data_ptr() % LARGE
    return every[before : before + size]


class Gathered(NamedTuple):
    """bytes: that lie in large pages now and did not before. of: that could have."""

    bytes: int
    of: int


def gather(seconds: float = 30.0) -> Gathered:
    """Move what this process has in memory into large pages, wherever it was allocated: for weights of others' libraries.

    The system copies it, 2 to 6 s a GB, and needs Linux 6.1; elsewhere nothing is done. Memory that is not written in full stays as
    it is, so that none is taken that was not before. seconds: what is not moved by then stays where it is, too.
    """
    if not wanted():
        return Gathered(0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    of, before, end_by = 0, _in_large_pages(), time.monotonic() + seconds
    with suppress(OSError), Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
        for start, end, large in _own():
            stretches = list(_stretches(pages, start, end))
            of += max(sum(count for _, count in stretches) * LARGE - large, 0)
            for first, count in stretches:
                for at in range(first, first + count * LARGE, _AT_ONCE):
                    if time.monotonic() < end_by:  # it fails if one of them could not be moved; the others are
                        libc.madvise(at, min(_AT_ONCE, first + count * LARGE - at), _COLLAPSE)
    return Gathered(max(_in_large_pages() - before, 0), of)


def _in_large_pages() -> int:
    """Bytes of this process."""
    with suppress(OSError):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("AnonHugePages:"):
                return int(line.split()[1]) << 10
    return 0


def _own() -> Iterator[tuple[int, int, int]]:
    """Ranges in anonymous memory that begin and end with a large page, and how many bytes of them lie in large pages already, where
    not all do."""
    found: dict[str, Any] = {}
    for line in [*Path("/proc/self/smaps").read_text().splitlines(), "0-0 end"]:
        name, _, rest = line.partition(" ")
        if name.endswith(":"):
            found[name[:-1]] = rest.split()
            continue
        size, large = (int(found.get(key, ["0"])[0]) << 10 for key in ("Anonymous", "AnonHugePages"))
        start, end = found.get("range", (0, 0))
        if end - start >= LARGE and size - large >= LARGE:
            yield start, end, large
        low, high = (int(n, 16) for n in name.split("-"))
        words = rest.split()
        mine = len(words) > 3 and words[0].startswith("rw-p") and words[3] == "0"
        found = {"range": (-(-low // LARGE) * LARGE, high // LARGE * LARGE)} if mine else {}


def _stretches(pages: Any, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Neighbouring large pages of which every small one is written: where they begin, and how many they are."""
    each = LARGE // _SMALL
    pages.seek(start // _SMALL * 8)
    flags = np.frombuffer(pages.read((end - start) // _SMALL * 8), dtype=np.uint64)
    full = ((flags[: len(flags) // each * each] & _OWN) == _OWN).reshape(-1, each).all(1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], full, [False])).astype(np.int8)))
    for first, after in edges.reshape(-1, 2).tolist():
        yield start + first * LARGE, after - first
