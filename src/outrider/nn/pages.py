"""The pages of a KV cache: which slot has which, which are free, and how many sequences hold each. Host data only.

A page is a fixed number of neighbouring places. A slot gets pages as its sequence grows, next to its last one where that is free, so
that most sequences lie in one piece and kernels and views need not know of pages at all.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from outrider.errors import CapacityError

FEW = 8
"""Idle pages are given up so many at a time, so that what follows finds neighbours."""


class Pages:
    """`count` pages for `slots` sequences of at most `per_slot` pages each.

    table: [slots * per_slot] page numbers in the order of a slot's tokens, -1 where there is none; its memory never moves.
    held: how many pages each slot has. uses: how many slots hold each page.
    spare: gives up a page that no slot holds but that is not free either, and returns its number; None if there is none.
    """

    def __init__(self, slots: int, per_slot: int, count: int, spare: Callable[[], int | None] = lambda: None) -> None:
        self.per_slot, self.count, self._spare = per_slot, count, spare
        self.table = array("q", [-1]) * max(1, slots * per_slot)
        self.held = [0] * slots
        self.uses = [0] * count
        self._taken = bytearray(count)
        self.free = count
        self._homes = [slot * count // max(1, slots) for slot in range(slots)]

    @property
    def tensor(self) -> Int[Tensor, "slots pages"]:
        """The table; it shares memory with it."""
        return torch.frombuffer(self.table, dtype=torch.int64).view(-1, max(1, self.per_slot))

    def of(self, slot: int) -> array[int]:
        """The pages of a slot, in order."""
        first = slot * self.per_slot
        return self.table[first : first + self.held[slot]]

    def grow(self, slot: int, pages: int) -> None:
        """Give a slot pages until it has so many. Raises CapacityError, with what it has so far, if there are no more."""
        first = slot * self.per_slot
        for i in range(self.held[slot], pages):
            self.table[first + i] = self._take(slot, i)
            self.held[slot] += 1

    def hold(self, slot: int, page: int) -> None:
        """Give a slot a page that is not free, as its next one."""
        self.table[slot * self.per_slot + self.held[slot]] = page
        self.held[slot] += 1
        self.uses[page] += 1

    def replace(self, slot: int, index: int) -> tuple[int, int]:
        """Give a slot a page of its own in place of one that it has; both numbers. The old one has a holder less."""
        old, new = self.table[slot * self.per_slot + index], self._take(slot, index)
        self.table[slot * self.per_slot + index] = new
        self.uses[old] -= 1
        return old, new

    def exchange(self, slot: int, index: int, page: int) -> list[int]:
        """Give a slot a page that is not free in place of one that it has; the old one, if nobody holds it any more."""
        at = slot * self.per_slot + index
        old, self.table[at] = self.table[at], page
        self.uses[page] += 1
        self.uses[old] -= 1
        return [] if self.uses[old] else [old]

    def drop(self, slot: int, kept: int) -> list[int]:
        """Take all but the first pages from a slot; those that nobody holds any more, the last one first. They are not free yet."""
        first, last = slot * self.per_slot + kept, slot * self.per_slot + self.held[slot]
        gone = list(reversed(self.table[first:last]))
        self.table[first:last] = array("q", [-1]) * (last - first)
        self.held[slot] = min(kept, self.held[slot])
        for page in gone:
            self.uses[page] -= 1
        return [page for page in gone if not self.uses[page]]

    def give_back(self, page: int) -> None:
        """A page that nobody holds becomes free."""
        self._taken[page] = 0
        self.free += 1

    def _take(self, slot: int, index: int) -> int:
        """A free page for a slot: the one behind its last one, or its place in the slot's own stretch, or where most are free."""
        for _ in range(FEW if not self.free else 0):
            if (spared := self._spare()) is None:
                break
            self.give_back(spared)
        if not self.free:
            raise CapacityError(
                f"all {self.count} pages of the KV cache are in use: use fewer or shorter sequences at a time, or give it more memory"
            )
        before = self.table[slot * self.per_slot + index - 1] if index else -1
        for page in (before + 1 if index else -1, self._homes[slot] + index):
            if 0 <= page < self.count and not self._taken[page]:
                break
        else:
            page = self._widest()
        self._taken[page], self.uses[page] = 1, 1
        self.free -= 1
        return page

    def _widest(self) -> int:
        """The first page of the longest stretch of free ones."""
        best = max(self._taken.split(b"\1"), key=len)
        return self._taken.find(best) if best else -1
