"""What the compiled forwards of learned drafters share: the library, the weights it has pointers to, errors."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.errors import CapacityError, RequestError
from outrider.nn.blocks import Segment
from outrider.nn.compiled import DECODER, load
from outrider.nn.large_pages import LargePages
from outrider.nn.products import NativeLinear

OK, BAD_TOKEN, BAD_SEGMENT, NO_ROOM, NO_MEMORY, BAD_ROW = range(6)
"""`Status` of layout.h."""


def library_for(weight: Tensor) -> ctypes.CDLL | None:
    """The compiled decoder, if it can run a network with this weight: float32 on the CPU. OUTRIDER_NATIVE=0 switches it off."""
    if weight.dtype is not torch.float32 or weight.device.type != "cpu" or os.environ.get("OUTRIDER_NATIVE") == "0":
        return None
    return load(DECODER).library


@dataclass(slots=True)
class Rounding:
    """How matrices of trained drafters are rounded to blocks.

    segment: of a matrix [O, I] that rows are multiplied with, and whether it is a head. used: whether a drafter is rounded so.
    """

    segment: Callable[[Tensor, bool], Segment]
    used: bool = False

    def here(self, weight: Tensor) -> Rounding | None:
        """This, for a drafter with such a weight; None where nothing multiplies blocks. Notes that it is used."""
        if library_for(weight) is None:
            return None
        self.used = True
        return self


class Held:
    """What compiled code has pointers to. rounding: of what is multiplied."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, rounding: Rounding | None = None) -> None:
        self._library, self._dtype, self._rounding = library, dtype, rounding
        self._parts: list[object] = []
        self._memory = LargePages()

    def product(self, weight: Tensor | NativeLinear, *, head: bool = False) -> NativeLinear:
        """A linear of this weight, or the one that is given."""
        if isinstance(weight, Tensor):
            if self._rounding is None:
                return self._as_it_is(weight)
            segment = self._rounding.segment(weight.detach().to(self._dtype), head)
            weight = NativeLinear(self._library, (segment,), memory=self._memory)
        self._parts.append(weight)
        return weight

    def table(self, weight: Tensor) -> int:
        """The handle of a linear whose rows are read one by one, and not rounded."""
        return self._as_it_is(weight).handle

    def _as_it_is(self, weight: Tensor) -> NativeLinear:
        made = NativeLinear(self._library, self._memory.copy(weight.detach(), self._dtype))
        self._parts.append(made)
        return made

    def linear(self, weight: Tensor | NativeLinear | None) -> int | None:
        """A linear's handle."""
        return None if weight is None else self.product(weight).handle

    def vector(self, x: Tensor | None) -> int | None:
        """The address of a float32 copy."""
        return None if x is None else self._keep(x.detach().float().contiguous())

    def index(self, x: Tensor | None) -> int | None:
        """The address of an int64 copy."""
        return None if x is None else self._keep(x.long().contiguous())

    def _keep(self, x: Tensor) -> int:
        self._parts.append(x)
        return x.data_ptr()


def fail(status: int, vocab: int) -> None:
    """Raise what a status other than OK means."""
    if status == BAD_TOKEN:
        raise RequestError(f"a token is not in the drafter's vocabulary of {vocab}: check the tokenizer")
    if status == NO_ROOM:
        raise CapacityError(
            "a sequence outgrows its drafter's cache: raise the engine's max_length or shorten the draft"
        )
    if status == NO_MEMORY:
        raise CapacityError("no memory for a draft: use fewer or shorter sequences at a time")
    raise ValueError("the segments of a draft do not describe its rows")
