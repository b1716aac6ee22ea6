"""Attention of one sequence, and of flat rows over a paged cache.

`attend` is one call for one sequence. A forward of several makes one `AttentionPlan`, without padding rows or copying grouped
heads; views, places and masks that all layers share are built there, once. Segments are split into pieces: one segment, whose keys
are read in place if its pages lie side by side, or several short ones of equal size, which share one call on gathered keys: the
shorter ones are filled up to the longest one's length.

Few rows with grouped heads are folded: the g query heads of a key head become g rows of it, so keys are read once and
not repeated g times. Long prompts are left to `scaled_dot_product_attention`'s own causal path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from outrider.nn.kv import PagedKV
from outrider.nn.masks import ancestor_mask, hide
from outrider.types import Rows, Segment

SHORT = 16
"""Rows of a segment up to which heads are folded and segments may share a call."""
_WASTE = 1.5
"""A shared call may read at most this many times the keys that separate calls would."""


def attend(
    q: Float[Tensor, "*b h n D"],
    k: Float[Tensor, "*b g m D"],
    v: Float[Tensor, "*b g m E"],
    mask: Bool[Tensor, "n m"] | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Float[Tensor, "h"] | None = None,
    fold: bool = False,
) -> Float[Tensor, "*b h n E"]:
    """Attention of one sequence's n rows over its m places; h query heads, a multiple of the g key heads.

    *b: nothing, or one dimension of size 1, which saves views (as much time as a short product itself).
    mask: which places a row sees, None for all. causal: with as many rows as places, row i sees places 0 .. i; not together with a
    mask, a cap or sinks. scale: of the scores (None: D ** -0.5). softcap: bound of the scores (Gemma 2). sinks: a score per head
    that takes weight and adds nothing (gpt-oss). fold: under a mask the heads that share keys become rows of one head.
    """
    if q.ndim == 3:
        return attend(
            q[None], k[None], v[None], mask, scale=scale, causal=causal, softcap=softcap, sinks=sinks, fold=fold
        )[0]
    _, heads, n, size = q.shape
    groups = heads // k.shape[1]
    if softcap or sinks is not None:
        return _explicit(q[0], k[0], v[0], mask, size**-0.5 if scale is None else scale, softcap, sinks)[None]
    if fold and mask is not None:  # no repeated keys, and the fast kernels still take the mask
        rows = q.reshape(1, k.shape[1], groups * n, size)
        out = F.scaled_dot_product_attention(rows, k, v, mask.repeat(groups, 1), scale=scale)
        return out.reshape(1, heads, n, -1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=groups > 1)


def capped(x: Tensor, cap: float) -> Tensor:
    """x bounded softly by `cap`: cap tanh(x / cap) (Gemma 2)."""
    return torch.tanh(x / cap) * cap


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Float[Tensor, "h n E"]:
    """Attention written out, for features that fused kernels lack: a cap on the scores, a sink per head."""
    groups = q.shape[0] // k.shape[0]
    score = q @ k.repeat_interleave(groups, 0).mT * scale
    if softcap:
        score = capped(score, softcap)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        score = torch.cat([score, sinks[:, None, None].to(score.dtype).expand(-1, score.shape[1], 1)], -1)
    weight = torch.softmax(score, -1, dtype=torch.promote_types(score.dtype, torch.float32)).to(v.dtype)
    return weight[..., : k.shape[1]] @ v.repeat_interleave(groups, 0)


@dataclass(frozen=True, slots=True)
class _View:
    """The inputs of one piece in the layers of one window. places: of its b sequences' tokens, all in one line."""

    places: slice | Tensor
    mask: Tensor | None
    causal: bool


class AttentionPlan:
    """Where the rows of one forward write their keys and values, and which places they see.

    window: sliding window of each layer, 0 for none. heads: query heads, a multiple of the cache's. scale: of the scores (None:
    head_dim ** -0.5). cap: their soft bound, 0 for none.
    """

    def __init__(
        self,
        rows: Rows,
        kv: PagedKV,
        heads: int,
        window: tuple[int, ...],
        *,
        scale: float | None = None,
        cap: float = 0.0,
    ) -> None:
        self._window = window
        self._kv_heads = kv.k.shape[1]
        runs = _runs(rows.segments)
        self._pieces = [_Piece(run, kv, heads // self._kv_heads, set(window), _product(scale, cap)) for run in runs]
        self._write, self._query = _writer(rows, kv), kv.stored.query

    def __call__(
        self,
        layer: int,
        q: Float[Tensor, "N heads D"],
        k: Float[Tensor, "N kv D"],
        v: Float[Tensor, "N kv D"],
        sinks: Float[Tensor, "heads"] | None = None,
    ) -> Float[Tensor, "N A"]:
        """Store k and v, attend, and return the heads side by side, [N, heads * head_dim]. sinks: see `attend`."""
        self._write(layer, k, v)
        q = self._query(q)
        width = self._window[layer]
        if len(self._pieces) == 1:
            return self._pieces[0].attend(layer, width, q, sinks)
        return torch.cat([piece.attend(layer, width, q[piece.rows], sinks) for piece in self._pieces])


class _Piece:
    """Segments of n rows each in neighbouring slots: one attention call per layer."""

    def __init__(
        self, run: list[Segment], kv: PagedKV, group: int, windows: Iterable[int], product: Callable[..., Tensor]
    ) -> None:
        first = run[0]
        self._product = product
        self._batch, self._count = len(run), first.count
        self.rows = slice(first.first, first.first + self._batch * self._count)
        self._kv, self._kv_heads, self._group = kv, kv.k.shape[1], group
        self._folded = group > 1 and self._count <= SHORT
        self._views = {width: self._view(run, kv, width) for width in windows}

    def _view(self, run: list[Segment], kv: PagedKV, width: int) -> _View:
        start = min(max(0, s.cached - width + 1) if width else 0 for s in run)
        end = max(s.cached for s in run) + self._count
        places = _places(run, kv, start, end)
        alone = len(run) == 1
        if alone and self._count == 1 and not run[0].view:  # its window begins at `start`, and it is the last place
            return _View(places, None, False)
        if alone and not self._folded and start == run[0].cached == 0 and run[0].is_chain and not 0 < width < end:
            return _View(places, None, True)
        masks = [ancestor_mask(s.fed, s.parent, s.cached, window=width, start=start, end=end) for s in run]
        for s, mask in zip(run, masks, strict=True):
            hide(mask, s.view, s.cached, start)
        see = torch.stack(masks)[:, None]
        see = see.repeat_interleave(self._group, 2) if self._folded else see
        mask = torch.zeros(see.shape, dtype=kv.dtype).masked_fill_(~see, float("-inf"))
        return _View(places, mask.to(kv.k.device), False)

    def _read(self, cache: Shaped[Tensor, "kv P items"], places: slice | Tensor) -> Float[Tensor, "b kv m D"]:
        found = self._kv.unpack(cache[:, places])
        return found.view(found.shape[0], self._batch, -1, found.shape[-1]).transpose(0, 1)

    def attend(
        self, layer: int, width: int, q: Float[Tensor, "M heads D"], sinks: Float[Tensor, "heads"] | None = None
    ) -> Float[Tensor, "M A"]:
        view = self._views[width]
        key, value = self._read(self._kv.k[layer], view.places), self._read(self._kv.v[layer], view.places)
        if not self._folded:
            rows = q.view(self._batch, self._count, -1, q.shape[-1]).transpose(1, 2)
            out = self._product(
                rows, key, value, attn_mask=view.mask, is_causal=view.causal, enable_gqa=self._group > 1,
                sinks=None if sinks is None else sinks[:, None],
            )  # fmt: skip
            return out.transpose(1, 2).reshape(q.shape[0], -1)
        b, n, heads, g, d = self._batch, self._count, self._kv_heads, self._group, q.shape[-1]
        rows = (
            q.view(b, heads, g, d) if n == 1 else q.view(b, n, heads, g, d).transpose(1, 2).reshape(b, heads, n * g, d)
        )
        each = None if sinks is None else sinks.view(heads, 1, g).expand(heads, n, g).reshape(heads, n * g)
        out = self._product(rows, key, value, attn_mask=view.mask, sinks=each)
        return out.view(b, heads, n, g, d).transpose(1, 2).reshape(b * n, heads * g * d)


def _product(scale: float | None, cap: float) -> Callable[..., Tensor]:
    """`scaled_dot_product_attention` with a scale, or written out with a bound of its scores or sinks, which it does not have.

    sinks: [heads, rows] of q, or [heads, 1].
    """

    def product(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool = False,
        enable_gqa: bool = False,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if not cap and sinks is None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )
        groups = q.shape[1] // k.shape[1]
        score = q @ k.repeat_interleave(groups, 1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        score = capped(score, cap) if cap else score
        if is_causal:
            attn_mask = ancestor_mask(q.shape[2], (), 0).to(q.device)
            attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill_(
                ~attn_mask, -torch.inf
            )
        score = score if attn_mask is None else score + attn_mask
        if sinks is not None:
            own = sinks.to(score.dtype)[None, :, :, None].expand(score.shape[0], -1, score.shape[2], 1)
            score = torch.cat([score, own], -1)
        weight = torch.softmax(score, -1, dtype=torch.promote_types(score.dtype, torch.float32)).to(v.dtype)
        return weight[..., : k.shape[2]] @ v.repeat_interleave(groups, 1)

    return product


def _places(run: list[Segment], kv: PagedKV, start: int, end: int) -> slice | Int[Tensor, "places"]:
    """Places of the tokens start .. end - 1 of every sequence. One that has fewer repeats its own first one, which is masked: a
    masked place has no effect only if it holds numbers, and another's might be NaN."""
    if len(run) == 1:
        return kv.places(run[0].slot, start, end)
    number = torch.arange(start, end).expand(len(run), -1)
    own = torch.tensor([s.cached + s.count for s in run])[:, None]
    slot = torch.tensor([s.slot for s in run])[:, None].expand_as(number)
    return kv.at(slot, number.where(number < own, 0)).view(-1).to(kv.k.device)


def _runs(segments: tuple[Segment, ...]) -> list[list[Segment]]:
    """Segments that may share a call: short, of equal size, of similar cached length."""
    out: list[list[Segment]] = []
    for s in segments:
        run = out[-1] if out else []
        if run and s.count == run[0].count <= SHORT:
            together = [*run, s]
            longest = max(t.cached for t in together) + s.count
            if longest * len(together) <= _WASTE * sum(t.cached + t.count for t in together):
                run.append(s)
                continue
        out.append([s])
    return out


def _writer(rows: Rows, kv: PagedKV):
    """Stores one layer's new keys and values at their places."""
    if len(rows.segments) == 1:
        s = rows.segments[0]
        where = kv.places(s.slot, s.cached, s.cached + s.count)
    else:
        slot = torch.tensor([s.slot for s in rows.segments for _ in range(s.count)])
        where = kv.at(slot, torch.tensor([s.cached + i for s in rows.segments for i in range(s.count)])).to(kv.k.device)

    def write(layer: int, k: Tensor, v: Tensor) -> None:
        kv.put(layer, where, k, v)

    return write
