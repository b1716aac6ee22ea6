"""Self-speculation over a narrow copy of the target's cache: the target drafts for itself and reads keys and values of 8 bits.

All cached tokens are seen, at half the bytes of a bfloat16 cache, so drafts are nearly the target's own (after QuantSpec, Tiwari et
al. 2025, whose cache is in two halves of 4 bits). What the target has written is copied behind every verification and rounded once;
a copy is what its entries say and nothing else, so the declared distributions are those that the tokens were drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence

from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.model.token_cache import CHUNK, TokenCache
from outrider.drafters.tree.growth import Growth
from outrider.errors import CapabilityError, ConfigError
from outrider.nn.kv import PagedKV
from outrider.protocols import KVCache, Target
from outrider.types import SequenceView

WIDTH = "int8"
"""Of the copy, as `--kv-dtype` has it."""


class Copied(TokenCache):
    """A cache whose committed tokens are copied from the target's, in place of being computed."""

    def __init__(self, model: Target, slots: int, capacity: int, limit: int, memory: int | None = None) -> None:
        super().__init__(model, slots, capacity, limit, memory)
        self.source: PagedKV | None = None
        self._copied = [0] * slots

    def rewind(self, view: SequenceView) -> None:
        """Drop what was drafted."""
        slot = view.slot
        if len(self.held[slot]) > self._copied[slot]:
            del self.held[slot][self._copied[slot] :]
            self.kv.truncate(slot, self._copied[slot])

    def ingest(self, views: Sequence[SequenceView], goal: Sequence[int], chunk: int) -> None:
        """Copy what the target has cached: of sequences that are to be drafted for, and of those that lack more than a chunk."""
        for view, wanted in zip(views, goal, strict=True):
            start, end = len(self.held[view.slot]), min(view.cached, self.limit)
            if wanted > view.cached or end - start > chunk:
                for at in range(start, end, CHUNK):
                    self._copy(view, at, min(at + CHUNK, end))

    def _copy(self, view: SequenceView, start: int, end: int) -> None:
        source, kv, slot = self.source, self.kv, view.slot
        if source is None or not isinstance(kv, PagedKV):
            raise ConfigError("a copy of the target's cache has no cache yet: call borrow(kv) before drafting")
        kv.make_room(slot, end)
        here, there = kv.places(slot, start, end), source.places(slot, start, end)
        for mine, theirs in ((kv.k, source.k), (kv.v, source.v)):
            mine[:, :, here] = kv.stored.pack(source.unpack(theirs[: len(mine), :, there]))
        kv.length[slot] = self._copied[slot] = end
        self.held[slot] += view.tokens[start:end]

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        super().release(slots)
        for slot in slots:
            self._copied[slot] = 0


class CodedDrafter(ModelDrafter):
    """Drafts with `target` (or its first layers) over a copy of its cache in codes of 8 bits.

    Raises CapabilityError for a target whose cache cannot be stored so, or is already.
    """

    def __init__(self, target: Target, growth: Growth) -> None:
        storing = getattr(target, "storing", None)
        if storing is None:
            raise CapabilityError(
                f"this {type(target).__name__} keeps its cache in its own way (it runs through transformers): use a draft model, "
                "or 'ngram'"
            )
        made = storing(WIDTH)
        if made.stored == target.stored:  # type: ignore[attr-defined]
            raise CapabilityError(
                "the target's own cache is int8 already, and a copy of it drafts no faster: drop kv_dtype, or use "
                "'sparse:window:16+496'"
            )
        super().__init__(made, growth.depth, growth=growth, vocab_size=target.vocab_size, name=f"sparse:{WIDTH}")

    def borrow(self, kv: KVCache) -> None:
        """The target's cache, which is only read. Called once, when the engine is built, after `bind`."""
        if not isinstance(kv, PagedKV):
            raise CapabilityError(f"a {type(kv).__name__} cannot be copied: use a draft model, or 'ngram'")
        self.cache.source = kv  # type: ignore[attr-defined]

    def _new_cache(self, slots: int, capacity: int, limit: int, memory: int | None) -> Copied:
        return Copied(self.model, slots, capacity, limit, memory)
