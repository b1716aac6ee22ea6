"""What the compiled forwards of learned drafters share: the library, the weights it has pointers to, errors."""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor

from outrider.errors import CapacityError, RequestError
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


class Held:
    """What compiled code has pointers to."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._library, self._dtype = library, dtype
        self._parts: list[object] = []
        self._memory = LargePages()

    def product(self, weight: Tensor | NativeLinear) -> NativeLinear:
        """A linear of this weight, or the one that is given."""
        if isinstance(weight, Tensor):
            weight = NativeLinear(self._library, self._memory.copy(weight.detach(), self._dtype))
        self._parts.append(weight)
        return weight

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
