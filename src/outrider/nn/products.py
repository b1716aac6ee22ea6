"""Linear layers multiplied by the compiled decoder's kernels, for targets and learned drafters."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.errors import CapacityError, RequestError
from outrider.nn.blocks import KERNELS, Segment, dequantise, named
from outrider.nn.large_pages import LargePages

_FULL = "no memory for the packed weights: use a smaller model or fewer bits"
PLAIN = {torch.float32: named("f32").number, torch.bfloat16: named("bf16").number}


class _Segment(ctypes.Structure):
    """`SegmentPointers` of layout.h."""

    _fields_ = [("format", ctypes.c_int64), ("n", ctypes.c_int64), ("data", ctypes.c_void_p)]


class NativeLinear:
    """y = x W^T with the decoder's products; implements `nn.linear.Linear`. Rows of x get the same bits in any company.

    weight: plain float32 or bfloat16 [out, in], read in place; or segments, which are repacked once and can be let go of. packed:
    whether any part is multiplied in blocks. bytes: that a product with all outputs reads. widened: types that have no products
    here, so that their values are kept in float32. twice: inputs of packed parts are rounded to about 16 bits: to 8, and what is
    left of them again. memory: where parts of segments go, beside a model's other ones. Raises CapacityError if there is none.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Float[Tensor, "O I"] | tuple[Segment, ...],
        *,
        twice: bool = False,
        memory: LargePages | None = None,
    ) -> None:
        memory = LargePages() if memory is None else memory
        parts = [_widened(s, memory) for s in weight] if isinstance(weight, tuple) else [weight]
        self.inputs = parts[0].inputs if isinstance(parts[0], Segment) else parts[0].shape[1]
        self.outputs = sum(p.outputs if isinstance(p, Segment) else p.shape[0] for p in parts)
        self._plain = [p for p in parts if isinstance(p, Tensor)]  # kept: read in place
        self.packed = len(self._plain) < len(parts)
        self.bytes = sum(p.rows.numel() if isinstance(p, Segment) else p.nbytes for p in parts)
        kinds = {s.block for s in weight} if isinstance(weight, tuple) else set()
        self.widened = {k.name for k in kinds if k.widened}
        segments = (_Segment * len(parts))(*(_pointers(p) for p in parts))
        _declare(library)
        made = library.outrider_linear_new(ctypes.addressof(segments), len(parts), self.inputs, int(twice))
        if not made:
            raise CapacityError(_FULL)
        self.handle: int = made
        self._library = library
        weakref.finalize(self, library.outrider_linear_free, made)
        self._blocks = self._pack(memory)

    def _pack(self, memory: LargePages) -> Tensor | None:
        """The memory that packed parts lie in."""
        if not self.packed:
            return None
        try:
            blocks = memory.empty((self._library.outrider_linear_bytes(self.handle),), torch.uint8)
        except RuntimeError:  # torch's, for memory that it does not get
            raise CapacityError(_FULL) from None
        self._library.outrider_linear_pack(self.handle, blocks.data_ptr(), torch.get_num_threads())
        return blocks

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


def _widened(segment: Segment, memory: LargePages) -> Segment | Tensor:
    """The segment, its bytes in order; or, of a type without a kernel, its values as plain float32, exactly."""
    block = segment.block
    if block.number in KERNELS:
        return replace(segment, rows=segment.rows.contiguous())
    if block.name == "bf16":
        return memory.copy(segment.rows.view(torch.bfloat16), torch.bfloat16)
    return dequantise(segment.rows, block, memory.empty((segment.outputs, segment.inputs), torch.float32))


def _pointers(part: Segment | Tensor) -> _Segment:
    if isinstance(part, Segment):
        return _Segment(part.block.number, part.outputs, part.rows.data_ptr())
    return _Segment(PLAIN[part.dtype], part.shape[0], part.data_ptr())


def _declare(library: ctypes.CDLL) -> None:
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.outrider_linear_new.argtypes, library.outrider_linear_new.restype = (pointer, *(whole,) * 3), pointer
    library.outrider_linear_bytes.argtypes, library.outrider_linear_bytes.restype = (pointer,), whole
    library.outrider_linear_pack.argtypes, library.outrider_linear_pack.restype = (pointer, pointer, whole), None
    library.outrider_linear_free.argtypes, library.outrider_linear_free.restype = (pointer,), None
    library.outrider_linear_run.argtypes = (pointer, pointer, whole, whole, pointer)
    library.outrider_linear_rows.argtypes = (pointer, pointer, whole, pointer)
