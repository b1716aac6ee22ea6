"""Old names, for one release: they work, with a DeprecationWarning that gives the new name. Outrider itself does not use them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
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
    """Let a part of a user's that has `old` as a value of its own, from the release before, have it as `new`.

    One that has both at the same place knows the new name, and its `old` is something else. A part with slots cannot have more.
    """
    places = [getattr(part, "__dict__", {}), *map(vars, type(part).__mro__)]
    found = next((place for place in places if old in place), {})
    if isinstance(part, type) or not found or new in found:
        return
    warn(f"{type(part).__name__}.{old}", new, stacklevel=4)
    with suppress(AttributeError):
        object.__setattr__(part, new, getattr(part, old))  # also where it is frozen


def current(value: T, renamed: Mapping[Any, T], what: str) -> T:
    """`value`, or its new name if it is an old one. what: the option it was given for."""
    if value not in renamed:
        return value
    warn(f"{what} {value!r}", repr(renamed[value]), stacklevel=4)
    return renamed[value]
