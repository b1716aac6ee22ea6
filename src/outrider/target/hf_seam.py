"""The seam path: flat rows through an unmodified Hugging Face model by a registered attention function.

`AttentionInterface` of transformers lets a model's attention be any registered function, and hands it the extra keyword
arguments of `model(...)`. So the model is called once with all rows of a step as one "sequence" of N tokens, and the
function below writes keys and values to our cache and attends segment by segment. An implementation without a mask
function gets no mask at all (`masking_utils._preprocess_mask_arguments`): nobody else decides what a row sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from outrider.protocols import KVCache
from outrider.target.attention import visible
from outrider.target.hf_taps import Enough, Taps
from outrider.target.kv import ContiguousKV
from outrider.types import Rows

_ATTEND, _RECORD = "outrider", "outrider_record"
_UNDERSTOOD = frozenset(
    """outrider scaling sliding_window softcap s_aux is_causal dropout position_ids cache_position use_cache
    return_dict output_attentions output_hidden_states output_router_logits""".split()  # noqa: SIM905
)
"""Keyword arguments that this attention obeys, or that do not change what is attended to."""


class NoSeam(Exception):
    """Why a model cannot be driven through the attention interface; never reaches the user."""


@dataclass(slots=True)
class _Step:
    """One forward as the attention function needs it. Masks are made once, for all layers with the same window."""

    rows: Rows
    kv: ContiguousKV
    masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    def mask(self, index: int, low: int, window: int) -> Tensor | None:
        key = (index, window)
        if key not in self.masks:
            s = self.rows.segments[index]
            # a single row sees all that is left of its window
            see = None if s.count == 1 else visible(s, window, low, s.cached + s.count).to(self.kv.k.device)
            self.masks[key] = see
        return self.masks[key]


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Float[Tensor, "h n D"]:
    """Attention written out, for what fused kernels lack: a cap on the scores (Gemma 2), a sink per head (gpt-oss)."""
    groups = q.shape[0] // k.shape[0]
    score = q @ k.repeat_interleave(groups, 0).mT * scale
    if softcap:
        score = torch.tanh(score / softcap) * softcap
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        score = torch.cat([score, sinks[:, None, None].to(score.dtype).expand(-1, score.shape[1], 1)], -1)
    weight = torch.softmax(score, -1, dtype=torch.promote_types(score.dtype, torch.float32)).to(v.dtype)
    return weight[..., : k.shape[1]] @ v.repeat_interleave(groups, 0)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Float[Tensor, "h n D"]:
    heads, n, _ = q.shape
    groups = heads // k.shape[0]
    if causal or mask is None:
        out = scaled_dot_product_attention(
            q[None], k[None], v[None], scale=scale, is_causal=causal, enable_gqa=groups > 1
        )
        return out[0]
    # heads that share keys become rows of one head: no repeated keys, and the fast kernels still take the mask
    grouped = q.reshape(k.shape[0], groups * n, -1)
    out = scaled_dot_product_attention(grouped[None], k[None], v[None], attn_mask=mask.repeat(groups, 1), scale=scale)
    return out[0].reshape(heads, n, -1)


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
    """The registered attention function: write rows behind their slot's tokens, then attend per segment."""
    kv, layer, window = outrider.kv, int(module.layer_idx), sliding_window or 0  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups, key_size, value_size = key.shape[1], key.shape[-1], value.shape[-1]
    out = query.new_empty(1, query.shape[2], query.shape[1], value_size)
    for i, s in enumerate(outrider.rows.segments):
        mine, end = slice(s.first, s.first + s.count), s.cached + s.count
        kv.k[layer, s.slot, :groups, s.cached : end, :key_size] = key[0, :, mine]
        kv.v[layer, s.slot, :groups, s.cached : end, :value_size] = value[0, :, mine]
        low = max(0, s.cached - window + 1) if window else 0
        q = query[0, :, mine]
        k = kv.k[layer, s.slot, :groups, low:end, :key_size]
        v = kv.v[layer, s.slot, :groups, low:end, :value_size]
        causal = s.cached == 0 and s.count > 1 and s.is_chain and not (window and s.count > window)
        plain = not softcap and s_aux is None
        mask = None if causal and plain else outrider.mask(i, low, window)
        seen = _fused(q, k, v, mask, scale, causal) if plain else _explicit(q, k, v, mask, scale, softcap, s_aux)
        out[0, mine] = seen.transpose(0, 1)
    return out, None


# ---------------------------------------------------------------------------------- can this model be driven this way?
@dataclass(frozen=True, slots=True)
class _Call:
    """What one attention layer asked for."""

    layer: int
    groups: int
    head_dim: int
    window: int
    dtype: torch.dtype
    unknown: tuple[str, ...]


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention that computes nothing: it writes down what the model would have asked for."""
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _UNDERSTOOD]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if kwargs.get("is_causal") is False:
        unknown.append("is_causal=False")
    if query.shape[2] != key.shape[2]:
        unknown.append("keys of other rows")
    head_dim = max(key.shape[-1], value.shape[-1])
    window = kwargs.get("sliding_window") or 0
    call = _Call(int(module.layer_idx), key.shape[1], head_dim, window, key.dtype, tuple(unknown))  # type: ignore[arg-type]
    kwargs["outrider"].append(call)
    return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(_ATTEND, _attend)
AttentionInterface.register(_RECORD, _record)


def _expected_windows(config: Any, layers: int) -> list[bool]:
    """Whether each layer has a sliding window, from the configuration."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)] * layers
    other = set(kinds) - {"full_attention", "sliding_attention", "attention"}
    if other:
        raise NoSeam(f"it has layers of kind {', '.join(sorted(map(str, other)))}")
    return [kind == "sliding_attention" for kind in kinds]


def _check_rotary(config: Any, length: int) -> None:
    """Refuse rotary frequencies that change with the longest sequence of a call: rows of many sequences share one."""
    given = getattr(config, "rope_parameters", None) or {}
    for rope in [given, *(v for v in given.values() if isinstance(v, dict))]:
        kind = rope.get("rope_type")
        if kind not in ("dynamic", "longrope"):
            continue
        native = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        if length > native:
            raise NoSeam(f"its {kind} rotary frequencies depend on the length of the sequence beyond {native} tokens")


@contextmanager
def attention_of(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model uses another attention inside, its own again afterwards: outside this block it stays as it was."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    before = [(c, c._attn_implementation) for c in configs]
    try:
        for c in configs:
            c._attn_implementation = implementation
        yield
    finally:
        for c, own in before:
            c._attn_implementation = own


class SeamPath:
    """All sequences, prompt chunks and trees in one call of the model."""

    name, trees, rewinds = "seam", True, True

    def __init__(self, model: PreTrainedModel, probe: Sequence[int], max_length: int) -> None:
        """Raises NoSeam, or whatever the model raises when it is called in a way it was not made for."""
        self.model = model
        config = model.config.get_text_config(decoder=True)
        calls: list[_Call] = []
        token = torch.tensor([list(probe)], device=model.device)
        with attention_of(model, _RECORD):
            model(
                input_ids=token,
                position_ids=torch.arange(len(probe), device=model.device)[None],
                use_cache=False,
                outrider=calls,
            )
        layers = int(config.num_hidden_layers)
        if sorted(c.layer for c in calls) != list(range(layers)):
            raise NoSeam(f"{len(calls)} of its {layers} layers go through the attention interface")
        unknown = sorted({name for c in calls for name in c.unknown})
        if unknown:
            raise NoSeam(f"its attention also wants {', '.join(unknown)}")
        windows = _expected_windows(config, layers)
        if any(bool(c.window) != windows[c.layer] for c in calls):
            raise NoSeam("its sliding windows are not handed to the attention interface")
        _check_rotary(config, max_length)
        self.layers, self.groups = layers, max(c.groups for c in calls)
        self.head_dim, self.kv_dtype = max(c.head_dim for c in calls), calls[0].dtype

    def new_kv(self, slots: int, length: int, layers: int | None = None) -> ContiguousKV:
        """layers: of a prefix of the model; None: all."""
        depth = self.layers if layers is None else layers
        return ContiguousKV(depth, slots, self.groups, length, self.head_dim, self.kv_dtype, self.model.device)

    def run(self, rows: Rows, kv: KVCache, taps: Taps) -> tuple[Float[Tensor, "M V"], tuple[Float[Tensor, "N H"], ...]]:
        with taps.listen() as heard:
            logits = self._call(rows, kv)
        return logits, heard.states()

    def run_until(self, rows: Rows, kv: KVCache, taps: Taps) -> tuple[Float[Tensor, "N H"], ...]:
        """The states of `taps`; nothing behind the deepest of them is computed."""
        with taps.listen() as heard, taps.stop(), suppress(Enough):
            self._call(rows, kv)
        return heard.states()

    def _call(self, rows: Rows, kv: KVCache) -> Float[Tensor, "M V"]:
        assert isinstance(kv, ContiguousKV)
        with attention_of(self.model, _ATTEND):
            out = self.model(
                input_ids=rows.token[None],
                position_ids=rows.position[None],
                use_cache=False,
                logits_to_keep=rows.scored,
                outrider=_Step(rows, kv),
            )
        return out.logits[0]
