"""Paths for Hugging Face models off the attention interface: one call per sequence, chains only.

`CachePath` keeps transformers' own cache for every slot and crops what was rejected. `RecurrentPath` does so for states
that cannot be cropped (Mamba and its hybrids): it decodes, and refuses drafts. `RecomputePath` keeps no state and feeds
the whole sequence every time, for models without a cache that grows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from outrider.errors import CapabilityError, CapacityError
from outrider.protocols import KVCache
from outrider.target.hf_taps import Taps
from outrider.types import Rows, Segment


class SlotCaches:
    """One transformers cache per slot, or its tokens where there is no cache.

    length: committed tokens of every slot. fed: tokens its cache has seen; the next forward crops what was not kept.
    """

    def __init__(self, slots: int, capacity: int, rewinds: bool) -> None:
        self.slots, self.capacity, self.rewinds = slots, capacity, rewinds
        self.length: list[int] = [0] * slots
        self.fed: list[int] = [0] * slots
        self.cache: list[Cache | None] = [None] * slots
        self.tokens: list[list[int]] = [[] for _ in range(slots)]

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

    def commit(self, rows: Rows, paths: Sequence[Sequence[int]]) -> None:
        """Keep prefixes and the first nodes of each chain."""
        for s, path in zip(rows.segments, paths, strict=True):
            kept = s.prefix + len(path)
            if list(path) != list(range(len(path))) or (not self.rewinds and kept != s.count):
                raise CapabilityError(
                    "this model's cache keeps chains from their first node only: use a drafter of chains"
                )
            self.length[s.slot] = s.cached + kept

    def truncate(self, slot: int, length: int) -> None:
        if not 0 <= length <= self.length[slot]:
            raise CapacityError(f"slot {slot} holds {self.length[slot]} tokens, cannot keep {length}")
        if not self.rewinds and 0 < length < self.length[slot]:
            raise CapabilityError("a recurrent state cannot be rewound: release the slot and feed the sequence again")
        self.length[slot] = length

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.length[slot] = self.fed[slot] = 0
            self.cache[slot] = None
            self.tokens[slot] = []

    def erase(self, slot: int) -> None:
        """Nothing is shared between slots here: forgetting is enough."""
        self.release([slot])


def _caches(kv: KVCache) -> SlotCaches:
    assert isinstance(kv, SlotCaches)
    return kv


def _keyword(model: PreTrainedModel, *names: str) -> str | None:
    """The first of `names` that the model's forward takes."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in names if name in known), None)


def _pick(logits: Sequence[Tensor], rows: Rows) -> Float[Tensor, "M V"]:
    return torch.cat([x[0] for x in logits])[rows.scored]


class CachePath:
    """One call per sequence with transformers' growing cache; rejected tokens are cropped away."""

    name, trees, rewinds = "cache", False, True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        keyword = _keyword(model, "past_key_values", "cache_params")
        if keyword is None:
            raise CapabilityError("it takes no cache")
        self.keyword = keyword

    def fresh(self) -> Cache:
        """Without the configuration no layer forgets what left its window, so every layer can be cropped."""
        return DynamicCache()

    def new_kv(self, slots: int, length: int) -> SlotCaches:
        return SlotCaches(slots, length, self.rewinds)

    def run(self, rows: Rows, kv: KVCache, taps: Taps) -> tuple[Float[Tensor, "M V"], tuple[Float[Tensor, "N H"], ...]]:
        held, logits = _caches(kv), []
        with taps.listen() as heard:
            for s in rows.segments:
                if not s.is_chain:
                    raise CapabilityError("this model runs on chains only: use a drafter that proposes one")
                cache = self._at(held, s)
                for piece in self.pieces(s):
                    call = {self.keyword: cache}
                    logits.append(self.model(input_ids=rows.token[None, piece], use_cache=True, **call).logits)
                held.fed[s.slot] = s.cached + s.count
        return _pick(logits, rows), heard.states()

    def pieces(self, s: Segment) -> list[slice]:
        """Rows of each call of the model."""
        return [slice(s.first, s.first + s.count)]

    def _at(self, held: SlotCaches, s: Segment) -> Cache:
        """The slot's cache, holding exactly the committed tokens."""
        cache, extra = held.cache[s.slot], held.fed[s.slot] - s.cached
        if cache is None or not s.cached:
            cache = held.cache[s.slot] = self.fresh()
        elif extra:
            cache.crop(-extra)
        return cache


class RecurrentPath(CachePath):
    """States that cannot be cropped: plain decoding only. Later pieces go token by token if the model wants it so."""

    name, trees, rewinds = "recurrent", False, False

    def __init__(self, model: PreTrainedModel, by_token: bool) -> None:
        super().__init__(model)
        self.by_token = by_token

    def fresh(self) -> Cache:
        return DynamicCache(config=self.model.config)

    def pieces(self, s: Segment) -> list[slice]:
        if not s.cached or not self.by_token:
            return super().pieces(s)
        return [slice(i, i + 1) for i in range(s.first, s.first + s.count)]

    def _at(self, held: SlotCaches, s: Segment) -> Cache:
        if s.parent:
            raise CapabilityError(
                "this model has a recurrent state that cannot be rewound: decode it without a drafter"
            )
        if s.cached and held.fed[s.slot] != s.cached:
            raise CapabilityError("this model's recurrent state has seen tokens that were not kept: release the slot")
        return super()._at(held, s)


class RecomputePath:
    """No state: every call sees the whole sequence again. Slow, and right for anything that maps tokens to logits."""

    name, trees, rewinds = "recompute", False, True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.extra = {"use_cache": False} if _keyword(model, "use_cache") else {}

    def new_kv(self, slots: int, length: int) -> SlotCaches:
        return SlotCaches(slots, length, self.rewinds)

    def run(self, rows: Rows, kv: KVCache, taps: Taps) -> tuple[Float[Tensor, "M V"], tuple[Float[Tensor, "N H"], ...]]:
        held, logits, states = _caches(kv), [], []
        token = rows.token.tolist()
        for s in rows.segments:
            if not s.is_chain:
                raise CapabilityError("this model runs on chains only: use a drafter that proposes one")
            whole = held.tokens[s.slot][: s.cached] + token[s.first : s.first + s.count]
            held.tokens[s.slot] = whole
            with taps.listen() as heard:
                out = self.model(input_ids=torch.tensor([whole], device=rows.token.device), **self.extra)
            logits.append(out.logits[:, s.cached :])
            states.append([h[s.cached :] for h in heard.states()])
        return _pick(logits, rows), tuple(torch.cat(parts) for parts in zip(*states, strict=True))
