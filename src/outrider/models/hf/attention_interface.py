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
from outrider.models.hf.probe import AttentionInterfaceUnsupported, Bend, attention_in, configs_of, listen
from outrider.models.hf.state import named_rows, scores_rows
from outrider.nn.attention import attend
from outrider.nn.kv import PagedKV, page_limit
from outrider.nn.masks import ancestor_mask
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


@dataclass(slots=True)
class _Step:
    """The data of one forward for the attention function. Masks and views are made once, for all layers with the same window."""

    rows: Rows
    kv: PagedKV
    masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    spans: dict[tuple[int, int], _Span] = field(default_factory=dict)

    def span(self, index: int, start: int) -> _Span:
        """A segment's tokens from number `start` to its last row."""
        key = (index, start)
        if key not in self.spans:
            s = self.rows.segments[index]
            self.spans[key] = _Span(self.kv, self.kv.places(s.slot, start, s.cached + s.count))
        return self.spans[key]

    def mask(self, index: int, low: int, window: int) -> Tensor | None:
        key = (index, window)
        if key not in self.masks:
            s = self.rows.segments[index]
            see = None  # a single row sees all that is left of its window
            if s.count > 1:
                see = ancestor_mask(s.fed, s.parent, s.cached, window=window, start=low)
                for a, b in self.open(index):
                    see[max(a - s.cached, 0) : b - s.cached, a - low : b - low] = True
                see = see.to(self.kv.k.device)
            self.masks[key] = see
        return self.masks[key]

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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer, window = int(module.layer_idx), sliding_window or 0  # type: ignore[arg-type]
    segments, out = outrider.rows.segments, list[Tensor]()
    for i, s in enumerate(segments):
        q, k, v = query, key, value
        if len(segments) > 1:
            q, k, v = (x[:, :, s.first : s.first + s.count] for x in (q, k, v))
        outrider.span(i, s.cached).write(layer, k, v)
        low = outrider.low(i, window)
        keys, values = outrider.span(i, low).read(layer, k, v)
        plain = not softcap and s_aux is None and not outrider.open(i)
        causal = plain and s.cached == 0 and s.count > 1 and s.is_chain and not (window and s.count > window)
        mask = None if causal else outrider.mask(i, low, window)
        out.append(attend(q, keys, values, mask, scale=scale, causal=causal, softcap=softcap, sinks=s_aux, fold=True))
    return (out[0] if len(out) == 1 else torch.cat(out, 2)).transpose(1, 2).contiguous(), None


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
        self.rows, self.configs = scores_rows(model, probe), configs_of(model)
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
        with attention_in(self.configs, _ATTEND):
            out = self.model(
                input_ids=rows.token[None],
                position_ids=rows.position[None],
                use_cache=False,
                outrider=_Step(rows, kv),
                **named_rows(rows.scored if self.rows else None),
            )
        return out.logits[0] if self.rows else out.logits[0, rows.scored]
