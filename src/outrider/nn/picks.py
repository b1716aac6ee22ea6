"""Draws and the best entries of rows over a vocabulary, in one native pass; twins of what `drafters.tree.draws` does in torch.

Every function returns None where it does not apply: no compiler, another device or dtype, rows that are not contiguous.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from outrider.nn.compiled import PASSES, load


def draws(
    q: Float[Tensor, "n V"], uniform: Sequence[Sequence[float]], *, replace: bool
) -> tuple[Int[Tensor, "n w"], Float64[Tensor, "n"]] | None:
    """The token that each uniform draws from its row (V if there is none), and the sums of the rows: exactly the twin's.

    replace: independent draws; otherwise each is from what those before it left.
    """
    library = _library(q)
    if library is None:
        return None
    count = len(uniform[0])
    flat = array("d", [u for row in uniform for u in row])
    token, total = torch.empty(len(q), count, dtype=torch.int64), torch.empty(len(q), dtype=torch.float64)
    library.outrider_draws(
        q.data_ptr(), q.dtype is torch.float64, len(q), q.shape[1], flat.buffer_info()[0], count, replace,
        token.data_ptr(), total.data_ptr(),
    )  # fmt: skip
    return token, total


def best(x: Float[Tensor, "n V"], count: int) -> tuple[Int[Tensor, "n w"], Float[Tensor, "n w"]] | None:
    """The `count` largest entries of each row, the largest first, the first of equal ones, and their values.

    A NaN is never among them; where entries are missing the value is NaN.
    """
    library = _library(x)
    if library is None:
        return None
    token, value = torch.empty(len(x), count, dtype=torch.int64), torch.empty(len(x), count, dtype=x.dtype)
    library.outrider_best(
        x.data_ptr(), x.dtype is torch.float64, len(x), x.shape[1], count, token.data_ptr(), value.data_ptr()
    )
    return token, value


def peaks(x: Float[Tensor, "n V"]) -> list[float] | None:
    """The largest entry of each row of float32; NaN if there is one in it."""
    library = _library(x) if x.dtype is torch.float32 else None
    if library is None:
        return None
    count, size = x.shape
    out = array("d", bytes(8 * count))
    library.outrider_peaks(x.data_ptr(), count, size, out.buffer_info()[0])
    return out.tolist()


def distributions(x: Float[Tensor, "n V"], temperature: Sequence[float]) -> Float[Tensor, "n V"] | None:
    """softmax(x / temperature) of each row of float32; at temperature 0 all mass on its first largest entry. The same bits in
    any batch. A row without a finite maximum becomes NaN, or at temperature 0 a point mass."""
    library = _library(x) if x.dtype is torch.float32 else None
    if library is None:
        return None
    out, each = torch.empty_like(x), array("f", temperature)
    count, size = x.shape
    library.outrider_distributions(x.data_ptr(), count, size, each.buffer_info()[0], out.data_ptr())
    return out


def certainty(x: Float[Tensor, "n V"], *, drawn: bool) -> list[float] | None:
    """drawn: of each row, a distribution of float32, the sum of its squares; otherwise, of a row of logits, the probability of its
    most likely token at temperature 1 (NaN where there is none)."""
    library = _library(x) if x.dtype is torch.float32 else None
    if library is None:
        return None
    out = array("d", bytes(8 * len(x)))
    library.outrider_certainty(x.data_ptr(), len(x), x.shape[1], drawn, out.buffer_info()[0])
    return out.tolist()


def chain_library(x: Tensor) -> ctypes.CDLL | None:
    """The library with `outrider_chain` (drafters/tree/chain.py), if it can read these logits."""
    return _library(x) if x.dtype is torch.float32 else None


def _library(x: Tensor) -> ctypes.CDLL | None:
    fit = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous() and x.numel() > 0
    return _loaded() if fit and os.environ.get("OUTRIDER_NATIVE") != "0" else None


@cache
def _loaded() -> ctypes.CDLL | None:
    """The library with the types of its functions."""
    found = load(PASSES).library
    if found is not None:
        pointer, whole, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        found.outrider_draws.argtypes = (pointer, flag, whole, whole, pointer, whole, flag, pointer, pointer)
        found.outrider_best.argtypes = (pointer, flag, whole, whole, whole, pointer, pointer)
        found.outrider_peaks.argtypes = (pointer, whole, whole, pointer)
        found.outrider_distributions.argtypes = (pointer, whole, whole, pointer, pointer)
        found.outrider_certainty.argtypes = (pointer, whole, whole, flag, pointer)
        found.outrider_chain.argtypes, found.outrider_chain.restype = (ctypes.c_char_p,), flag
        several = found.outrider_draws, found.outrider_best, found.outrider_peaks, found.outrider_distributions
        for function in (*several, found.outrider_certainty):
            function.restype = None
    return found
