"""Ctrl-C while libraries are imported."""

from __future__ import annotations

import sys
from typing import Any


class NumpyFirst:
    """A finder that finds no module, and imports NumPy before PyTorch is looked for.

    PyTorch imports NumPy from C++ while it is loaded and takes every error for NumPy's absence, KeyboardInterrupt too: the key
    would be lost, and a server that was told to end would serve, without NumPy.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """None, for `sys.meta_path`."""
        if name == "torch":
            # a new list: the old one is being walked through
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
            import numpy  # noqa: F401


def keep_interrupts() -> None:
    """See to it that Ctrl-C is not lost while PyTorch is imported; to be called before."""
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, NumpyFirst())  # type: ignore[arg-type]
