"""What the native decoder is compiled from."""

from __future__ import annotations

import ctypes
from pathlib import Path

from outrider.compiled import Unit, load

DECODER = Unit(
    name="decoder",
    folder=Path(__file__).parent,
    sources=(
        "decoder.cpp",
        "decoder.h",
        "plan.h",
        "crew.h",
        "choice.h",
        "attention.h",
        "linear.h",
        "parallel.h",
        "simd.h",
        "layout.h",
    ),
    threads=True,
    instead="decoding runs on torch",
)


def load_library() -> ctypes.CDLL | None:
    """The compiled decoder, or None, see `outrider.compiled.load`."""
    return load(DECODER)
