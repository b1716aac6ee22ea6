"""Old names, for one release: they work, with a DeprecationWarning that gives the new name. Outrider itself does not use them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that `old` is now `new`. stacklevel: the line shown; 3 is the caller of the function that calls this one."""
    warnings.warn(f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel)


class Renamed:
    """An attribute under its old name: `old = Renamed("new")` in a class body reads `new`."""

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = f"{owner.__name__}.{name}"

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        warn(self.old, f"{type(instance).__name__}.{self.new}")
        return getattr(instance, self.new)


def adopt(part: object, old: str, new: str) -> None:
    """Give a user's part that was written for the last release, and has the attribute `old`, the same value as `new`."""
    value = inspect.getattr_static(part, old, None)
    if value is None or isinstance(value, Renamed):
        return
    warn(f"{type(part).__name__}.{old}", new, stacklevel=4)
    setattr(part, new, getattr(part, old))


def current(value: T, renamed: Mapping[Any, T], what: str) -> T:
    """`value`, or its new name if it is an old one. what: the option it was given for."""
    if value not in renamed:
        return value
    warn(f"{what} {value!r}", repr(renamed[value]), stacklevel=4)
    return renamed[value]
