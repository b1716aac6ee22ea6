"""Contiguous KV caches: one row of memory per slot. Keeping a path moves its rows down; dropping rows changes a length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.errors import CapacityError
from outrider.types import Rows


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
        shape = (layers, slots, kv_heads, capacity, head_dim)
        self.k: Tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.v: Tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.slots, self.capacity = slots, capacity
        self.length: list[int] = [0] * slots

    @property
    def bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

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


class ContiguousKV(RowCache):
    """A target's KV cache: a `RowCache` in which rows of a forward are reserved, and then committed.

    Rows of a forward follow the committed ones, in flat order: row i of a segment at place `cached + i`. Rotary positions
    are already applied to the keys and depend on the position, not on the place, so moved keys stay valid.
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
        super().__init__(layers, slots, kv_heads, capacity, head_dim, dtype, device)
        self._end = [0] * slots  # places that this owner has written, kept or not
        self._foreign = [0] * slots  # places below which earlier owners have written

    def reserve(self, rows: Rows) -> None:
        """Raise CapacityError unless every segment continues its slot and fits."""
        check_room(rows, self.length, self.capacity)
        for s in rows.segments:
            self._end[s.slot] = max(self._end[s.slot], s.cached + s.count)

    def clean(self, slot: int, start: int, end: int) -> None:
        """Before places `start` .. `end` of a slot are read, where `start` ends its own content: erase rows of earlier owners.

        A masked place has no effect only if it holds numbers: NaN times zero is NaN. This happens at most once per owner.
        """
        if end > start and self._foreign[slot] > start:
            self.k[:, slot, :, start : self._foreign[slot]] = 0
            self.v[:, slot, :, start : self._foreign[slot]] = 0
            self._foreign[slot] = 0

    def commit(self, rows: Rows, paths: Sequence[Sequence[int]]) -> None:
        """Keep prefixes and accepted paths, in order; all other rows of the forward are dropped."""
        for s, path in zip(rows.segments, paths, strict=True):
            base = s.cached + s.fed
            if list(path) != list(range(len(path))):  # a chain is in place already
                place = torch.tensor([base + i for i in path], device=self.k.device)
                self.k[:, s.slot, :, base : base + len(path)] = self.k[:, s.slot].index_select(2, place)
                self.v[:, s.slot, :, base : base + len(path)] = self.v[:, s.slot].index_select(2, place)
            self.length[s.slot] = base + len(path)

    def truncate(self, slot: int, length: int) -> None:
        check_kept(slot, length, self.length)
        self.length[slot] = length

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._foreign[slot] = max(self._foreign[slot], self._end[slot])
            self.length[slot] = self._end[slot] = 0

    def erase(self, slot: int) -> None:
        """Overwrite a slot: NaN of a broken sequence must not reach others through a masked product."""
        self.k[:, slot] = 0
        self.v[:, slot] = 0
        self._end[slot] = self._foreign[slot] = 0


def check_room(rows: Rows, length: Sequence[int], capacity: int) -> None:
    """Raise CapacityError unless every segment continues its slot, which holds `length[slot]` tokens, and fits."""
    for s in rows.segments:
        if s.cached != length[s.slot]:
            raise CapacityError(f"slot {s.slot} holds {length[s.slot]} tokens, the step expects {s.cached}")
        if s.cached + s.count > capacity:
            raise CapacityError(
                f"slot {s.slot} has room for {capacity} tokens, {s.cached + s.count} are needed: "
                "raise the engine's max_length or shorten the draft"
            )


def check_kept(slot: int, kept: int, length: Sequence[int]) -> None:
    """Raise CapacityError unless a slot can be cut to `kept` tokens."""
    if not 0 <= kept <= length[slot]:
        raise CapacityError(f"slot {slot} holds {length[slot]} tokens, cannot keep {kept}")
