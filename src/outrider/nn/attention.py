"""Attention of flat rows over a contiguous cache, without padding rows, gathering keys or copying grouped heads.

A forward makes one `AttentionPlan`; every view and mask that all layers share is built there, once. Segments are split
into pieces: one segment, or several short ones of equal size in neighbouring slots, which one call serves at the price
of reading the shorter caches to the longest one's length.

Few rows with grouped heads are folded: the g query heads of a key head become g rows of it, so keys are read once and
not repeated g times. Long prompts are left to `scaled_dot_product_attention`'s own causal path.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from outrider.nn.kv import ContiguousKV
from outrider.types import Rows, Segment

SHORT = 16
"""Rows of a segment up to which heads are folded and segments may share a call."""
_WASTE = 1.5
"""A shared call may read at most this many times the keys that separate calls would."""


@dataclass(frozen=True, slots=True)
class _View:
    """What one piece reads in the layers of one window. keys, values: per layer [b, kv_heads, places, head_dim]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None
    causal: bool


class AttentionPlan:
    """Where the rows of one forward write their keys and values, and what they see.

    window: sliding window of each layer, 0 for none. heads: query heads, a multiple of the cache's.
    """

    def __init__(self, rows: Rows, kv: ContiguousKV, heads: int, window: tuple[int, ...]) -> None:
        self._window = window
        self._heads, self._kv_heads = heads, kv.k.shape[2]
        runs = _runs(rows.segments)
        self._pieces = [_Piece(run, kv, heads // self._kv_heads, set(window)) for run in runs]
        self._write = _writer(rows, kv)

    def __call__(
        self, layer: int, q: Float[Tensor, "N heads D"], k: Float[Tensor, "N kv D"], v: Float[Tensor, "N kv D"]
    ) -> Float[Tensor, "N A"]:
        """Store k and v, attend, and return the heads side by side, [N, heads * head_dim]."""
        self._write(layer, k, v)
        width = self._window[layer]
        if len(self._pieces) == 1:
            return self._pieces[0].attend(layer, width, q)
        return torch.cat([piece.attend(layer, width, q[piece.rows]) for piece in self._pieces])


class _Piece:
    """Segments of n rows each in neighbouring slots: one attention call per layer."""

    def __init__(self, run: list[Segment], kv: ContiguousKV, group: int, windows: Iterable[int]) -> None:
        first = run[0]
        self._batch, self._count = len(run), first.count
        self.rows = slice(first.first, first.first + self._batch * self._count)
        self._kv_heads, self._group = kv.k.shape[2], group
        self._folded = group > 1 and self._count <= SHORT
        self._views = {width: self._view(run, kv, width) for width in windows}

    def _view(self, run: list[Segment], kv: ContiguousKV, width: int) -> _View:
        start = min(max(0, s.cached - width + 1) if width else 0 for s in run)
        end = max(s.cached for s in run) + self._count
        for s in run:
            kv.clean(s.slot, s.cached + s.count, end)
        slots, places = slice(run[0].slot, run[0].slot + self._batch), slice(start, end)
        keys, values = kv.k[:, slots, :, places].unbind(0), kv.v[:, slots, :, places].unbind(0)
        alone = len(run) == 1
        if alone and self._count == 1:  # its window begins at `start`, and it is the last place
            return _View(keys, values, None, False)
        if alone and not self._folded and start == run[0].cached == 0 and run[0].is_chain and not 0 < width < end:
            return _View(keys, values, None, True)
        see = torch.stack([visible(s, width, start, end) for s in run])[:, None]
        see = see.repeat_interleave(self._group, 2) if self._folded else see
        mask = torch.zeros(see.shape, dtype=kv.k.dtype).masked_fill_(~see, float("-inf"))
        return _View(keys, values, mask.to(kv.k.device), False)

    def attend(self, layer: int, width: int, q: Float[Tensor, "M heads D"]) -> Float[Tensor, "M A"]:
        view = self._views[width]
        key, value = view.keys[layer], view.values[layer]
        if not self._folded:
            rows = q.view(self._batch, self._count, -1, q.shape[-1]).transpose(1, 2)
            out = F.scaled_dot_product_attention(
                rows, key, value, attn_mask=view.mask, is_causal=view.causal, enable_gqa=self._group > 1
            )
            return out.transpose(1, 2).reshape(q.shape[0], -1)
        b, n, heads, g, d = self._batch, self._count, self._kv_heads, self._group, q.shape[-1]
        rows = (
            q.view(b, heads, g, d) if n == 1 else q.view(b, n, heads, g, d).transpose(1, 2).reshape(b, heads, n * g, d)
        )
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=view.mask)
        return out.view(b, heads, n, g, d).transpose(1, 2).reshape(b * n, heads * g * d)


def visible(segment: Segment, width: int, start: int, end: int) -> Bool[Tensor, "n places"]:
    """Which cache places start : end each row of a segment sees: ancestors and itself, in a window of `width` positions.

    width 0: no window. A cached token's place is its position; a node's position is its parent's plus one.
    """
    n, cached = segment.count, segment.cached
    see = torch.ones(n, end, dtype=torch.bool).tril_(cached)
    if not segment.is_chain:
        see[:, cached : cached + n] = _ancestors(segment)
    if width:
        position = list(range(cached, cached + segment.prefix))
        for parent in segment.parent:
            position.append(position[parent] + 1)
        own = torch.tensor(position)
        place = torch.arange(end)
        place[cached : cached + n] = own
        see &= place > own[:, None] - width
    return see[:, start:]


def _ancestors(segment: Segment) -> Bool[Tensor, "n n"]:
    """`segment.visible()`, made on the host in one piece: a tensor operation per node would cost more than the step."""
    n = segment.count
    rows = [bytearray(b"\1" * (i + 1) + b"\0" * (n - i - 1)) for i in range(segment.prefix)]
    for i, parent in enumerate(segment.parent):
        row = bytearray(rows[parent])
        row[segment.prefix + i] = 1
        rows.append(row)
    return torch.frombuffer(bytearray().join(rows), dtype=torch.bool).view(n, n)


def _runs(segments: tuple[Segment, ...]) -> list[list[Segment]]:
    """Segments that may share a call: short, of equal size, in neighbouring slots, of similar cached length."""
    out: list[list[Segment]] = []
    for s in segments:
        run = out[-1] if out else []
        if run and s.count == run[0].count <= SHORT and s.slot == run[-1].slot + 1:
            together = [*run, s]
            longest = max(t.cached for t in together) + s.count
            if longest * len(together) <= _WASTE * sum(t.cached + t.count for t in together):
                run.append(s)
                continue
        out.append([s])
    return out


def _writer(rows: Rows, kv: ContiguousKV):
    """Stores one layer's new keys and values at their places."""
    if len(rows.segments) == 1:
        s = rows.segments[0]
        places = slice(s.cached, s.cached + s.count)
        keys = kv.k[:, s.slot, :, places].transpose(1, 2).unbind(0)
        values = kv.v[:, s.slot, :, places].transpose(1, 2).unbind(0)

        def copy(layer: int, k: Tensor, v: Tensor) -> None:
            keys[layer].copy_(k)
            values[layer].copy_(v)

        return copy
    slot = torch.tensor([s.slot for s in rows.segments for _ in range(s.count)], device=kv.k.device)
    place = torch.tensor([s.cached + i for s in rows.segments for i in range(s.count)], device=kv.k.device)

    def scatter(layer: int, k: Tensor, v: Tensor) -> None:
        kv.k[layer][slot, :, place] = k
        kv.v[layer][slot, :, place] = v

    return scatter
