"""Contiguous keys and values: one row of memory per slot; keeping a path is a copy down, forgetting is a length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.errors import CapacityError
from outrider.types import Rows


class ContiguousKV:
    """Keys and values [layers, slots, kv_heads, capacity, head_dim].

    Rows of a forward stand behind the committed ones, in flat order: row i of a segment at place `cached + i`. Rotary
    positions are in the keys already and depend on position, not on place, so moved keys stay valid.
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
        self._end = [0] * slots  # places that this owner has written, kept or not
        self._foreign = [0] * slots  # places below which earlier owners have written

    @property
    def bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    def reserve(self, rows: Rows) -> None:
        """Raise CapacityError unless every segment continues its slot and fits."""
        for s in rows.segments:
            if s.cached != self.length[s.slot]:
                raise CapacityError(f"slot {s.slot} holds {self.length[s.slot]} tokens, the step expects {s.cached}")
            if s.cached + s.count > self.capacity:
                raise CapacityError(
                    f"slot {s.slot} has room for {self.capacity} tokens, {s.cached + s.count} are needed: "
                    "raise the engine's max_length or shorten the draft"
                )

        for s in rows.segments:
            self._end[s.slot] = max(self._end[s.slot], s.cached + s.count)

    def clean(self, slot: int, start: int, end: int) -> None:
        """Before places up to `end` of a slot are read whose own content ends at `start`: forget what earlier owners left there.

        A masked place counts for nothing only if it holds numbers: NaN times zero is NaN. Each owner pays for this once at most.
        """
        if end > start and self._foreign[slot] > start:
            self.k[:, slot, :, start : self._foreign[slot]] = 0
            self.v[:, slot, :, start : self._foreign[slot]] = 0
            self._foreign[slot] = 0

    def commit(self, rows: Rows, paths: Sequence[Sequence[int]]) -> None:
        """Keep prefixes and accepted paths, in order; every other row of the forward is forgotten."""
        for s, path in zip(rows.segments, paths, strict=True):
            base = s.cached + s.prefix
            if list(path) != list(range(len(path))):  # a chain is in place already
                place = torch.tensor([base + i for i in path], device=self.k.device)
                self.k[:, s.slot, :, base : base + len(path)] = self.k[:, s.slot].index_select(2, place)
                self.v[:, s.slot, :, base : base + len(path)] = self.v[:, s.slot].index_select(2, place)
            self.length[s.slot] = base + len(path)

    def truncate(self, slot: int, length: int) -> None:
        if not 0 <= length <= self.length[slot]:
            raise CapacityError(f"slot {slot} holds {self.length[slot]} tokens, cannot keep {length}")
        self.length[slot] = length

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._foreign[slot] = max(self._foreign[slot], self._end[slot])
            self.length[slot] = self._end[slot] = 0

    def erase(self, slot: int) -> None:
        """Overwrite a slot: what a broken sequence left (NaN) must not reach others through a masked product."""
        self.k[:, slot] = 0
        self.v[:, slot] = 0
        self._end[slot] = self._foreign[slot] = 0
