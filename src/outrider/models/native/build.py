"""The native decoder's library."""

from __future__ import annotations

import ctypes

from outrider.nn.compiled import DECODER, load


def load_library() -> ctypes.CDLL | None:
    """The decoder, or None; see `outrider.nn.compiled.load`."""
    return load(DECODER).library
