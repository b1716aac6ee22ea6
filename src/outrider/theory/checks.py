"""Checks of arguments that the modules of `outrider.theory` share: bad input is a ValueError that names it."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Entry = TypeVar("Entry")
TOLERANCE = 1e-9
"""How far the sum of a distribution may be from one: generous for float64, small enough to catch float32 rows."""


def probabilities(name: str, array: npt.ArrayLike, ndim: int | None = None) -> npt.NDArray[np.float64]:
    """`array` as float64, after checking that it holds distributions along its last axis.

    Args:
        name: what the array is called in the error message.
        array: any shape (..., V), V >= 1; every row along the last axis is finite, not negative, and sums to one
            within `TOLERANCE`. The rows are returned as they are: nothing is normalised.
        ndim: the number of dimensions expected; None accepts any number from one up.

    Raises:
        ValueError: names the array, the first offending value and what was expected.

    >>> probabilities("target", [0.25, 0.75])
    array([0.25, 0.75])
    >>> probabilities("target", [0.25, 0.5])
    Traceback (most recent call last):
    ValueError: target must sum to one along its last axis, got 0.75
    """
    values = real(name, array, ndim)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one outcome along its last axis, got shape {values.shape}")
    if (values < 0).any():
        raise ValueError(f"{name} must not be negative, got {_first(values, values < 0)}")
    sums = values.sum(axis=-1)
    wrong = np.abs(sums - 1.0) > TOLERANCE
    if wrong.any():
        raise ValueError(f"{name} must sum to one along its last axis, got {_first(sums, wrong)}")
    return values


def real(name: str, array: npt.ArrayLike, ndim: int | None = None) -> npt.NDArray[np.float64]:
    """`array` as float64, after checking that it is finite and has `ndim` dimensions.

    >>> real("cost", [1, 2])
    array([1., 2.])
    """
    try:
        values = np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of real numbers, got {array!r}") from error
    if ndim is not None and values.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {values.shape}")
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(f"{name} must be finite, got {_first(values, ~finite)}")
    return values


def positive_int(name: str, value: int, low: int = 1) -> int:
    """`value` as an int, after checking that it is a whole number and at least `low`.

    >>> positive_int("drafts", 3)
    3
    >>> positive_int("drafts", 0)
    Traceback (most recent call last):
    ValueError: drafts must be at least 1, got 0
    """
    if isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {number}")
    return number


def number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a float, after checking that it is finite and within [low, high].

    >>> number("cost", 0.05, low=0.0)
    0.05
    """
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(result):
        raise ValueError(f"{name} must be finite, got {result}")
    if result < low or result > high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {result:g}")
    return result


def fraction(name: str, value: float) -> float:
    """`value` as a float, after checking that it is within [0, 1].

    >>> fraction("budget", 0.1)
    0.1
    """
    return number(name, value, 0.0, 1.0)


def named(what: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """The entry of `table` called `name`, in any case; ValueError lists the names.

    >>> named("link", "PCIe4", {"pcie4": 32})
    32
    """
    found = table.get(name.strip().lower())
    if found is None:
        raise ValueError(f"{what} {name!r} is not in the table; known: {', '.join(table)}")
    return found


def same_shape(name_a: str, a: npt.NDArray[np.float64], name_b: str, b: npt.NDArray[np.float64]) -> None:
    """Raise ValueError unless `a` and `b` have the same shape.

    >>> same_shape("target", np.zeros(3), "draft", np.zeros(2))
    Traceback (most recent call last):
    ValueError: target and draft must have the same shape, got (3,) and (2,)
    """
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have the same shape, got {a.shape} and {b.shape}")


def _first(values: npt.NDArray[np.float64], wrong: npt.NDArray[np.bool_]) -> str:
    """The first offending value, and where it is when there is more than one."""
    if values.ndim == 0:
        return f"{float(values):g}"
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"{float(values[index]):g} at {list(index)}"
