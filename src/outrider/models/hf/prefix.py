"""The first blocks of a Hugging Face model with its norm and head: the model's own code, stopped after those blocks."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.errors import CapabilityError
from outrider.models.hf.attention_interface import AttentionInterfacePath
from outrider.models.hf.hooks import HiddenStateHooks
from outrider.protocols import KVCache, Target
from outrider.types import Rows, Scores


class HFPrefix:
    """Implements `protocols.Target` over the first `layers` blocks of `whole`; see `protocols.OpenTarget.prefix`."""

    notices: tuple[str, ...] = ()
    trees = rewinds = True

    def __init__(self, whole: Target, path: AttentionInterfacePath, blocks: nn.ModuleList, layers: int) -> None:
        self._whole, self._path, self._blocks, self.layers = whole, path, blocks, layers
        self.vocab_size, self.hidden_size, self.max_length = whole.vocab_size, whole.hidden_size, whole.max_length
        self.dtype, self.device = whole.dtype, whole.device

    @property
    def token_bytes(self) -> int:
        """See `HFTarget.token_bytes`."""
        return self._path.token_bytes(self.layers)

    def new_kv(self, slots: int, length: int, *, memory: int | None = None) -> KVCache:
        """See `HFTarget.new_kv`."""
        return self._path.new_kv(slots, length, self.layers, memory)

    @torch.no_grad()
    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        """See `protocols.Target`."""
        if any(not 0 <= i <= self.layers for i in layers):
            raise CapabilityError(f"layers {layers} were asked for, this prefix has blocks 1 to {self.layers}")
        *hidden, last = self._path.run_until(rows, kv, HiddenStateHooks(self._blocks, (*layers, self.layers)))
        return Scores(self.unembed(last[rows.scored]), tuple(hidden))

    def embed(self, token: Int[Tensor, "n"]) -> Float[Tensor, "n H"]:
        return self._whole.embed(token)

    def unembed(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        return self._whole.unembed(hidden)
