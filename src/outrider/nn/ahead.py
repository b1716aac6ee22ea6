"""Forwards of compiled code that are known before their tokens are: what a draft's chains need to grow in one call."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ahead:
    """The forwards of all levels of chains but the first.

    forward: address of the compiled function that feeds a level (`Feed` of fed.h). handle: its first argument.
    chains: what it reads of all levels, packed. keep: what must live until they have run. fail: raises what a status other than 0
    means. done: is told, for each sequence, the tokens that were fed. states: addresses of the anchors' features, None for none;
    hidden: numbers of one.
    """

    forward: int
    handle: int
    chains: array
    keep: object
    fail: Callable[[int], None]
    done: Callable[[list[list[int]]], None]
    states: array | None = None
    hidden: int = 0


def address_of(function: Any) -> int:
    """Where a function of a library is."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0
