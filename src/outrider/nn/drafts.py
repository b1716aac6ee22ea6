"""Forwards of learned drafters' layers, on tokens and hidden states, by the compiled decoder.

One call does what a drafter's network does to some rows: it reads hidden states, runs the layers over the drafter's own cache and
gives logits. Weights are multiplied in bfloat16, as folders store them, or in float32; rows between the products are float32. A
row's numbers have the same bits for any other rows of the call and any number of threads.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.errors import CapacityError
from outrider.nn.ahead import Ahead, address_of
from outrider.nn.held import OK, Held, Rounding, fail
from outrider.nn.row_cache import RowCache

_LAYER = ("norm1", "qkv_bias", "q_norm", "k_norm", "norm2", "qkv", "o", "gate_up", "down")


class Join(IntEnum):
    """`Join` of layout.h: how a row's token and feature become what the first layer reads."""

    ALONE, BESIDE, THROUGH = range(3)


class _Layer(ctypes.Structure):
    """`DraftLayer` of drafts.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in _LAYER]


class FeaturePointers(ctypes.Structure):
    """`FeaturePointers` of layout.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("taps", "width")),
        *((name, ctypes.c_void_p) for name in ("fuse", "fused_norm")),
        ("join", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("token_norm", "feature_norm")),
        ("normed_residual", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("joint", "joint_bias")),
        ("outputs", ctypes.c_int64),
        ("support", ctypes.c_void_p),
    ]


class _Model(ctypes.Structure):
    """`DraftModel` of drafts.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "inner", "half")
        ),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("inv_freq", "norm", "embedding", "head")),
        ("layer", ctypes.POINTER(_Layer)),
        ("features", FeaturePointers),
    ]


_CALL = struct.Struct("6q8Q" + "Qq2Qq2Q")
"""`DraftCall` of drafts.h: rows, scored, segments, threads, slots, capacity; eight pointers; then its `FeatureRows`."""


_CHAINS = struct.Struct(_CALL.format + "3Q")
"""`DraftChains` of feed.h: the call; slots, cached, positions."""


@dataclass(frozen=True, slots=True)
class Features:
    """How rows are made of tokens and features, see `FeaturePointers` in layout.h. taps, width: of the hidden states that are read.

    fuse: [D, taps * width], None if the one tap is the feature. fused_norm: of a feature that was read from taps.
    token_norm, feature_norm: for BESIDE, and for THROUGH if both are normed. normed_residual: for BESIDE. joint, joint_bias: for
    THROUGH.
    """

    taps: int
    width: int
    join: Join
    fuse: Tensor | None = None
    fused_norm: Tensor | None = None
    token_norm: Tensor | None = None
    feature_norm: Tensor | None = None
    normed_residual: bool = False
    joint: Tensor | None = None
    joint_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DraftShape:
    """Sizes of a drafter. vocab: the target's. theta: of the rotary positions."""

    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float
    theta: Float[Tensor, "half"]

    @property
    def fits(self) -> bool:
        """Whether heads pair up as the compiled decoder needs."""
        return self.head_dim % 2 == 0 and self.heads % self.kv_heads == 0


@dataclass(slots=True)
class Rows:
    """Rows of one forward, flat.

    segments: per sequence (slot, cached, fed, parents, skipped): `fed` rows behind `cached` kept ones, or nodes with `parents`
    (-1: the context), of which the first `skipped` were written by an earlier forward. scored: rows that logits are wanted of.
    mutual: rows see all rows of their segment.
    """

    token: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    segments: list[tuple[int, int, int, Sequence[int], int]] = field(default_factory=list)
    scored: Sequence[int] = ()
    mutual: bool = False

    def add(
        self,
        slot: int,
        cached: int,
        token: Sequence[int],
        position: Sequence[int],
        parents: Sequence[int] | None = None,
    ) -> None:
        """Rows of one sequence: a chain behind the cached ones, or the last of the nodes with `parents`."""
        fed, above = (len(token), ()) if parents is None else (0, parents)
        self.segments.append((slot, cached, fed, above, len(above) - len(token) if above else 0))
        self.token += token
        self.position += position


def _at(a: array) -> int:
    return a.buffer_info()[0]


class NativeLayers:
    """The layers of a drafter. layers: named as in Llama and Qwen3. norm: before the head, None for none. narrow: bfloat16.

    support: tokens of the head's outputs, None for all. head: its matrix. rounding: of matrices, None to multiply them as they
    are. cache: keys and values must be of `dtype`.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        shape: DraftShape,
        layers: Sequence[nn.Module],
        embedding: Tensor,
        norm: Tensor | None,
        head: Tensor,
        features: Features,
        support: Int[Tensor, "S"] | None = None,
        *,
        narrow: bool = True,
        rounding: Rounding | None = None,
    ) -> None:
        self.shape, self.dtype = shape, torch.bfloat16 if narrow else torch.float32
        self._held = held = Held(library, self.dtype, rounding)
        self._sparse, self._features = support is not None, features
        self._forward = library.outrider_draft_forward
        self._feed = address_of(library.outrider_draft_feed)
        self._forward.argtypes, self._forward.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_int
        library.outrider_draft_new.argtypes, library.outrider_draft_new.restype = (ctypes.c_void_p,), ctypes.c_void_p
        library.outrider_draft_free.argtypes, library.outrider_draft_free.restype = (ctypes.c_void_p,), None
        self.head = held.product(head, head=True)
        s, f = shape, features
        self._layers = (_Layer * len(layers))(*(self._layer(layer, f.join is not Join.BESIDE) for layer in layers))
        made = FeaturePointers(
            f.taps, f.width, held.linear(f.fuse), held.vector(f.fused_norm), int(f.join), held.vector(f.token_norm),
            held.vector(f.feature_norm), int(f.normed_residual), held.linear(f.joint), held.vector(f.joint_bias),
            head.shape[0], held.index(support),
        )  # fmt: skip
        model = _Model(
            s.vocab, s.hidden, len(layers), s.heads, s.kv_heads, s.head_dim, s.inner, int(narrow), s.eps,
            held.vector(s.theta), held.vector(norm), held.table(embedding), self.head.handle, self._layers, made,
        )  # fmt: skip
        handle = library.outrider_draft_new(ctypes.addressof(model))
        if not handle:
            raise CapacityError("no memory for the native drafter: set OUTRIDER_NATIVE=0 or use a smaller drafter")
        self._handle: int = handle
        self._checked: weakref.ref[RowCache] | None = None
        self._table = array("q")
        weakref.finalize(self, library.outrider_draft_free, handle)

    def forward(
        self,
        rows: Rows,
        cache: RowCache,
        *,
        taps: Sequence[Tensor] = (),
        tap_rows: Sequence[int] = (),
        feature: Float[Tensor, "n D"] | None = None,
        out: Float[Tensor, "r D"] | None = None,
    ) -> Float[Tensor, "m V"]:
        """Logits of the scored rows; keys and values are written, and the layers' output to `out`, if there is one.

        taps, tap_rows: the target's hidden states, each [any, width], and the row of them that each row reads. feature: instead,
        what the drafter made itself. Raises RequestError for a token that does not exist, CapacityError for a full cache.
        """
        if self._checked is None or self._checked() is not cache:
            self._check_cache(cache)
        n, m, s = len(rows.token), len(rows.scored), self.shape
        logits = torch.empty(m, s.vocab) if not self._sparse else torch.full((m, s.vocab), -torch.inf)
        held = [(t if t.dtype in (torch.float32, torch.bfloat16) else t.float()).contiguous() for t in taps]
        self._check(n, held, tap_rows, feature, out)
        flat, skips, first = [*rows.token, *rows.position, *rows.scored, *tap_rows], list[int](), 0
        segments = len(flat)
        for slot, cached, fed, parents, skipped in rows.segments:
            flat += (slot, first, cached, fed, len(parents), 0)
            flat += parents
            skips.append(skipped)
            first += fed + len(parents) - skipped
        numbers, places = array("q", flat + skips), array("Q", [t.data_ptr() for t in held])
        at = _at(numbers)
        status = self._forward(self._handle, _CALL.pack(
            n, m, len(skips), torch.get_num_threads(), cache.slots, cache.capacity,
            at, at + 8 * n, at + 16 * n, at + 8 * segments, _at(self._table), cache.k.data_ptr(), cache.v.data_ptr(),
            logits.data_ptr(), at + 8 * len(flat), rows.mutual, _at(places) if held else 0, at + 8 * (2 * n + m),
            held != [] and held[0].dtype is torch.bfloat16,
            0 if feature is None else feature.data_ptr(), 0 if out is None else out.data_ptr(),
        ))  # fmt: skip
        if status != OK:
            fail(status, s.vocab)
        return logits

    def ahead(
        self,
        cache: RowCache,
        slots: Sequence[int],
        position: Sequence[int],
        states: Sequence[Float[Tensor, "D"]],
        logits: Float[Tensor, "r V"],
    ) -> Ahead:
        """Forwards of levels of chains behind what some slots hold, each behind the one before. position: of the first nodes.
        states: what these read, float32. logits: of all of them; what the forwards leave out is filled in."""
        if self._checked is None or self._checked() is not cache:
            self._check_cache(cache)
        if self._sparse:
            logits.fill_(-torch.inf)
        width, vocab, n = self.shape.hidden, self.shape.vocab, 8 * len(slots)
        where = array("q", [*slots, *(cache.length[slot] for slot in slots), *position])
        at = _at(where)
        chains = array("B", _CHAINS.pack(
            0, 0, 0, torch.get_num_threads(), cache.slots, cache.capacity, 0, 0, 0, 0, _at(self._table),
            cache.k.data_ptr(), cache.v.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0, at, at + n, at + 2 * n,
        ))  # fmt: skip
        places = array("Q", [state.data_ptr() for state in states])
        failed = lambda status: fail(status, vocab)  # noqa: E731
        return Ahead(self._feed, self._handle, chains, (where, states), failed, lambda fed: None, places, width)

    def _check_cache(self, cache: RowCache) -> None:
        """A cache is checked once: its shape and type do not change."""
        s = self.shape
        shape = (len(self._layers), cache.slots, s.kv_heads, cache.capacity, s.head_dim)
        for t in (cache.k, cache.v):
            if t.shape != shape or t.dtype != self.dtype or not t.is_cpu or not t.transpose(1, 2).is_contiguous():
                raise ValueError(f"the cache must be a RowCache of {self.dtype} on the CPU of shape {shape}")
        self._table = array("q", range(cache.slots))
        self._checked = weakref.ref(cache)

    def _check(
        self, rows: int, taps: Sequence[Tensor], tap_rows: Sequence[int], feature: Tensor | None, out: Tensor | None
    ) -> None:
        """Nothing outside of the hidden states may be read, or written outside of the output."""
        f = self._features
        own = [t for t in (feature, out) if t is not None]
        fit = bool(taps) or feature is not None or f.join is Join.ALONE  # other layers' inputs are wider than tokens
        fit = fit and all(
            t.shape == (rows, self.shape.hidden) and t.dtype is torch.float32 and t.is_contiguous() for t in own
        )
        if taps:
            shape = (taps[0].shape[0], f.width)
            fit = (
                fit
                and len(taps) == f.taps
                and len(tap_rows) == rows
                and min(tap_rows) >= 0
                and max(tap_rows) < shape[0]
            )
            fit = fit and all(t.shape == shape and t.dtype == taps[0].dtype and t.is_cpu for t in taps)
        if not fit:
            raise ValueError(
                f"a draft's rows need {f.taps} hidden states of {f.width}, or features of {self.shape.hidden}"
            )

    def _layer(self, layer: Any, has_norm: bool) -> _Layer:
        """has_norm: whether `input_layernorm` is the layer's own, and not that of the tokens beside it."""
        attn, mlp = layer.self_attn, layer.mlp
        weight = lambda part: None if part is None else part.weight  # noqa: E731
        q, k, v = (getattr(attn, f"{name}_proj").weight for name in "qkv")
        biases = [getattr(attn, f"{name}_proj").bias for name in "qkv"]
        return _Layer(
            self._held.vector(weight(getattr(layer, "input_layernorm", None)) if has_norm else None),
            self._held.vector(None if biases[0] is None else torch.cat(biases)),
            self._held.vector(weight(getattr(attn, "q_norm", None))),
            self._held.vector(weight(getattr(attn, "k_norm", None))),
            self._held.vector(layer.post_attention_layernorm.weight),
            self._held.linear(torch.cat([q, k, v])),
            self._held.linear(attn.o_proj.weight),
            self._held.linear(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
            self._held.linear(mlp.down_proj.weight),
        )
