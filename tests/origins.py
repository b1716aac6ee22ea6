"""Whose warning is it? Warnings about our own code are errors in every test, those about others' packages are only shown.

`filterwarnings` in pyproject.toml goes by the module that a warning names, which a library chooses by `stacklevel`. One that
warns of a call that we made and forgets to name the caller names itself; `warn_about_caller` names us in its place.
`pytest -W error` makes every warning an error, whoever it is about.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

OURS = ("outrider", "tests", "benchmarks", "recipes", "conftest")
_warn = warnings.warn


def is_ours(module: str) -> bool:
    """Whether this repository holds the module of that name."""
    return module.split(".")[0] in OURS or module.startswith("test_")


def warn_about_caller(message: Any, category: Any = None, stacklevel: int = 1, source: Any = None, **more: Any) -> None:
    """`warnings.warn`, but a function that warns of itself (stacklevel 1) and was called by us warns of our call."""
    issuer = sys._getframe(1)
    caller = issuer.f_back
    names = [frame.f_globals.get("__name__", "") if frame is not None else "" for frame in (issuer, caller)]
    if stacklevel <= 1 and not is_ours(names[0]) and is_ours(names[1]):
        stacklevel = 2
    _warn(message, category, stacklevel + 1, source, **more)
