"""The path over transformers' attention interface: flat rows through an unmodified model by a registered attention function.

`AttentionInterface` of transformers lets a model's attention be any registered function, and passes it the extra keyword
arguments of `model(...)`. So the model is called once with all rows of a step as one "sequence" of N tokens, and the
function below writes keys and values to our cache and attends segment by segment. An implementation without a mask
function gets no mask at all (`masking_utils._preprocess_mask_arguments`), so only this code decides what a row sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from outrider.models.hf.hooks import HiddenStateHooks, StopForward
from outrider.models.hf.probe import AttentionInterfaceUnsupported, AttentionSwitch, Bend, configs_of, listen
from outrider.models.hf.state import chosen, named_rows, scores_rows
from outrider.nn.attention import attend
from outrider.nn.kv import PagedKV, page_limit
from outrider.nn.masks import ancestor_mask
from outrider.nn.row_parts import last_scored
from outrider.pictured import Range
from outrider.protocols import KVCache
from outrider.types import Rows

_ATTEND = "outrider"


class _Span:
    """Places of neighbouring tokens of one sequence. Where they lie side by side, the views of all layers are made at once: slicing
    layer by layer takes a tenth of a small model's time."""

    def __init__(self, kv: PagedKV, where: slice | Tensor) -> None:
        self._kv, self._where = kv, where
        self._views = tuple(x[:, None, :, where].unbind() for x in (kv.k, kv.v)) if isinstance(where, slice) else None

    def write(self, layer: int, key: Float[Tensor, "1 g n D"], value: Float[Tensor, "1 g n E"]) -> None:
        for part, new in enumerate((key, value)):
            groups, size = new.shape[1], new.shape[3]
            if self._views is None:
                (self._kv.k, self._kv.v)[part][layer, :groups][:, self._where, :size] = new[0]
            else:
                _narrow(self._views[part][layer], groups, size).copy_(new)

    def read(
        self, layer: int, key: Float[Tensor, "1 g n D"], value: Float[Tensor, "1 g n E"]
    ) -> tuple[Float[Tensor, "1 g m D"], Float[Tensor, "1 g m E"]]:
        """Keys and values of a layer whose new ones are like these."""
        if self._views is None:
            k, v = (cache[layer][None, :, self._where] for cache in (self._kv.k, self._kv.v))
        else:
            k, v = self._views[0][layer], self._views[1][layer]
        return _narrow(k, key.shape[1], key.shape[3]), _narrow(v, value.shape[1], value.shape[3])


def _narrow(entries: Float[Tensor, "1 G n S"], groups: int, size: int) -> Float[Tensor, "1 g n D"]:
    """Those of a layer with fewer or smaller heads than the cache has room for."""
    whole = entries.shape[1] == groups and entries.shape[3] == size
    return entries if whole else entries[:, :groups, :, :size]


@dataclass(frozen=True, slots=True)
class _Look:
    """Where a segment's rows are written, what they see within a window. mask: None: everything; or if `causal` what is before."""

    new: _Span
    seen: _Span
    mask: Tensor | None
    causal: bool


@dataclass(slots=True)
class _Step:
    """The data of one forward for the attention function. Masks and views are made once, for all layers with the same window."""

    rows: Rows
    kv: PagedKV
    spans: dict[tuple[int, int], _Span] = field(default_factory=dict)
    looks: dict[tuple[int, bool], list[_Look]] = field(default_factory=dict)

    def look(self, window: int, plain: bool) -> list[_Look]:
        """Each segment's places. plain: the layer's attention has a causal path of its own."""
        key = (window, plain)
        if key not in self.looks:
            self.looks[key] = [self._look(i, window, plain) for i in range(len(self.rows.segments))]
        return self.looks[key]

    def _look(self, index: int, window: int, plain: bool) -> _Look:
        s, low = self.rows.segments[index], self.low(index, window)
        free = plain and s.count > 1 and not self.open(index)
        causal = free and s.cached == 0 and s.is_chain and not (window and s.count > window)
        mask = None if causal else self.mask(index, low, window)
        return _Look(self.span(index, s.cached), self.span(index, low), mask, causal)

    def span(self, index: int, start: int) -> _Span:
        """A segment's tokens from number `start` to its last row."""
        key = (index, start)
        if key not in self.spans:
            s = self.rows.segments[index]
            self.spans[key] = _Span(self.kv, self.kv.places(s.slot, start, s.cached + s.count))
        return self.spans[key]

    def mask(self, index: int, low: int, window: int) -> Tensor | None:
        s = self.rows.segments[index]
        if s.count == 1:
            return None  # a single row sees all that is left of its window
        see = ancestor_mask(s.fed, s.parent, s.cached, window=window, start=low)
        for a, b in self.open(index):
            see[max(a - s.cached, 0) : b - s.cached, a - low : b - low] = True
        return see.to(self.kv.k.device)

    def open(self, index: int) -> tuple[Range, ...]:
        """Ranges of a segment's places whose rows see each other, beyond any window: those of an image."""
        return () if self.rows.given is None else self.rows.given.open[index]

    def low(self, index: int, window: int) -> int:
        """The first place that a row of the segment sees."""
        low = max(0, self.rows.segments[index].cached - window + 1) if window else 0
        return min([low, *(a for a, _ in self.open(index))])


def _attend(
    module: nn.Module,
    query: Float[Tensor, "1 h N D"],
    key: Float[Tensor, "1 g N D"],
    value: Float[Tensor, "1 g N E"],
    attention_mask: Tensor | None,
    *,
    outrider: _Step,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 N h E"], None]:
    """The registered attention function: write rows after their slot's tokens, then attend per segment."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    looks = outrider.look(sliding_window or 0, not softcap and s_aux is None)
    out, alone = list[Tensor](), len(looks) == 1
    for s, look in zip(outrider.rows.segments, looks, strict=True):
        q, k, v = (query, key, value) if alone else (x[:, :, s.first : s.first + s.count] for x in (query, key, value))
        look.new.write(layer, k, v)
        keys, values = look.seen.read(layer, k, v)
        out.append(
            attend(
                q, keys, values, look.mask, scale=scaling, causal=look.causal, softcap=softcap, sinks=s_aux, fold=True
            )
        )
    return (out[0] if alone else torch.cat(out, 2)).transpose(1, 2).contiguous(), None


# ---------------------------------------------------------------------------------- can this model be driven this way?
AttentionInterface.register(_ATTEND, _attend)


def _expected_windows(config: Any, layers: int) -> list[bool]:
    """Whether each layer has a sliding window, from the configuration."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)] * layers
    other = set(kinds) - {"full_attention", "sliding_attention", "attention"}
    if other:
        raise AttentionInterfaceUnsupported(f"it has layers of kind {', '.join(sorted(map(str, other)))}")
    return [kind == "sliding_attention" for kind in kinds]


class AttentionInterfacePath:
    """All sequences, prompt chunks and trees in one call of the model."""

    name, trees, rewinds = "seam", True, True

    def __init__(self, model: PreTrainedModel, probe: Sequence[int], bend: Bend | None) -> None:
        """Raises AttentionInterfaceUnsupported, or any error of a model that does not support this kind of call."""
        self.model = model
        config = model.config.get_text_config(decoder=True)
        calls = listen(model, probe, range(len(probe)))
        layers = int(config.num_hidden_layers)
        if sorted(c.layer for c in calls) != list(range(layers)):
            raise AttentionInterfaceUnsupported(
                f"{len(calls)} of its {layers} layers go through the attention interface"
            )
        unknown = sorted({name for c in calls for name in c.unknown})
        if unknown:
            raise AttentionInterfaceUnsupported(f"its attention also wants {', '.join(unknown)}")
        windows = _expected_windows(config, layers)
        if any(bool(c.window) != windows[c.layer] for c in calls):
            raise AttentionInterfaceUnsupported("its sliding windows are not handed to the attention interface")
        if bend is not None:
            raise AttentionInterfaceUnsupported(
                f"its rotary frequencies depend on the length of the sequence beyond {bend.limit} tokens"
            )
        self.rows, self._ours = scores_rows(model, probe), AttentionSwitch(configs_of(model), _ATTEND)
        self.layers, self.groups = layers, max(c.groups for c in calls)
        self.head_dim, self.kv_dtype = max(c.head_dim for c in calls), calls[0].dtype

    def token_bytes(self, layers: int) -> int:
        """Bytes of a cached token's keys and values in so many layers."""
        return 2 * layers * self.groups * self.head_dim * self.kv_dtype.itemsize

    def new_kv(self, slots: int, length: int, layers: int | None = None, memory: int | None = None) -> PagedKV:
        """layers: of a prefix of the model; None: all. memory: bytes that it may take, see `page_limit`."""
        depth, device = self.layers if layers is None else layers, self.model.device
        limit = page_limit(slots, length, self.token_bytes(depth), device, memory)
        return PagedKV(depth, slots, self.groups, length, self.head_dim, self.kv_dtype, device, limit=limit)

    def run(
        self, rows: Rows, kv: KVCache, taps: HiddenStateHooks
    ) -> tuple[Float[Tensor, "M V"], tuple[Float[Tensor, "N H"], ...]]:
        if not taps.layers:
            return self._call(rows, kv), ()
        with taps.listen() as heard:
            logits = self._call(rows, kv)
        return logits, heard.states()

    def run_until(self, rows: Rows, kv: KVCache, taps: HiddenStateHooks) -> tuple[Float[Tensor, "N H"], ...]:
        """The states of `taps`; nothing after the deepest of them is computed."""
        with taps.listen() as heard, taps.stop(), suppress(StopForward):
            self._call(rows, kv)
        return heard.states()

    def _call(self, rows: Rows, kv: KVCache) -> Float[Tensor, "M V"]:
        assert isinstance(kv, PagedKV)
        kv.reserve(rows)
        last = last_scored(rows)
        scored = rows.scored if last is None else last
        with self._ours:
            out = self.model(
                input_ids=rows.token[None],
                position_ids=rows.position[None],
                use_cache=False,
                outrider=_Step(rows, kv),
                **named_rows(scored if self.rows else None),
            )
        return out.logits[0] if self.rows else chosen(out.logits[0], scored)
