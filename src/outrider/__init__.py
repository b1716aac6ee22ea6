"""Outrider: exact speculative decoding that proves its exactness and compares its measurements with its own theory.

>>> from outrider import Engine, SamplingParams                                   # doctest: +SKIP
>>> engine = Engine.build(target="path/to/model", draft="path/to/draft")          # doctest: +SKIP
>>> print(engine.generate(["def main("], SamplingParams(max_tokens=64))[0].text)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outrider import moved
from outrider.isa import limit_torch

limit_torch()
moved.install()

if TYPE_CHECKING:
    from outrider.build import Engine, generate, load_drafter
    from outrider.models.load import load_target
    from outrider.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["Engine", "SamplingParams", "generate", "load_drafter", "load_target"]

_HOME = {
    "Engine": "outrider.build",
    "SamplingParams": "outrider.params",
    "generate": "outrider.build",
    "load_drafter": "outrider.build",
    "load_target": "outrider.models.load",
}


def __getattr__(name: str) -> object:
    """Import on first use: `outrider --help` must not wait for torch, and the number of threads is set before torch is imported."""
    if name not in _HOME:
        raise AttributeError(f"module 'outrider' has no attribute {name!r}")
    from importlib import import_module

    from outrider.threads import set_threads

    set_threads()
    return getattr(import_module(_HOME[name]), name)
