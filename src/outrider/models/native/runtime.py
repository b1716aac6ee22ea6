"""The Python side of the native decoder: pointers in, logits out."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from outrider import isa
from outrider.errors import CapacityError, RequestError
from outrider.models.decoder import DecoderConfig, DecoderWeights
from outrider.models.native.shapes import sizes_of, unlike
from outrider.models.native.weights import LINEARS, VECTORS, NativeWeights
from outrider.nn.ahead import Ahead, address_of
from outrider.nn.compiled import DECODER, load
from outrider.nn.held import BAD_SEGMENT, BAD_TOKEN, NO_MEMORY, NO_ROOM, OK
from outrider.nn.kv import PagedKV
from outrider.nn.products import NativeLinear
from outrider.types import Rows, Scores

WITHOUT_TORCH = ("AVX2", "AVX-VNNI", "generic")
"""Kinds of CPU without bfloat16 products in torch: its emulation is 3 to 5 times slower than ours at any number of rows."""

FEW_ROWS = 32
"""Rows up to which reading the weights takes the time, on any CPU; beyond, torch's products may be faster."""

ROWS = 256
"""The same for CPUs with AVX-512, where our products are 1.3 to 2 times faster at 33 to 128 rows, and equal at 400."""


class _Layer(ctypes.Structure):
    """`LayerPointers` of layout.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*VECTORS, *LINEARS)),
        *((name, ctypes.c_int64) for name in ("window", "turn", "row_norm")),
    ]


_SHAPES = ("turned", "frequencies", "gelu")
_FACTORS = (
    "eps", "rope_scale", "attention_scale", "attention_cap", "embed_scale", "residual_scale", "logit_scale", "logit_cap",
)  # fmt: skip


class _Model(ctypes.Structure):
    """`ModelPointers` of layout.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "inner", "half", *_SHAPES)
        ),
        *((name, ctypes.c_double) for name in _FACTORS),
        *((name, ctypes.c_void_p) for name in ("inv_freq", "norm", "embedding", "head")),
        ("layer", ctypes.POINTER(_Layer)),
        ("clip", ctypes.c_double),
        *(
            (name, ctypes.c_int64)
            for name in ("experts", "experts_used", "expert_inner", "normalised", "shared", "cache")
        ),
        *((name, ctypes.c_double) for name in ("limit", "gain")),
    ]


_CALL = struct.Struct("9q12Qq")
"""`CallPointers` of layout.h: rows, scored, segments, taps, threads, slots, capacity, page, pages; twelve pointers; chunks."""
_CHAINS = struct.Struct(_CALL.format + "2Q")
"""`TokenChains` of feed.h: the call; slots, lengths."""
_CACHES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""`Stored` of layout.h, by the type of a cache's items."""
_PART = 512
"""Keys of a part in attention.h."""


def load_native(config: DecoderConfig, weights: DecoderWeights) -> tuple[NativeDecoder | None, list[str]]:
    """The native decoder for these weights, or None if PyTorch is used instead; and a notice for the user.

    It needs float32 or bfloat16 weights on the CPU and its library (see `outrider.nn.compiled`); the environment variable
    OUTRIDER_NATIVE=0 switches it off. For weights on a GPU there is no notice.
    """
    if not weights.packed and weights.norm.device.type != "cpu":
        return None, []
    library, notice = library_for(config, weights.dtype)
    other = unlike(config, weights) if library is not None else None
    if library is None or other is not None:
        return None, [notice or "" if other is None else f"{DECODER.instead}: {other}"]
    return NativeDecoder(library, config, NativeWeights.of(library, weights)), [] if notice is None else [notice]


def library_for(config: DecoderConfig, dtype: torch.dtype) -> tuple[ctypes.CDLL | None, str | None]:
    """The library if models of this shape and type can be decoded natively on this CPU; a notice if it is missing or slow."""
    reason = _unfit(config, dtype)
    if reason is not None:
        return None, f"{DECODER.instead}: {reason}"
    loaded = load(DECODER)
    if loaded.library is None or loaded.notice is not None:
        return loaded.library, loaded.notice
    return loaded.library, isa.unused(_kind(loaded.library))


def _kind(library: ctypes.CDLL) -> str:
    """The instructions that a decoder's library was compiled for."""
    library.outrider_kind.argtypes, library.outrider_kind.restype = (), ctypes.c_char_p
    return library.outrider_kind().decode()


def _unfit(config: DecoderConfig, dtype: torch.dtype) -> str | None:
    """Why they cannot be decoded natively, with the remedy, in a clause; None if they can."""
    if os.environ.get("OUTRIDER_NATIVE") == "0":
        return "OUTRIDER_NATIVE is 0; unset it"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the weights are {str(dtype).removeprefix('torch.')}; choose dtype float32 or bfloat16"
    if config.head_dim % 2 or config.heads % config.kv_heads:
        return (
            f"{config.heads} heads of {config.head_dim} over {config.kv_heads} do not pair up as the native decoder needs; "
            "choose a model whose heads do, if speed matters"
        )
    return None


class NativeDecoder:
    """Runs forwards of few rows per sequence at the speed of memory.

    A row's logits, hidden states, keys and values have the same bits for any other rows in the call and any number of threads:
    they depend on its token, its position and the keys and values it sees. Plain weights are read in place, packed ones are copied;
    so weights must not be changed afterwards. Calls from several threads take turns.

    kind:     the instructions it was compiled for. max_rows: most rows of one segment for which it is the fastest; more are
              correct, but torch is faster.
    """

    def __init__(self, library: ctypes.CDLL, config: DecoderConfig, weights: NativeWeights) -> None:
        self._library, self._config, self.weights = library, config, weights
        self._touched = array("q", [0] * config.layers)
        self._forward = library.outrider_forward
        self._feed = address_of(library.outrider_feed)
        self._forward.argtypes, self._forward.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_int
        library.outrider_new.argtypes, library.outrider_new.restype = (ctypes.c_void_p,), ctypes.c_void_p
        library.outrider_free.argtypes, library.outrider_free.restype = (ctypes.c_void_p,), None
        self.kind: str = _kind(library)
        packed = any(linear.packed for linear in weights.linears)
        alone = packed or (weights.dtype is torch.bfloat16 and self.kind in WITHOUT_TORCH)
        self.max_rows = sys.maxsize if alone else ROWS if self.kind.startswith("AVX-512") else FEW_ROWS
        self._keep: list[object] = []
        self._handles: dict[torch.dtype, int] = {}  # by the type of a cache's items
        self._handle = self._made(weights.dtype)
        self._checked: weakref.ref[PagedKV] | None = None

    def forward(self, rows: Rows, kv: PagedKV, layers: tuple[int, ...] = ()) -> Scores:
        """Score `rows` and write their keys and values after the cached tokens; see `protocols.Target.forward`.

        kv must hold this model's shapes, or those of more layers, in any type of _CACHES. Hidden states have the type of the
        weights. Raises RequestError for a token outside of the vocabulary, CapacityError for rows that do not fit into the cache.
        """
        if self._checked is None or self._checked() is not kv:
            self._check(kv)
        token, position, scored = _long(rows.token), _long(rows.position), _long(rows.scored)
        n, m = token.shape[0], scored.shape[0]
        if position.shape[0] != n or any(not 0 <= i <= self._config.layers for i in layers):
            raise ValueError(f"rows need one position each and layers in 0..{self._config.layers}")
        logits = torch.empty(m, self._config.vocab_size, dtype=torch.float32)
        hidden = tuple(torch.empty(n, self._config.hidden, dtype=self.weights.dtype) for _ in layers)
        flat, mass = _flat(rows), self._mass(rows, kv)
        numbers, taps = array("q", [*flat, *layers, *(h.data_ptr() for h in hidden)]), len(layers)
        at = numbers.buffer_info()[0]
        tap = at + 8 * len(flat)
        status = self._forward(self._handle, _CALL.pack(
            n, m, len(rows.segments), taps, torch.get_num_threads(), kv.slots, kv.capacity, kv.page, kv.pages.count,
            token.data_ptr(), position.data_ptr(), scored.data_ptr(), at, kv.pages.table.buffer_info()[0], tap, tap + 8 * taps,
            kv.k.data_ptr(), kv.v.data_ptr(), logits.data_ptr(), self._touched.buffer_info()[0],
            0 if mass is None else mass.data_ptr(), 0 if mass is None else mass.shape[-1],
        ))  # fmt: skip
        if status != OK:
            self._fail(status)
        if mass is not None and kv.attended is not None:
            for s, seen in zip(rows.segments, mass.sum(0), strict=True):
                if not s.view:
                    kv.attended[s.slot] = seen[: -(-(s.cached + s.count) // kv.chunk)]
        return Scores(logits, hidden)

    def ahead(
        self, kv: PagedKV, slots: Sequence[int], more: Sequence[int], done: Callable[[list[list[int]]], None]
    ) -> Ahead | None:
        """Forwards that append more[i] tokens to the i-th of some slots, level by level; None where the cache lacks room or is
        watched."""
        if self._checked is None or self._checked() is not kv:
            self._check(kv)
        ends = [kv.length[slot] + n for slot, n in zip(slots, more, strict=True)]
        if kv.attended is not None or max(ends) > kv.capacity:
            return None
        for slot, end in zip(slots, ends, strict=True):
            kv.make_room(slot, end)
        where = array("q", [*slots, *(kv.length[slot] for slot in slots)])
        at = where.buffer_info()[0]
        chains = array("B", _CHAINS.pack(
            0, 0, 0, 0, torch.get_num_threads(), kv.slots, kv.capacity, kv.page, kv.pages.count, 0, 0, 0, 0,
            kv.pages.table.buffer_info()[0], 0, 0, kv.k.data_ptr(), kv.v.data_ptr(), 0,
            self._touched.buffer_info()[0], 0, 0, at, at + 8 * len(slots),
        ))  # fmt: skip
        return Ahead(self._feed, self._handle, chains, where, self._fail, done)

    @property
    def touched(self) -> tuple[int, ...]:
        """Experts that some row of the last forward chose, by layer; 0 for dense ones."""
        return tuple(self._touched)

    def _mass(self, rows: Rows, kv: PagedKV) -> Tensor | None:
        """Where the weights of attention are added up, if somebody wants them."""
        if kv.attended is None or all(s.view for s in rows.segments):
            return None
        parts = max(-(-(s.cached + s.count) // _PART) for s in rows.segments)
        return torch.zeros(self._config.kv_heads, len(rows.segments), parts * (_PART // kv.chunk))

    def first_layers(self, config: DecoderConfig) -> NativeDecoder:
        """A decoder of the first `config.layers` blocks on the same weights."""
        return NativeDecoder(self._library, config, replace(self.weights, layers=self.weights.layers[: config.layers]))

    def head_of(self, kept: Int[Tensor, "K"]) -> NativeLinear:
        """A product with these rows of the head, which are copied."""
        return NativeLinear(self._library, self.weights.head.rows(kept).to(self.weights.dtype))

    def _made(self, items: torch.dtype) -> int:
        """The compiled decoder for caches of such items."""
        if items not in self._handles:
            handle = self._new(self._library, _CACHES[items])
            if not handle:
                raise CapacityError("no memory for the native decoder: set OUTRIDER_NATIVE=0 or use a smaller model")
            self._handles[items] = handle
            weakref.finalize(self, self._library.outrider_free, handle)
        return self._handles[items]

    def _new(self, library: ctypes.CDLL, cache: int) -> int | None:
        c, w = self._config, self.weights
        pointer = lambda t: None if t is None else t.data_ptr()  # noqa: E731
        layers = (_Layer * c.layers)(
            *(
                _Layer(
                    *(pointer(layer.vectors[name]) for name in VECTORS),
                    *(None if linear is None else linear.handle for linear in map(layer.linears.get, LINEARS)),
                    window,
                    c.turn_of(i),
                    int(layer.vectors["q_norm"] is not None and len(layer.vectors["q_norm"]) != c.head_dim),
                )
                for i, (layer, window) in enumerate(zip(w.layers, c.window, strict=True))
            )
        )
        tables = [c.inv_freq] if c.local_freq is None else [c.inv_freq, c.local_freq]
        inv_freq = torch.stack(tables).to("cpu", torch.float32).contiguous()
        self._keep += (layers, inv_freq)  # as all that the decoders have pointers to
        half = int(w.dtype is torch.bfloat16)
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        model = _Model(
            c.vocab_size, c.hidden, c.layers, c.heads, c.kv_heads, c.head_dim, c.inner, half,
            len(c.inv_freq), len(tables), int(c.activation != "silu"), c.eps, c.rope_scale, scale, c.attention_cap,
            c.scale_of_embeddings(w.dtype), c.residual_scale, c.logit_scale, c.logit_cap,
            inv_freq.data_ptr(), w.norm.data_ptr(), w.embedding.handle, w.head.handle, layers,
            c.clip, *sizes_of(c.experts), cache, *((0.0, 1.0) if c.experts is None else (c.experts.limit, c.experts.gain)),
        )  # fmt: skip
        return library.outrider_new(ctypes.addressof(model))

    def _check(self, kv: PagedKV) -> None:
        """A cache is checked once: its shape and type do not change."""
        c = self._config
        shape = (c.kv_heads, kv.pages.count * kv.page, kv.stored.items(c.head_dim))
        for t in (kv.k, kv.v):
            fits = t.shape[1:] == shape and t.shape[0] >= c.layers and t.dtype is kv.stored.dtype
            if not fits or t.dtype not in _CACHES or t.device.type != "cpu" or not t.is_contiguous():
                raise ValueError(
                    f"the cache must be contiguous on the CPU, of shape {(c.layers, *shape)} and one of {list(_CACHES)}"
                )
        self._handle = self._made(kv.stored.dtype)
        self._checked = weakref.ref(kv)

    def _fail(self, status: int) -> None:
        if status == BAD_TOKEN:
            raise RequestError(
                f"a token is not in the model's vocabulary of {self._config.vocab_size}: check the tokenizer"
            )
        if status == NO_ROOM:
            raise CapacityError(
                "a sequence outgrows its cache slot: raise the engine's max_length or shorten the draft"
            )
        if status == NO_MEMORY:
            raise CapacityError("no memory for a forward: use fewer or shorter sequences at a time")
        raise ValueError(
            "the segments do not describe the rows" if status == BAD_SEGMENT else "a scored row is not a row"
        )


def _flat(rows: Rows) -> list[int]:
    """The segments in the layout of layout.h."""
    out: list[int] = []
    for s in rows.segments:
        out += (s.slot, s.first, s.cached, s.fed, len(s.parent), len(s.view))
        out += s.parent
        for part in s.view:
            out += part
    return out


def _long(index: Tensor) -> Tensor:
    """int64 on the CPU, contiguous."""
    if index.dtype is torch.int64 and index.is_cpu and index.is_contiguous():
        return index
    return index.to("cpu", torch.int64).contiguous()
