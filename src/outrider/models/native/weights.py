"""The native decoder's weights: linears behind handles, norms and biases in float32."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.errors import CapacityError, RequestError
from outrider.models.decoder import DecoderWeights, LayerWeights, Segments
from outrider.nn.blocks import KERNELS, Segment, dequantise, named

PLAIN = {torch.float32: named("f32").number, torch.bfloat16: named("bf16").number}
LINEARS = ("qkv", "o", "gate_up", "down")
VECTORS = ("norm1", "qkv_bias", "q_norm", "k_norm", "o_bias", "norm2", "post1", "post2")


class _Segment(ctypes.Structure):
    """`SegmentPointers` of layout.h."""

    _fields_ = [("format", ctypes.c_int64), ("n", ctypes.c_int64), ("data", ctypes.c_void_p)]


class NativeLinear:
    """y = x W^T with the decoder's products; implements `nn.linear.Linear`. Rows of x get the same bits in any company.

    weight: plain float32 or bfloat16 [out, in], read in place; or segments, which are repacked once and can be let go of. packed:
    whether any part is multiplied in blocks. widened: types that have no products here, so that their values are kept in float32.
    Raises CapacityError if there is no memory.
    """

    def __init__(self, library: ctypes.CDLL, weight: Float[Tensor, "O I"] | Segments) -> None:
        parts = [_widened(s) for s in weight] if isinstance(weight, tuple) else [weight]
        self.inputs = parts[0].inputs if isinstance(parts[0], Segment) else parts[0].shape[1]
        self.outputs = sum(p.outputs if isinstance(p, Segment) else p.shape[0] for p in parts)
        self._plain = [p for p in parts if isinstance(p, Tensor)]  # kept: read in place
        self.packed = len(self._plain) < len(parts)
        kinds = {s.block for s in weight} if isinstance(weight, tuple) else set()
        self.widened = {k.name for k in kinds if k.widened}
        segments = (_Segment * len(parts))(*(_pointers(p) for p in parts))
        _declare(library)
        made = library.outrider_linear_new(ctypes.addressof(segments), len(parts), self.inputs, torch.get_num_threads())
        if not made:
            raise CapacityError("no memory for the packed weights: use a smaller model or fewer bits")
        self.handle: int = made
        self._library = library
        weakref.finalize(self, library.outrider_linear_free, made)

    def __call__(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        rows = x.detach().to("cpu", torch.float32).contiguous()
        out = torch.empty(rows.shape[0], self.outputs)
        threads = torch.get_num_threads()
        if self._library.outrider_linear_run(self.handle, rows.data_ptr(), rows.shape[0], threads, out.data_ptr()):
            raise CapacityError("no memory for a product: use fewer or shorter sequences at a time")
        return out.to(x.dtype)

    def add(self, x: Float[Tensor, "n I"], residual: Float[Tensor, "n O"]) -> Float[Tensor, "n O"]:
        return residual + self(x)

    def rows(self, index: Int[Tensor, "n"]) -> Float[Tensor, "n I"]:
        """These rows of W, float32. Raises RequestError for one that does not exist."""
        at = index.to("cpu", torch.int64).contiguous()
        out = torch.empty(at.shape[0], self.inputs)
        if self._library.outrider_linear_rows(self.handle, at.data_ptr(), at.shape[0], out.data_ptr()):
            raise RequestError(f"a token is not in the model's vocabulary of {self.outputs}: check the tokenizer")
        return out


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """A block's linears and vectors by their names in `LayerWeights`; None where the family has none."""

    linears: dict[str, NativeLinear]
    vectors: dict[str, Tensor | None]


@dataclass(frozen=True, slots=True)
class NativeWeights:
    """What forwards read. dtype: of hidden states, keys and values."""

    embedding: NativeLinear
    layers: tuple[NativeLayer, ...]
    norm: Float[Tensor, "H"]
    head: NativeLinear
    dtype: torch.dtype

    @property
    def linears(self) -> list[NativeLinear]:
        return [self.embedding, self.head, *(linear for layer in self.layers for linear in layer.linears.values())]

    @classmethod
    def of(cls, library: ctypes.CDLL, w: DecoderWeights) -> NativeWeights:
        """Blocks are taken one after the other: packed ones are let go of as soon as they are repacked."""
        embedding = NativeLinear(library, w.embedding)
        head = embedding if w.head is w.embedding else NativeLinear(library, w.head)
        return cls(embedding, _layers(library, w.layers), w.norm.float().contiguous(), head, w.dtype)


def _layers(library: ctypes.CDLL, layers: Iterable[LayerWeights]) -> tuple[NativeLayer, ...]:
    out = []
    for layer in layers:
        linears = {name: NativeLinear(library, getattr(layer, name)) for name in LINEARS}
        vectors = {name: getattr(layer, name) for name in VECTORS}
        out.append(NativeLayer(linears, {k: None if v is None else v.float().contiguous() for k, v in vectors.items()}))
    return tuple(out)


def _widened(segment: Segment) -> Segment | Tensor:
    """The segment, its bytes in order; or, of a type without a kernel, its values as plain float32, exactly."""
    block = segment.block
    if block.number in KERNELS:
        return replace(segment, rows=segment.rows.contiguous())
    if block.name == "bf16":
        return segment.rows.view(torch.bfloat16)
    return dequantise(segment.rows, block)


def _pointers(part: Segment | Tensor) -> _Segment:
    if isinstance(part, Segment):
        return _Segment(part.block.number, part.outputs, part.rows.data_ptr())
    return _Segment(PLAIN[part.dtype], part.shape[0], part.data_ptr())


def _declare(library: ctypes.CDLL) -> None:
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.outrider_linear_new.argtypes, library.outrider_linear_new.restype = (pointer, whole, whole, whole), pointer
    library.outrider_linear_free.argtypes, library.outrider_linear_free.restype = (pointer,), None
    library.outrider_linear_run.argtypes = (pointer, pointer, whole, whole, pointer)
    library.outrider_linear_rows.argtypes = (pointer, pointer, whole, pointer)
