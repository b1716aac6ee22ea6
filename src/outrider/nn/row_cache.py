"""KV caches of drafters with one layer or a few: a row of memory for each sequence. Dropping rows changes a length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class RowCache:
    """Keys and values [layers, slots, kv_heads, capacity, head_dim]; a slot's rows are at places 0 .. length - 1.

    Rows written after them are temporary: they are read in the same pass and overwritten later.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, kv_heads, slots, capacity, head_dim)  # in memory, as a `PagedKV` with a page for each slot
        self.k: Tensor = torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)
        self.v: Tensor = torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)
        self.slots, self.capacity = slots, capacity
        self.length: list[int] = [0] * slots

    @property
    def bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    @staticmethod
    def size(layers: int, slots: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of such a cache, all of which it takes at once."""
        return 2 * layers * slots * kv_heads * capacity * head_dim * dtype.itemsize

    def write(
        self, layer: int, slot: int, start: int, k: Float[Tensor, "n g D"], v: Float[Tensor, "n g D"]
    ) -> tuple[Float[Tensor, "g m D"], Float[Tensor, "g m D"]]:
        """Write one layer's rows at places start, start + 1, ... and return its keys and values from place 0 to the last."""
        keys, values = self.read(layer, slot, start + len(k))
        keys[:, start:], values[:, start:] = k.transpose(0, 1), v.transpose(0, 1)
        return keys, values

    def read(self, layer: int, slot: int, end: int) -> tuple[Float[Tensor, "g m D"], Float[Tensor, "g m D"]]:
        """One layer's keys and values at places 0 .. end - 1."""
        return self.k[layer, slot, :, :end], self.v[layer, slot, :, :end]

    def append(self, slot: int, k: Float[Tensor, "n L g D"], v: Float[Tensor, "n L g D"]) -> None:
        """Append n rows of all layers."""
        places = slice(self.length[slot], self.length[slot] + len(k))
        self.k[:, slot, :, places], self.v[:, slot, :, places] = k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
        self.length[slot] += len(k)

    def release(self, slots: Sequence[int]) -> None:
        """Clear these slots."""
        for slot in slots:
            self.length[slot] = 0
