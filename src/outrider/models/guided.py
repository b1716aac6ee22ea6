"""Classifier-free guidance as one target: two rows for every token, one distribution.

Guidance (Ho and Salimans 2022) mixes logits: free + scale * (conditioned - free). The free row is that of a text without the
condition; it runs beside the conditioned row in the same forward, with a cache of its own. Whoever asks the target (rules,
drafters, the audit) sees the mixed distribution and nothing else, so everything stays exact for the guided model.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.errors import CapacityError, ConfigError
from outrider.models.framed import unbegun
from outrider.protocols import KVCache, Target
from outrider.transfer import upload
from outrider.types import Rows, Scores, Segment


@dataclass(frozen=True)
class FreeText:
    """What stands in the free text for tokens of the conditioned one.

    stand_ins: token -> the one in its place; others stand for themselves. mark, prompt: if there is a mark, the free text begins
    where it first stands: there is nothing for what is before it, and the whole `prompt` for the mark.
    """

    stand_ins: Mapping[int, int] = field(default_factory=dict)
    mark: int | None = None
    prompt: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.mark is None) != (not self.prompt):
            raise ConfigError("a mark of a free text needs a prompt that stands for it, and a prompt needs a mark")

    @property
    def longer(self) -> int:
        """Most tokens that the free text has more than the conditioned one."""
        return max(0, len(self.prompt) - 1)

    def check(self, vocab_size: int) -> None:
        """Raise ConfigError for tokens outside the vocabulary."""
        marks = () if self.mark is None else (self.mark,)
        for token in (*self.stand_ins, *self.stand_ins.values(), *marks, *self.prompt):
            if not 0 <= token < vocab_size:
                raise ConfigError(f"guidance names token {token}, outside the vocabulary of {vocab_size}")


@dataclass(frozen=True, slots=True)
class _Begun:
    """What a step does to the free text of a segment's slot. skipped: first rows of the segment for which nothing stands there.
    prompt: whether it begins with the prompt. shift: see `GuidedKV`."""

    skipped: int
    prompt: bool
    shift: int


class GuidedKV:
    """Caches of `slots` conditioned texts and of their free ones, which are the upper half of the inner cache's slots.

    A free text that has begun is `shift` tokens longer than the conditioned one, or shorter if negative; None: it has not.
    """

    def __init__(self, inner: KVCache, slots: int, capacity: int, free: FreeText, table: Int[Tensor, "V"]) -> None:
        self.inner, self.slots, self.capacity, self.free = inner, slots, capacity, free
        self._paged: Any = inner if hasattr(inner, "lacking") else None
        self._table, self._place = table, partial(upload, dtype=torch.int64, device=table.device)
        self._prompt, self._ruler = self._place(list(free.prompt)), self._place(list(range(len(free.prompt))))
        self._start = None if free.mark is not None else 0
        self._shift: list[int | None] = [self._start] * slots
        self._made: tuple[Rows, tuple[Rows, tuple[_Begun | None, ...]]] | None = None  # of the step that is being done

    @property
    def length(self) -> list[int]:
        """Cached tokens of the conditioned texts."""
        return self.inner.length[: self.slots]

    def reserve(self, rows: Rows) -> None:
        """See `protocols.KVCache`."""
        self.inner.reserve(self.both(rows))

    def commit(self, rows: Rows, paths: Sequence[Sequence[int]]) -> None:
        """See `protocols.KVCache`."""
        both, begun = self._step(rows)
        self.inner.commit(both, [*paths, *(p for p, b in zip(paths, begun, strict=True) if b is not None)])
        for s, b in zip(rows.segments, begun, strict=True):
            self._shift[s.slot] = None if b is None else b.shift
        self._made = None

    @property
    def spare(self) -> int:
        """See `protocols.PagedCache`."""
        return self._paged.spare if self._paged else 0

    def lacking(self, slot: int, tokens: int) -> int:
        """See `protocols.PagedCache`: of both texts. One that has not begun takes the most that it may."""
        if not self._paged:
            return 0
        held, shift = self.inner.length[slot], self._shift[slot]
        free = (0 if tokens <= held else tokens - held + self.free.longer) if shift is None else tokens + shift
        return self._paged.lacking(slot, tokens) + self._paged.lacking(slot + self.slots, free)

    def needed(self, tokens: Sequence[int], more: int, root: Hashable = None) -> int:
        """See `protocols.PagedCache`: for both texts, which share nothing; the free one takes the most that it may."""
        if not self._paged:
            return 0
        free = len(tokens) + more + self.free.longer
        return self._paged.needed(tokens, more, root) + self._paged.needed((), free, root)

    def truncate(self, slot: int, length: int) -> None:
        """See `protocols.KVCache`. A text that is cut before its mark has no free one any more."""
        shift = self._shift[slot]
        free = 0 if shift is None else length + shift
        if self._start is None and free < len(self.free.prompt):
            free, shift = 0, None
        self.inner.truncate(slot, length)
        self.inner.truncate(slot + self.slots, free)
        self._shift[slot], self._made = shift, None

    def release(self, slots: Sequence[int]) -> None:
        """See `protocols.KVCache`."""
        self.inner.release([*slots, *(s + self.slots for s in slots)])
        for slot in slots:
            self._shift[slot] = self._start
        self._made = None

    def erase(self, slot: int) -> None:
        """See `protocols.KVCache`."""
        for one in (slot, slot + self.slots):
            self.inner.erase(one)

    def both(self, rows: Rows) -> Rows:
        """The rows of a forward, and behind them those of the free texts. Raises RequestError for a scored text in which none has
        begun."""
        return self._step(rows)[0]

    def _step(self, rows: Rows) -> tuple[Rows, tuple[_Begun | None, ...]]:
        """Both texts' rows, and what becomes of the free ones; made once for a step."""
        if self._made is None or self._made[0] is not rows:
            begun = self._begun(rows)
            self._made = rows, (self._with_free(rows, begun), begun)
        return self._made[1]

    def _begun(self, rows: Rows) -> tuple[_Begun | None, ...]:
        """For each segment what becomes of its free text; None: it does not begin yet."""
        out: list[_Begun | None] = []
        for s in rows.segments:
            shift, mark = self._shift[s.slot], self.free.mark
            if shift is None and mark is not None:
                fed = rows.token[s.first : s.first + s.fed].tolist()
                at = fed.index(mark) if mark in fed else None
                if at is None and s.scored:
                    raise unbegun(mark)
                out.append(None if at is None else _Begun(at + 1, True, self.free.longer - s.cached - at))
            else:
                out.append(_Begun(0, False, shift or 0))
        return tuple(out)

    def _with_free(self, rows: Rows, begun: Sequence[_Begun | None]) -> Rows:
        """Rows of the free texts are picked from the conditioned ones and the prompt, and moved to their own positions."""
        count, size = rows.count, len(self.free.prompt)
        source, moved, free_of = list[int](), list[int](), [0] * count
        segments: list[Segment] = []
        for s, b in zip(rows.segments, begun, strict=True):
            if b is None:
                continue
            head, first, start = size if b.prompt else 0, len(source), s.first + b.skipped
            source += [*range(count, count + head), *range(start, s.first + s.count)]
            moved += [*([0] * head), *([b.shift] * (s.count - b.skipped))]
            more = head - b.skipped
            # the mark is the last row of its prompt
            low = start - (1 if b.prompt else 0)
            free_of[low : s.first + s.count] = range(count + first + low - s.first + more, count + len(source))
            cached = 0 if b.prompt else s.cached + b.shift
            parent = tuple(up + more for up in s.parent) if more else s.parent
            segments.append(Segment(s.slot + self.slots, count + first, cached, s.fed + more, parent, s.scored))
        picked, anchors = self._place(source), _anchors(rows)
        token = torch.cat([self._table[rows.token], self._prompt])[picked]
        position = torch.cat([rows.position, self._ruler])[picked] + self._place(moved)
        twins = self._place(free_of)[rows.scored]
        return Rows(
            torch.cat([rows.token, token]),
            torch.cat([rows.position, position]),
            (*rows.segments, *segments),
            torch.cat([rows.scored[:anchors], twins[:anchors], rows.scored[anchors:], twins[anchors:]]),
        )


def _anchors(rows: Rows) -> int:
    """Scored rows of anchors, which come before those of nodes."""
    return min(sum(s.scored for s in rows.segments), len(rows.scored))


class Guided:
    """`inner` with guidance: implements `protocols.Target`.

    scale: 1 is the conditioned model alone, 0 the free one. Hidden states and token tables are those of the conditioned rows.
    """

    def __init__(self, inner: Target, free: FreeText, scale: float) -> None:
        if not 0.0 <= scale <= 100.0:
            raise ConfigError(f"the scale of guidance must be from 0 to 100, got {scale}")
        free.check(inner.vocab_size)
        if inner.max_length <= free.longer:
            raise ConfigError(
                f"a free text that begins with {len(free.prompt)} tokens does not fit the {inner.max_length} positions of the "
                "model: shorten the negative prompt"
            )
        self.inner, self.scale, self.free = inner, scale, free
        self._table = torch.arange(inner.vocab_size, device=inner.device)
        for token, other in free.stand_ins.items():
            self._table[token] = other
        self.vocab_size, self.hidden_size, self.layers = inner.vocab_size, inner.hidden_size, inner.layers
        self.max_length, self.trees, self.rewinds = inner.max_length - free.longer, inner.trees, inner.rewinds
        self.dtype, self.device, self.notices = inner.dtype, inner.device, inner.notices
        self.token_bytes = 2 * getattr(inner, "token_bytes", 0)

    def new_kv(self, slots: int, length: int, *, memory: int | None = None) -> KVCache:
        """Caches of both texts. CapacityError if there is not room for one of each."""
        limit = {} if memory is None else {"memory": memory}
        inner = self.inner.new_kv(2 * slots, length + self.free.longer, **limit)
        kv = GuidedKV(inner, slots, length, self.free, self._table)
        if kv.needed((), length) > kv.spare:
            raise CapacityError(f"two texts of {length} tokens do not fit into memory: lower max_length")
        return kv  # type: ignore[return-value]  # its length is only read

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        """See `protocols.Target`: one row of mixed logits for every scored row."""
        assert isinstance(kv, GuidedKV)
        both = self.inner.forward(kv.both(rows), kv.inner, layers=layers)
        anchors = _anchors(rows)
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
