"""Forwards of heads on one hidden state, by the compiled decoder: see `nn.drafts`."""

from __future__ import annotations

import ctypes
import struct
import weakref
from array import array
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.errors import CapacityError
from outrider.nn.held import OK, Held, Rounding, fail
from outrider.nn.products import NativeLinear


class _Heads(ctypes.Structure):
    """`HeadsPointers` of heads.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("hidden", "levels", "layers", "vocab", "outputs", "shared")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("norm", "block", "bias", "head", "support")),
    ]


_HEADS_CALL = struct.Struct("3q2Q")
"""`HeadsCall` of heads.h."""


class NativeHeads:
    """Logits of several levels from one state: for each, residual blocks x + silu(A x + b) on its norm, then an output matrix.

    blocks: per level its `nn.Linear`s with biases. heads: one output matrix per level, or one for all. norm: None for none.
    support: tokens of the outputs, None for all. narrow: multiply in bfloat16. rounding: of matrices, None to multiply them as they
    are.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        norm: Tensor | None,
        eps: float,
        blocks: Sequence[Sequence[nn.Linear]],
        heads: Sequence[Tensor | NativeLinear],
        vocab: int,
        support: Int[Tensor, "S"] | None = None,
        *,
        narrow: bool = True,
        rounding: Rounding | None = None,
    ) -> None:
        self._held = held = Held(library, torch.bfloat16 if narrow else torch.float32, rounding)
        self.levels, self.vocab, self._sparse = len(blocks), vocab, support is not None
        self._forward = library.outrider_heads_forward
        self._forward.argtypes, self._forward.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_int
        library.outrider_heads_new.argtypes, library.outrider_heads_new.restype = (ctypes.c_void_p,), ctypes.c_void_p
        library.outrider_heads_free.argtypes, library.outrider_heads_free.restype = (ctypes.c_void_p,), None
        layers = [layer for block in blocks for layer in block]
        linears = array("Q", [held.linear(layer.weight) or 0 for layer in layers])
        biases = array("Q", [held.vector(layer.bias) or 0 for layer in layers])
        products = [held.product(head, head=True) for head in heads]
        self.hidden = products[0].inputs
        outputs = array("Q", [head.handle for head in products])
        at = lambda a: a.buffer_info()[0]  # noqa: E731
        made = _Heads(
            self.hidden, self.levels, len(layers) // self.levels, vocab, products[0].outputs, len(heads) == 1, eps,
            held.vector(norm), at(linears), at(biases), at(outputs), held.index(support),
        )  # fmt: skip
        handle = library.outrider_heads_new(ctypes.addressof(made))
        if not handle:
            raise CapacityError("no memory for the native drafter: set OUTRIDER_NATIVE=0 or use a smaller drafter")
        self._handle: int = handle
        weakref.finalize(self, library.outrider_heads_free, handle)

    def __call__(self, state: Float[Tensor, "n H"], levels: int | None = None) -> Float[Tensor, "levels n V"]:
        """Logits of the first `levels` levels (None: all) for states before the norm."""
        state, count = state.float().contiguous(), levels or self.levels
        if state.dim() != 2 or state.shape[1] != self.hidden or not state.is_cpu:
            raise ValueError(f"heads read hidden states of {self.hidden} on the CPU, not {tuple(state.shape)}")
        size = (count, len(state), self.vocab)
        logits = torch.full(size, -torch.inf) if self._sparse else torch.empty(size)
        call = _HEADS_CALL.pack(len(state), count, torch.get_num_threads(), state.data_ptr(), logits.data_ptr())
        status = self._forward(self._handle, call) if len(state) else OK
        if status != OK:
            fail(status, self.vocab)
        return logits
