"""Forwards of compiled code that are known before their tokens are: what a draft's chains need to grow in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """A forward that feeds a level and gives the logits of the next. call: the argument of its function, packed.

    above, feature: addresses of the features of the level before and of where it reads its own; 0: it reads none.
    """

    call: bytes
    above: int = 0
    feature: int = 0


@dataclass(frozen=True, slots=True)
class Ahead:
    """The forwards of all levels but the first.

    forward: address of the compiled function. handle: its first argument. keep: what must live until it has run. fail: raises what
    a status other than 0 means. done: is told, for each sequence of the first step, the tokens that were fed. hidden: numbers of a
    feature.
    """

    forward: int
    handle: int
    steps: Sequence[Step]
    keep: object
    fail: Callable[[int], None]
    done: Callable[[list[list[int]]], None]
    hidden: int = 0


def address_of(function: Any) -> int:
    """Where a function of a library is."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0
