"""The rules' passes over a vocabulary in C++: one read of a row instead of several torch temporaries, no Python per piece.

Every function returns None where it does not apply (no compiler, distributions on a GPU, rows that are not contiguous), and the
caller then uses the plain twin. `OUTRIDER_NATIVE=0` switches them off.
"""

from __future__ import annotations

import ctypes
import os
import struct
from array import array
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from outrider.nn.compiled import PASSES, load
from outrider.noise import Noise
from outrider.types import POINT_MASS, Draft

BELOW_ONE = 1.0 - 2.0**-53


class _Node(ctypes.Structure):
    """`Node` of passes.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("p", "q", "token", "at", "weight", "rest", "taken")),
        *((name, ctypes.c_int64) for name in ("size", "k", "pieces", "points")),
    ]


class Overlap(NamedTuple):
    """Sums over a row of min(w p, q), of max(w p - q, 0), and of min(w p, q)^2 / q."""

    common: float
    rest: float
    square: float


class TransportResult(NamedTuple):
    """Optimal transport at one node.

    taken: for every candidate the probability, given all tokens, that it is chosen and accepted. rest: the residual weights if
    none is. left: their total.
    """

    taken: list[float]
    rest: Float64[Tensor, "1 V"]
    left: float


def overlap(p: Float[Tensor, "1 V"], q: Float[Tensor, "1 V"], w: float) -> Overlap | None:
    """Twin: `outrider.verify.block.overlap_sums`."""
    compiled = _library(p, q)
    if compiled is None:
        return None
    out = (ctypes.c_double * 3)()
    compiled.outrider_overlap(p.data_ptr(), q.data_ptr(), w, p.shape[1], p.dtype == torch.float64, ctypes.byref(out))
    return Overlap(*out)


def draw(p: Float[Tensor, "1 V"], q: Float[Tensor, "1 V"] | None, w: float, u: float) -> tuple[int, float] | None:
    """(token, total): a draw from (w p - q)_+, or from w p without q, by the uniform u. Twin: `as_weights`, `subtract`, `draw`."""
    compiled = _library(p, p if q is None else q)
    if compiled is None:
        return None
    total = ctypes.c_double()
    token = compiled.outrider_draw(
        p.data_ptr(), None if q is None else q.data_ptr(), w, p.shape[1], min(u, BELOW_ONE), p.dtype == torch.float64,
        ctypes.byref(total),
    )  # fmt: skip
    return token, total.value


def transport(
    p: Float[Tensor, "1 V"],
    q: Float[Tensor, "1 V"],
    token: list[int],
    pieces: int,
    rule: tuple[npt.NDArray, npt.NDArray],
) -> TransportResult | None:
    """Twin: `outrider.verify.transport.plain_choice`. rule: points and weights on [-1, 1] that integrate degree k - 1 exactly."""
    compiled = _library(p, q)
    if compiled is None:
        return None
    k = len(token)
    tokens, taken = np.array(token, dtype=np.int64), np.empty(k)
    rest = torch.empty(1, p.shape[1], dtype=torch.float64)
    at, weight = rule
    node = _Node(
        p.data_ptr(), q.data_ptr(), tokens.ctypes.data, at.ctypes.data, weight.ctypes.data, rest.data_ptr(),
        taken.ctypes.data, p.shape[1], k, pieces, len(at),
    )  # fmt: skip
    left = compiled.outrider_transport(ctypes.byref(node), p.dtype == torch.float64)
    return TransportResult(taken.tolist(), rest, left)


_STEP = struct.Struct("11Q2qQ")
"""`Step` of block.h: p, q; counts, token, row; seed, position; taken, next, risk, spread; sequences, size; coin."""


class BlockResult(NamedTuple):
    """Block verification of chains. Per sequence: accepted nodes, the token behind them, and the ledger's risk and spread; or the
    number of a sequence without a distribution to draw from, -1 if there is none."""

    taken: list[int]
    next: list[int]
    risk: list[float]
    spread: list[float]
    broken: int


def block(p: Float[Tensor, "M V"], draft: Draft, noise: Noise) -> BlockResult | None:
    """Twin: `outrider.verify.block.verify_plain`."""
    q = draft.q
    if q is not None and (q.support is not None or q.probs.shape[1] != p.shape[1] or q.probs.dtype != p.dtype):
        return None
    compiled = _library(p, p) if q is None or (q.probs.is_contiguous() and q.probs.device == p.device) else None
    if compiled is None:
        return None
    count, nodes = len(draft.counts), len(draft.parent)
    whole = array(
        "q", [*draft.counts, *draft.tokens, *(q.row if q is not None else (POINT_MASS,) * nodes), *noise.position]
    )
    seed, out, ledger = array("Q", noise.keys), array("q", bytes(16 * count + 8)), array("d", bytes(16 * count))
    coins = array("d") if type(noise) is Noise else array("d", _coins(draft, noise))
    at, found, sums = whole.buffer_info()[0], out.buffer_info()[0], ledger.buffer_info()[0]
    step = _STEP.pack(
        p.data_ptr(), 0 if q is None else q.probs.data_ptr(), at, at + 8 * count, at + 8 * (count + nodes),
        seed.buffer_info()[0], at + 8 * (count + 2 * nodes), found, found + 8 * count, sums, sums + 8 * count, count, p.shape[1],
        coins.buffer_info()[0] if coins else 0,
    )  # fmt: skip
    fine = compiled.outrider_block(step, p.dtype == torch.float64, found + 16 * count)
    taken, final, broken = out[:count].tolist(), out[count : 2 * count].tolist(), out[-1]
    return BlockResult(taken, final, ledger[:count].tolist(), ledger[count:].tolist(), -1 if fine else broken)


def _coins(draft: Draft, noise: Noise) -> list[float]:
    """What a noise of another kind says, in the order of block.h."""
    out: list[float] = []
    for b, n in enumerate(draft.counts):
        out += [noise.uniform(b, depth, "accept") for depth in range(1, n + 1)]
        out += [noise.uniform(b, depth, "final") for depth in range(1, n + 2)]
    return out


def _library(p: Tensor, q: Tensor) -> ctypes.CDLL | None:
    """The compiled passes, if they support these rows."""
    fit = p.dtype == q.dtype and p.dtype in (torch.float32, torch.float64) and p.shape == q.shape
    return library() if fit and p.is_contiguous() and q.is_contiguous() and serve(p) and q.device == p.device else None


def serve(p: Tensor) -> bool:
    """Whether the compiled passes can read p: it is in host memory, and the library is loaded."""
    return p.device.type == "cpu" and os.environ.get("OUTRIDER_NATIVE") != "0" and library() is not None


def notice() -> str | None:
    """A sentence for the user if drafts are verified on the CPU without the compiled passes."""
    if os.environ.get("OUTRIDER_NATIVE") == "0":
        return f"{PASSES.instead}: OUTRIDER_NATIVE is 0; unset it"
    return load(PASSES).notice


@cache
def library() -> ctypes.CDLL | None:
    """The library with the types of its functions."""
    found = load(PASSES).library
    if found is not None:
        pointer, whole, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
        found.outrider_overlap.argtypes = (pointer, pointer, real, whole, flag, pointer)
        found.outrider_overlap.restype = None
        found.outrider_draw.argtypes = (pointer, pointer, real, whole, real, flag, pointer)
        found.outrider_draw.restype = whole
        found.outrider_transport.argtypes = (pointer, flag)
        found.outrider_block.argtypes, found.outrider_block.restype = (ctypes.c_char_p, flag, pointer), flag
        found.outrider_transport.restype = real
    return found
