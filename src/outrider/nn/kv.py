"""KV caches in pages, shared by sequences that begin alike. Keeping a path moves its rows; dropping rows changes a length."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from outrider.errors import CapacityError
from outrider.nn.memory import available_memory, lazy_zeros, require_memory
from outrider.nn.pages import Pages
from outrider.nn.prefixes import Prefixes
from outrider.nn.stored import Plain, Stored
from outrider.types import Rows

PAGE = 64
"""Places of a page."""
CHUNK = 16
"""Neighbouring tokens whose weight in attention is told as one number."""


class PagedKV:
    """A target's KV cache: keys and values [layers, kv_heads, places, items], whose places belong to sequences page by page.

    Rows of a forward follow the committed ones, in flat order: row i of a segment at number `cached + i` of its sequence. Rotary
    positions are already applied to the keys and depend on the position, not on the place, so moved keys stay valid.

    dtype: of the numbers that are written and read. stored: how they lie in memory; None: as they are (items are head_dim numbers).
    slots, capacity: sequences, and most tokens of each. page: places of a page. limit: pages in all; None: enough for every slot.
    attended: if it is not None, targets that can (the compiled decoder) store in it, for each slot, how much weight the last rows
    of its last forward gave to every `chunk` tokens, over all rows, heads and layers. Rows with a view tell nothing.
    On a CPU memory is taken when a page is first used, not before (see `nn.memory.lazy_zeros` for small caches).

    Full pages may be shared: `publish` makes those of a sequence known by their tokens, `share` gives them to another one that
    begins with the same tokens. Nobody writes into a shared page: who has to gets a copy. Known pages that no sequence holds stay
    until their place is needed.
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
        stored: Stored | None = None,
    ) -> None:
        self.slots, self.capacity, self.page = slots, capacity, page
        self.head_dim, self.dtype, self.stored = head_dim, dtype, Plain(dtype) if stored is None else stored
        per_slot = self.pages_for(capacity)
        count = slots * per_slot if limit is None else min(limit, slots * per_slot)
        self.prefixes = Prefixes(page)
        self.pages = Pages(slots, per_slot, count, self.prefixes.spare)
        self._known = [0] * slots  # how many of a slot's first pages are indexed
        shape = (layers, kv_heads, count * page, self.stored.items(head_dim))
        self.k: Tensor = lazy_zeros(shape, self.stored.dtype, device)
        self.v: Tensor = lazy_zeros(shape, self.stored.dtype, device)
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
        return self.unpack(self.k[layer][:, where]), self.unpack(self.v[layer][:, where])

    def entries(self, slot: int, end: int) -> tuple[Float[Tensor, "L g m D"], Float[Tensor, "L g m D"]]:
        """Keys and values of the first `end` tokens in all layers."""
        where = self.places(slot, 0, end)
        return self.unpack(self.k[:, :, where]), self.unpack(self.v[:, :, where])

    def unpack(self, stored: Shaped[Tensor, "*n items"]) -> Float[Tensor, "*n D"]:
        """A part of `k` or `v` as numbers; a view where they are stored as they are."""
        return self.stored.unpack(stored, self.dtype)

    def put(
        self, layer: int, where: slice | Int[Tensor, "n"], k: Float[Tensor, "n g D"], v: Float[Tensor, "n g D"]
    ) -> None:
        """Write one layer's rows at these places."""
        self.k[layer][:, where] = self.stored.pack(k.transpose(0, 1))
        self.v[layer][:, where] = self.stored.pack(v.transpose(0, 1))

    def write(
        self, layer: int, slot: int, start: int, k: Float[Tensor, "n g D"], v: Float[Tensor, "n g D"]
    ) -> tuple[Float[Tensor, "g m D"], Float[Tensor, "g m D"]]:
        """Write one layer's rows behind the first `start` tokens and return its keys and values from the first to the last."""
        self.put(layer, self.places(slot, start, start + len(k)), k, v)
        return self.read(layer, slot, start + len(k))

    # ------------------------------------------------------------------ a forward
    def reserve(self, rows: Rows) -> None:
        """Give every segment's sequence the pages that it needs. Raises CapacityError unless it continues its slot and fits."""
        check_room(rows, self.length, self.capacity)
        for s in rows.segments:
            self.make_room(s.slot, s.cached + s.count)

    def make_room(self, slot: int, tokens: int) -> None:
        """Give a slot the pages for so many tokens, and a copy of its last one if that is shared: it will be written to."""
        start = self.length[slot]
        if start % self.page and self._is_shared(slot, start // self.page):
            old, new = self.pages.replace(slot, start // self.page)
            source, goal = (slice(page * self.page, (page + 1) * self.page) for page in (old, new))
            self.k[:, :, goal], self.v[:, :, goal] = self.k[:, :, source], self.v[:, :, source]
            self._known[slot] = min(self._known[slot], start // self.page)
            if not self.pages.uses[old]:
                self._put_aside([old])
        self.pages.grow(slot, self.pages_for(tokens))

    def lacking(self, slot: int, tokens: int) -> int:
        """Pages that a slot must get before it can hold so many tokens."""
        start = self.length[slot]
        copied = start % self.page and self._is_shared(slot, start // self.page)
        return max(0, self.pages_for(tokens) - self.pages.held[slot]) + bool(copied)

    def needed(self, tokens: Sequence[int], more: int, root: Hashable = None) -> int:
        """Pages that a sequence of these tokens and `more` others would take: those in use by others with the same beginning count
        nothing."""
        found = self.prefixes.find(root, tokens)
        return self.pages_for(len(tokens) + more) - sum(self.pages.uses[page] > 0 for page in found)

    @property
    def spare(self) -> int:
        """Pages that slots can still get."""
        return self.pages.free + self.prefixes.idle

    @property
    def usage(self) -> float:
        """Share of all pages that slots hold, 0 .. 1."""
        return 1.0 - self.spare / self.pages.count

    def _is_shared(self, slot: int, index: int) -> bool:
        page = self.pages.table[slot * self.pages.per_slot + index]
        return self.pages.uses[page] > 1 or page in self.prefixes

    def _put_aside(self, pages: Iterable[int]) -> None:
        """Pages that nobody holds any more rest if they are known, and are free otherwise."""
        for page in pages:
            if page in self.prefixes:
                self.prefixes.rest(page)
            else:
                self.pages.give_back(page)

    # ------------------------------------------------------------------ sharing
    def share(self, slot: int, tokens: Sequence[int], root: Hashable = None, step: int = 1) -> int:
        """Give a slot the pages of others for what follows in its sequence, as far as they are known; the tokens that it has now.

        The last one of `tokens` is never among them, since whoever asks wants its logits. root: as in `publish`. step: the number
        of tokens becomes a multiple of it (1: any number). Only for a slot with full pages, all of them published, or none.
        """
        have, most = self.length[slot], len(tokens) - 1
        held = have // self.page
        if have % self.page or held != self._known[slot] or have >= most:
            return have
        found = self.prefixes.find(root, tokens)
        end = min(len(found) * self.page, most) // step * step
        if end <= have or list(self.pages.of(slot)[:held]) != found[:held]:
            return have
        self._put_aside(self.pages.drop(slot, held))
        for page in found[held : self.pages_for(end)]:
            self.pages.hold(slot, page)
            self.prefixes.wake(page)
        self.length[slot], self._known[slot] = end, self.pages_for(end)
        return end

    def publish(self, slot: int, tokens: Sequence[int], root: Hashable = None) -> None:
        """Make a slot's full pages known. tokens: those that it holds, or their beginning: pages beyond them stay its own.

        root: sequences share pages only with those of the same root. Where others have published the same tokens meanwhile, the
        slot uses their pages and gives its own back.
        """
        full = min(len(tokens), self.length[slot]) // self.page
        known = self._known[slot]
        if full <= known:
            return
        own = self.pages.of(slot)[:full]
        for i, page in enumerate(self.prefixes.add(root, own, known, tokens[: full * self.page])):
            if page != own[i]:
                self.prefixes.wake(page)
                self._put_aside(self.pages.exchange(slot, i, page))
        self._known[slot] = full

    def fork(self, source: int, goal: int, length: int) -> None:
        """Let a slot begin with the first `length` tokens of another one, in the same pages; who writes into the last gets a copy.

        What the goal held is dropped. Raises CapacityError if the source holds fewer tokens.
        """
        check_kept(source, length, self.length)
        self.release([goal])
        for page in self.pages.of(source)[: self.pages_for(length)]:
            self.pages.hold(goal, page)
        self.length[goal], self._known[goal] = length, min(self._known[source], length // self.page)

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
        self._known[slot] = min(self._known[slot], length // self.page)
        self._put_aside(self.pages.drop(slot, self.pages_for(length)))

    def release(self, slots: Sequence[int]) -> None:
        """Clear these slots. What they have published stays known."""
        for slot in slots:
            if self.attended is not None:
                self.attended.pop(slot, None)
            self.length[slot] = self._known[slot] = 0
            self._put_aside(self.pages.drop(slot, 0))

    def erase(self, slot: int) -> None:
        """Overwrite the pages of a broken sequence, and forget those that were known: NaN must not reach others."""
        mine = self.pages.of(slot)
        for page in mine:
            self._put_aside(self.prefixes.forget(page))
        for page in mine:
            if self.pages.uses[page] == 1:
                where = slice(page * self.page, (page + 1) * self.page)
                self.k[:, :, where] = 0
                self.v[:, :, where] = 0


def page_limit(slots: int, length: int, token: int, device: torch.device, memory: int | None) -> int | None:
    """Pages for a `PagedKV`; None: no limit is known.

    token: bytes of a token. memory: bytes that all may take; None: 90% of what is free now. Raises CapacityError where one sequence
    would not fit, or `memory` is more than there is.
    """
    per_slot, page = -(-length // PAGE), PAGE * token
    remedy = "lower max_length or the number of slots"
    require_memory(16 * slots * per_slot, torch.device("cpu"), f"the page table of {slots} x {length} tokens", remedy)
    if memory is not None:
        require_memory(min(memory, slots * per_slot * page), device, "a cache of the wanted size", "lower kv_memory")
    free = available_memory(device)
    allowed = memory if memory is not None else None if free is None else int(0.9 * free)
    if allowed is None:
        return None
    if allowed < per_slot * page:
        raise CapacityError(
            f"a sequence of {length} tokens needs {per_slot * page / 1e9:.2f} GB of keys and values, and {allowed / 1e9:.2f} GB "
            "are allowed: lower max_length, or give more with kv_memory if there is more"
        )
    return min(slots * per_slot, allowed // page)


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
