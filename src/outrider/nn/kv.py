"""KV caches: rows of memory for drafters, pages for targets. Keeping a path moves its rows; dropping rows changes a length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.errors import CapacityError
from outrider.nn.memory import lazy_zeros
from outrider.nn.pages import Pages
from outrider.types import Rows

PAGE = 64
"""Places of a page."""
CHUNK = 16
"""Neighbouring tokens whose weight in attention is told as one number."""


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


class PagedKV:
    """A target's KV cache: keys and values [layers, kv_heads, places, head_dim], whose places belong to sequences page by page.

    Rows of a forward follow the committed ones, in flat order: row i of a segment at number `cached + i` of its sequence. Rotary
    positions are already applied to the keys and depend on the position, not on the place, so moved keys stay valid.

    slots, capacity: sequences, and most tokens of each. page: places of a page. limit: pages in all; None: enough for every slot.
    attended: if it is not None, targets that can (the compiled decoder) store in it, for each slot, how much weight the last rows of
    its last forward gave to every `chunk` tokens, summed over rows, heads and layers. Rows with a view of the cache tell nothing.
    On a CPU memory is taken when a page is first used, not before.
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
        *,
        page: int = PAGE,
        limit: int | None = None,
    ) -> None:
        self.slots, self.capacity, self.page = slots, capacity, page
        per_slot = self.pages_for(capacity)
        count = slots * per_slot if limit is None else min(limit, slots * per_slot)
        self.pages = Pages(slots, per_slot, count)
        shape = (layers, kv_heads, count * page, head_dim)
        self.k: Tensor = lazy_zeros(shape, dtype, device)
        self.v: Tensor = lazy_zeros(shape, dtype, device)
        self.length: list[int] = [0] * slots
        self.attended: dict[int, Tensor] | None = None
        self.chunk = CHUNK
        self._table = self.pages.tensor
        self._ruler = torch.arange(page)

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-tokens // self.page)

    # ------------------------------------------------------------------ where things are
    def at(self, slot: Int[Tensor, "*n"], number: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """Places of tokens, given their slots and numbers in their sequences."""
        return self._table[slot, number // self.page] * self.page + number % self.page

    def places(self, slot: int, start: int, end: int) -> slice | Int[Tensor, "n"]:
        """Places of the tokens `start` .. `end` - 1 of a slot: a slice where they lie side by side."""
        first, last = start // self.page, self.pages_for(end)
        pages = self.pages.of(slot)[first:last]
        if not pages:
            return slice(0, 0)
        if pages[-1] - pages[0] == last - first - 1 and all(b - a == 1 for a, b in pairwise(pages)):
            shift = (pages[0] - first) * self.page
            return slice(start + shift, end + shift)
        flat = (torch.tensor(pages)[:, None] * self.page + self._ruler).view(-1)
        return flat[start - first * self.page : end - first * self.page].to(self.k.device)

    def read(self, layer: int, slot: int, end: int) -> tuple[Float[Tensor, "g m D"], Float[Tensor, "g m D"]]:
        """One layer's keys and values of the first `end` tokens."""
        where = self.places(slot, 0, end)
        return self.k[layer][:, where], self.v[layer][:, where]

    def entries(self, slot: int, end: int) -> tuple[Float[Tensor, "L g m D"], Float[Tensor, "L g m D"]]:
        """Keys and values of the first `end` tokens in all layers."""
        where = self.places(slot, 0, end)
        return self.k[:, :, where], self.v[:, :, where]

    def write(
        self, layer: int, slot: int, start: int, k: Float[Tensor, "n g D"], v: Float[Tensor, "n g D"]
    ) -> tuple[Float[Tensor, "g m D"], Float[Tensor, "g m D"]]:
        """Write one layer's rows behind the first `start` tokens and return its keys and values from the first to the last."""
        where = self.places(slot, start, start + len(k))
        self.k[layer][:, where], self.v[layer][:, where] = k.transpose(0, 1), v.transpose(0, 1)
        return self.read(layer, slot, start + len(k))

    # ------------------------------------------------------------------ a forward
    def reserve(self, rows: Rows) -> None:
        """Give every segment's sequence the pages that it needs. Raises CapacityError unless it continues its slot and fits."""
        check_room(rows, self.length, self.capacity)
        for s in rows.segments:
            self.make_room(s.slot, s.cached + s.count)

    def make_room(self, slot: int, tokens: int) -> None:
        """Give a slot the pages for so many tokens."""
        self.pages.grow(slot, self.pages_for(tokens))

    def commit(self, rows: Rows, paths: Sequence[Sequence[int]]) -> None:
        """Keep prefixes and accepted paths, in order; all other rows of the forward are dropped."""
        for s, path in zip(rows.segments, paths, strict=True):
            base = s.cached + s.fed
            if list(path) != list(range(len(path))):  # a chain is in place already
                moved = torch.tensor([[base + i for i in path], list(range(base, base + len(path)))])
                source, goal = self.at(torch.full_like(moved, s.slot), moved).to(self.k.device)
                self.k[:, :, goal] = self.k[:, :, source]
                self.v[:, :, goal] = self.v[:, :, source]
            self.length[s.slot] = base + len(path)

    def truncate(self, slot: int, length: int) -> None:
        """Drop all but the first `length` tokens of a slot."""
        check_kept(slot, length, self.length)
        self.length[slot] = length

    def release(self, slots: Sequence[int]) -> None:
        """Clear these slots."""
        for slot in slots:
            self.length[slot] = 0
            if self.attended is not None:
                self.attended.pop(slot, None)
            for page in self.pages.drop(slot, 0):
                self.pages.give_back(page)

    def erase(self, slot: int) -> None:
        """Overwrite a slot: NaN of a broken sequence must not reach others through a masked product."""
        for page in self.pages.of(slot):
            where = slice(page * self.page, (page + 1) * self.page)
            self.k[:, :, where] = 0
            self.v[:, :, where] = 0


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
