"""Forwards of heads that follow one another, by the compiled decoder: see `nn.drafts`."""

from __future__ import annotations

import ctypes
import struct
import weakref
from array import array
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.errors import CapacityError
from outrider.nn.ahead import Ahead, address_of
from outrider.nn.drafts import FeaturePointers, Join
from outrider.nn.held import OK, Held, Rounding, fail


class _Block(ctypes.Structure):
    """`SequenceBlock` of sequence.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("norm", "gate_up", "down")]


class _Sequence(ctypes.Structure):
    """`SequencePointers` of sequence.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("hidden", "inner", "layers", "vocab")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("token", "head", "norm")),
        ("block", ctypes.POINTER(_Block)),
        ("features", FeaturePointers),
    ]


_CALL = struct.Struct("2q2Q" + "Qq2Qq2Q")
"""`SequenceCall` of sequence.h: rows, threads; tokens, logits; then its `FeatureRows`."""


class NativeSequence:
    """A level of heads: residual blocks x + down(silu(gate n) * up n), n = norm x, on a token's row plus a state; then outputs.

    fuse: [D, K * H], makes the first level's state of hidden states. table: [V, D] rows of tokens. blocks: of each its norm,
    [gate; up] and down. taps: K. narrow: multiply in bfloat16. rounding: of matrices, None to multiply
    them as they are. A row's numbers have the same bits for any other rows and any number of threads.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        fuse: Float[Tensor, "D F"],
        table: Float[Tensor, "V D"],
        blocks: Sequence[tuple[Tensor, Tensor, Tensor]],
        norm: Float[Tensor, "D"],
        head: Float[Tensor, "V D"],
        taps: int,
        eps: float,
        *,
        narrow: bool = True,
        rounding: Rounding | None = None,
    ) -> None:
        self._held = held = Held(library, torch.bfloat16 if narrow else torch.float32, rounding)
        (self.width, read), self.vocab, self.taps = fuse.shape, len(table), taps
        self.read = read // taps
        self._forward = library.outrider_sequence_forward
        self._feed = address_of(library.outrider_sequence_feed)
        self._forward.argtypes, self._forward.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_int
        library.outrider_sequence_new.argtypes, library.outrider_sequence_new.restype = (
            (ctypes.c_void_p,),
            ctypes.c_void_p,
        )
        library.outrider_sequence_free.argtypes, library.outrider_sequence_free.restype = (ctypes.c_void_p,), None
        self._blocks = (_Block * len(blocks))(
            *(_Block(held.vector(n), held.linear(gate_up), held.linear(down)) for n, gate_up, down in blocks)
        )
        features = FeaturePointers(taps=taps, width=self.read, fuse=held.linear(fuse), join=int(Join.ALONE))
        made = _Sequence(
            self.width, blocks[0][2].shape[1], len(blocks), self.vocab, eps,
            held.table(table), held.product(head, head=True).handle, held.vector(norm), self._blocks, features,
        )  # fmt: skip
        handle = library.outrider_sequence_new(ctypes.addressof(made))
        if not handle:
            raise CapacityError("no memory for the native drafter: set OUTRIDER_NATIVE=0 or use a smaller drafter")
        self._handle: int = handle
        weakref.finalize(self, library.outrider_sequence_free, handle)

    def forward(
        self,
        token: Sequence[int],
        *,
        taps: Float[Tensor, "K n H"] | None = None,
        state: Float[Tensor, "n D"] | None = None,
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n V"]]:
        """States of rows, and logits behind their tokens. taps: hidden states they read; state: instead, states of rows above.

        Raises RequestError for a token that does not exist.
        """
        n = len(token)
        given = taps if taps is not None else state
        wanted = (n, self.width) if taps is None else (self.taps, n, self.read)
        if given is None or given.shape != wanted or not given.is_cpu or not n:
            raise ValueError(f"{n} rows of sequential heads need hidden states or states of shape {wanted}")
        kinds = (torch.float32,) if taps is None else (torch.float32, torch.bfloat16)
        given = (given if given.dtype in kinds else given.float()).contiguous()
        out, logits, tokens = torch.empty(n, self.width), torch.empty(n, self.vocab), array("q", token)
        places, index = array("Q", [t.data_ptr() for t in given]), array("q", range(n))
        feature = 0 if taps is not None else given.data_ptr()
        read = _at(places), _at(index), given.dtype is torch.bfloat16
        call = self._pack(
            n, _at(tokens), logits.data_ptr(), out.data_ptr(), feature, read if taps is not None else (0, 0, False)
        )
        status = self._forward(self._handle, call)
        if status != OK:
            fail(status, self.vocab)
        return out, logits

    def ahead(self, state: Float[Tensor, "n D"]) -> Ahead:
        """Forwards of levels of chains, each behind the one before. state: of the anchors, float32, row by row."""
        threads = array("q", [torch.get_num_threads()])  # `HeadChains` of feed.h
        first, line = state.data_ptr(), 4 * self.width
        states = array("Q", range(first, first + line * len(state), line))
        failed = lambda status: fail(status, self.vocab)  # noqa: E731
        return Ahead(self._feed, self._handle, threads, state, failed, lambda fed: None, states, self.width)

    @staticmethod
    def _pack(n: int, token: int, logits: int, out: int, feature: int, taps: tuple[int, int, bool]) -> bytes:
        """A call on buffers at these addresses. taps: hidden states, rows of them, whether they are bfloat16."""
        return _CALL.pack(n, torch.get_num_threads(), token, logits, 0, 0, *taps, feature, out)


def _at(a: array) -> int:
    return a.buffer_info()[0]
