"""Classifier-free guidance as one target: two rows for every token, one distribution.

Guidance (Ho and Salimans 2022) mixes logits: free + scale * (conditioned - free). The free row is the same text with its condition
tokens replaced; it runs beside the conditioned row in the same forward, with a cache of its own. Whoever asks the target (rules,
drafters, the audit) sees the mixed distribution and nothing else, so everything stays exact for the guided model.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.errors import CapacityError, ConfigError
from outrider.protocols import KVCache, Target
from outrider.types import Rows, Scores


class GuidedKV:
    """Caches of `slots` conditioned texts and of their free twins, which are the upper half of the inner cache's slots."""

    def __init__(self, inner: KVCache, slots: int) -> None:
        self.inner, self.slots, self.capacity = inner, slots, inner.capacity
        self._paged: Any = inner if hasattr(inner, "lacking") else None

    @property
    def length(self) -> list[int]:
        """Cached tokens of the conditioned texts; their twins have as many."""
        return self.inner.length[: self.slots]

    def reserve(self, rows: Rows) -> None:
        """See `protocols.KVCache`."""
        self.inner.reserve(twice(rows, self.slots))

    def commit(self, rows: Rows, paths: Sequence[Sequence[int]]) -> None:
        """See `protocols.KVCache`."""
        self.inner.commit(twice(rows, self.slots), [*paths, *paths])

    @property
    def spare(self) -> int:
        """See `protocols.PagedCache`."""
        return self._paged.spare if self._paged else 0

    def lacking(self, slot: int, tokens: int) -> int:
        """See `protocols.PagedCache`: of both texts."""
        return sum(self._paged.lacking(one, tokens) for one in (slot, slot + self.slots)) if self._paged else 0

    def needed(self, tokens: Sequence[int], more: int, root: Hashable = None) -> int:
        """See `protocols.PagedCache`: for both texts, which share nothing."""
        return 2 * self._paged.needed(tokens, more, root) if self._paged else 0

    def truncate(self, slot: int, length: int) -> None:
        """See `protocols.KVCache`."""
        for one in (slot, slot + self.slots):
            self.inner.truncate(one, length)

    def release(self, slots: Sequence[int]) -> None:
        """See `protocols.KVCache`."""
        self.inner.release([*slots, *(s + self.slots for s in slots)])

    def erase(self, slot: int) -> None:
        """See `protocols.KVCache`."""
        for one in (slot, slot + self.slots):
            self.inner.erase(one)


class Guided:
    """`inner` with guidance: implements `protocols.Target`.

    free: condition token -> the token that takes its place in the free row. scale: 1 is the conditioned model alone, 0 the
    free one.
    Hidden states and token tables are those of the conditioned rows.
    """

    def __init__(self, inner: Target, free: Mapping[int, int], scale: float) -> None:
        if not 0.0 <= scale <= 100.0:
            raise ConfigError(f"the scale of guidance must be from 0 to 100, got {scale}")
        if any(not 0 <= t < inner.vocab_size for pair in free.items() for t in pair):
            raise ConfigError(f"guidance names tokens outside the vocabulary of {inner.vocab_size}")
        self.inner, self.scale = inner, scale
        self.free = torch.arange(inner.vocab_size, device=inner.device)
        if free:
            self.free[torch.tensor(list(free))] = torch.tensor(list(free.values()), device=inner.device)
        self.vocab_size, self.hidden_size, self.layers = inner.vocab_size, inner.hidden_size, inner.layers
        self.max_length, self.trees, self.rewinds = inner.max_length, inner.trees, inner.rewinds
        self.dtype, self.device, self.notices = inner.dtype, inner.device, inner.notices

    def new_kv(self, slots: int, length: int) -> KVCache:
        """Caches of both texts. CapacityError if there is not room for one of each."""
        kv = GuidedKV(self.inner.new_kv(2 * slots, length), slots)
        if kv.lacking(0, length) > kv.spare:
            raise CapacityError(f"two texts of {length} tokens do not fit into memory: lower max_length")
        return kv  # type: ignore[return-value]  # its length is only read

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        """See `protocols.Target`: one row of mixed logits for every scored row."""
        assert isinstance(kv, GuidedKV)
        both = self.inner.forward(twice(rows, kv.slots, self.free), kv.inner, layers=layers)
        anchors = sum(s.scored for s in rows.segments)
        nodes = len(rows.scored) - anchors
        first, second, third, fourth = both.logits.split([anchors, anchors, nodes, nodes])
        given, free = torch.cat([first, third]), torch.cat([second, fourth])
        return Scores(torch.lerp(free, given, self.scale), tuple(h[: rows.count] for h in both.hidden), both.replayed)

    def embed(self, token: Int[Tensor, "n"]) -> Float[Tensor, "n H"]:
        """See `protocols.Target`."""
        return self.inner.embed(token)

    def unembed(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """See `protocols.Target`."""
        return self.inner.unembed(hidden)


def twice(rows: Rows, slots: int, free: Tensor | None = None) -> Rows:
    """The rows of a forward, and behind them those of the free twins in slots `slots` above. free: the token that each token
    becomes there; None where tokens do not matter."""
    count, anchors = rows.count, sum(s.scored for s in rows.segments)
    twins = tuple(replace(s, slot=s.slot + slots, first=s.first + count) for s in rows.segments)
    first, nodes = rows.scored[:anchors], rows.scored[anchors:]
    return Rows(
        torch.cat([rows.token, rows.token if free is None else free[rows.token]]),
        rows.position.repeat(2),
        (*rows.segments, *twins),
        torch.cat([first, first + count, nodes, nodes + count]),
    )
