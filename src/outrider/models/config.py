"""`config.json` of a decoder -> DecoderConfig. The folder may be hostile: every number is bounded before it is used.

Both spellings are read: transformers 4 (`rope_theta` beside `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`,
`dtype`). Defaults of absent keys are those of each family's configuration class in transformers.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.config_keys import COMMON, OPTIONS, flag, packed_key, real, unknown_keys, whole
from outrider.errors import ConfigError
from outrider.files import read_json
from outrider.models.decoder import DecoderConfig
from outrider.models.experts import Held, block_shapes, read_experts
from outrider.models.families import FAMILIES, Family, Unsupported
from outrider.models.rotary import turns_of

CONFIG = "config.json"
CONFIG_BYTES = 16 << 20
"""Largest config.json that is read; real ones have a few kilobytes, and Emu3's has its vocabulary: 184,622 tokens."""
MOST_LAYERS = 1024
SINKS = "self_attn.sinks"
OWN_CODE = {"mimo": "qwen2"}
"""Model types whose checkpoints name code of their own, which is not run: the family whose network theirs is."""


__all__ = ["FAMILIES", "Layout", "Unsupported", "layout_of", "read_layout", "read_raw_config", "shapes_of"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The expected contents of the weight files. stored: the dtype the config names, if any."""

    decoder: DecoderConfig
    family: Family
    qkv_bias: bool
    o_bias: bool
    tied: bool
    stored: str | None


def read_raw_config(folder: Path) -> dict:
    """Read config.json; refused if it requires its own code to be run."""
    raw = read_json(folder / CONFIG, CONFIG_BYTES)
    kind = raw.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ConfigError(f"{folder / CONFIG}: model_type must be a text, got {reprlib.repr(kind)}: download it again")
    if kind in OWN_CODE:
        return {k: v for k, v in raw.items() if k != "auto_map"} | {"model_type": OWN_CODE[kind]}
    if raw.get("auto_map"):
        raise ConfigError(
            f"{folder / CONFIG} names code of its own (auto_map), which Outrider never runs: "
            "use a checkpoint of an architecture that transformers has built in, without auto_map"
        )
    return raw


def read_layout(folder: Path, max_length: int | None = None) -> Layout:
    """Shape of the checkpoint in `folder`; `max_length` may shorten the context, never lengthen it.

    Raises ConfigError for a wrong value and Unsupported for an architecture or option the lean runtime does not have.
    """
    return layout_of(read_raw_config(folder), max_length)


def layout_of(raw: dict, max_length: int | None = None, where: object = CONFIG) -> Layout:
    """`read_layout` of what a config.json says, or of a file that says the same in other words. where: the file, for messages."""
    family = _family(raw, where)
    hidden = whole(raw, "hidden_size", where, most=1 << 17)
    layers = whole(raw, "num_hidden_layers", where, most=MOST_LAYERS)
    heads = whole(raw, "num_attention_heads", where, most=4096)
    kv_heads = whole(raw, "num_key_value_heads", where, default=family.kv_heads or heads, null=heads, most=4096)
    null_dim = None if family.head_dim else hidden // heads
    head_dim = whole(
        raw, "head_dim", where, default=family.head_dim or hidden // heads, null=null_dim, least=2, most=4096
    )
    if heads % kv_heads or head_dim % 2:
        raise ConfigError(
            f"{where}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads}) "
            f"and head_dim ({head_dim}) must be even: the file is damaged, download it again"
        )
    positions = whole(raw, "max_position_embeddings", where, default=family.max_length, most=1 << 26)
    if max_length is not None and not 1 <= max_length <= positions:
        raise ConfigError(f"max_length {max_length} is outside the model's positions: choose 1 to {positions}")
    turned, local = turns_of(raw, family, head_dim, positions, max_length or positions, where)
    if local is not None and local.scale != turned.scale:
        raise Unsupported("its rotary scalings differ between layers in the factor of their cosines")
    window = _windows(raw, family, layers, where)
    inner = whole(raw, "intermediate_size", where, most=1 << 20)
    decoder = DecoderConfig(
        family=str(raw["model_type"]),
        vocab_size=whole(raw, "vocab_size", where),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=inner,
        eps=real(raw, "rms_norm_eps", where, family.eps, least=0.0),
        max_length=max_length or positions,
        window=window,
        inv_freq=turned.inv_freq,
        rope_scale=turned.scale,
        local_freq=None if local is None else local.inv_freq,
        turns=_turned_layers(raw, family, layers, window, where),
        activation=family.activation,
        wide_norms=family.wide_norms,
        clip=real(raw, "clip_qkv", where, 0.0, null=0.0, least=0.0, most=1e9) if family.clip else 0.0,
        experts=None if family.experts is None else read_experts(raw, family.experts, layers, inner, where),
        **_factors(raw, family, hidden, where),
    )
    bias = "attention_bias" in family.options and flag(raw, "attention_bias", where, family.attention_bias)
    stored = raw.get("dtype") or raw.get("torch_dtype")
    return Layout(
        decoder=decoder,
        family=family,
        qkv_bias=family.qkv_bias or bias,
        o_bias=bias and family.o_bias,
        tied=flag(raw, "tie_word_embeddings", where, family.tied),
        stored=stored if isinstance(stored, str) else None,
    )


def _factors(raw: dict, family: Family, hidden: int, where: object) -> dict[str, Any]:
    """The constants by which a family multiplies or bounds what others leave alone, by their names in `DecoderConfig`."""

    def bound(key: str, default: float | None) -> float:
        return 0.0 if raw.get(key, default) is None else real(raw, key, where, default, most=1e6)

    out: dict[str, Any] = {}
    if family.roots:
        out |= {"embed_scale": hidden**0.5, "embed_scale_rounded": True}
    for key, name in _MULTIPLIERS.items():
        if key in family.options:
            out[name] = real(raw, key, where, 1.0, most=1e6)
    if "logits_scaling" in family.options:
        out["logit_scale"] = 1 / real(raw, "logits_scaling", where, 1.0, most=1e6)
    if "query_pre_attn_scalar" in family.options:
        out["attention_scale"] = real(raw, "query_pre_attn_scalar", where, 256, most=1e6) ** -0.5
    capped = "attn_logit_softcapping" in family.options
    if capped:
        out["attention_cap"] = bound("attn_logit_softcapping", 50.0)
    if "final_logit_softcapping" in family.options:
        out["logit_cap"] = bound("final_logit_softcapping", 30.0 if capped else None)
    return out


_MULTIPLIERS = {
    "embedding_multiplier": "embed_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale",
}


def shapes_of(layout: Layout, head: bool, held: Held = "each") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a decoder. head: whether the output head is one of its own. held: see `Held`."""
    c = layout.decoder
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden)}
    if head:
        out["lm_head.weight"] = (c.vocab_size, c.hidden)
    out["model.norm.weight"] = (c.hidden,)
    block, dense = _block_shapes(layout), _dense_shapes(layout)
    sparse = {} if c.experts is None else block_shapes(c, held)
    for i in range(c.layers):
        rest = sparse if c.experts is not None and c.experts.sparse[i] else dense
        out |= {f"model.layers.{i}.{name}": shape for name, shape in (*block.items(), *rest.items())}
    return out


def _block_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """A block's tensors but for those of its feed-forward part."""
    c, family = layout.decoder, layout.family
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    out: dict[str, tuple[int, ...]] = {f"{name}.weight": (c.hidden,) for _, name in family.norms}
    sizes = {"qkv": queries + 2 * keys} if "qkv" in family.fused else {"q": queries, "k": keys, "v": keys}
    for name, size in sizes.items():
        out[f"self_attn.{name}_proj.weight"] = (size, c.hidden)
        if layout.qkv_bias:
            out[f"self_attn.{name}_proj.bias"] = (size,)
    out["self_attn.o_proj.weight"] = (c.hidden, queries)
    if layout.o_bias:
        out["self_attn.o_proj.bias"] = (c.hidden,)
    if family.qk_norm:
        wide = (queries, keys) if family.qk_norm == "row" else (c.head_dim, c.head_dim)
        out |= {"self_attn.q_norm.weight": wide[:1], "self_attn.k_norm.weight": wide[1:]}
    return out | ({SINKS: (c.heads,)} if family.sinks else {})


def _dense_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    c = layout.decoder
    sizes = {"gate_up": 2 * c.inner} if "gate_up" in layout.family.fused else {"gate": c.inner, "up": c.inner}
    out = {f"mlp.{name}_proj.weight": (size, c.hidden) for name, size in sizes.items()}
    return out | {"mlp.down_proj.weight": (c.hidden, c.inner)}


_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_pytorch_tanh": ("gelu_pytorch_tanh",)}
"""Names of the activations that are the same function."""


def _family(raw: dict, where: object) -> Family:
    """The family of the file, after refusing options that the lean runtime does not support."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise Unsupported(f"model_type {reprlib.repr(kind)} is not one of {', '.join(FAMILIES)}")
    named = raw.get("architectures") or []
    if isinstance(named, list) and named and not any(str(n).endswith("ForCausalLM") for n in named):
        raise Unsupported(f"architecture {reprlib.repr(named[0])} is not a causal language model")
    family = FAMILIES[kind]
    act = raw.get(family.act, family.activation)
    if act not in _ACTIVATIONS[family.activation]:
        raise Unsupported(f"{family.act} {reprlib.repr(act)} is not {family.activation}")
    packed = packed_key(raw)
    if packed is not None:
        raise Unsupported(f"the weights are quantized ({packed})")
    if "qkv_bias" in family.options and not flag(raw, "qkv_bias", where, True):
        raise Unsupported("qkv_bias is false")
    if "mlp_bias" in family.options and flag(raw, "mlp_bias", where):
        raise Unsupported("mlp_bias is set")
    if not raw.get("is_causal", True) or raw.get("use_bidirectional_attention") or raw.get("is_encoder_decoder"):
        raise Unsupported("its attention is not causal")
    known = COMMON | OPTIONS | (family.experts.known if family.experts else frozenset())
    unknown = unknown_keys(raw, known | ({"clip_qkv"} if family.clip else set()))
    if unknown:
        raise Unsupported(f"config.json has a key {unknown[0][:80]!r} that is not known to be without effect")
    return family


def _windows(raw: dict, family: Family, layers: int, where: object) -> tuple[int, ...]:
    """Sliding window of each layer, 0 for none: a row sees itself and the `window - 1` positions before it."""
    if "sliding_window" not in family.options:
        return (0,) * layers
    switched = "use_sliding_window" in family.options
    absent = raw.get("sliding_window", family.window or None) is None or (
        switched and not flag(raw, "use_sliding_window", where)
    )
    width = 0 if absent else whole(raw, "sliding_window", where, default=family.window, most=1 << 30)
    if "layer_types" not in family.options:
        return (width,) * layers
    kinds = raw.get("layer_types")
    if kinds is None:
        return _default_windows(raw, family, layers, width, where)
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(f"{where}: layer_types must name {layers} layers: the file is damaged, download it again")
    if any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise Unsupported(f"layer_types has {reprlib.repr(sorted({str(kind) for kind in kinds}))}")
    if "sliding_attention" in kinds and not width:
        raise Unsupported("layer_types has sliding_attention without a sliding_window")
    return tuple(width if kind == "sliding_attention" else 0 for kind in kinds)


def _default_windows(raw: dict, family: Family, layers: int, width: int, where: object) -> tuple[int, ...]:
    """The windows of a file that does not list the kinds of its layers."""
    if family.pattern:
        if not width:
            raise Unsupported("its layers with a window have no sliding_window")
        every = family.pattern
        if "sliding_window_pattern" in family.options:
            every = whole(raw, "sliding_window_pattern", where, default=every, most=1 << 20)
        return tuple(width if i % every else 0 for i in range(1, layers + 1))
    if "no_rope_layers" in family.options:
        turned = _turned_layers(raw, family, layers, (), where)
        return tuple(width if turn < 0 else 0 for turn in turned)
    if "max_window_layers" not in family.options:
        return (width,) * layers
    first = whole(raw, "max_window_layers", where, default=28, least=0, most=1 << 20)
    return tuple(width if i >= first else 0 for i in range(layers))


def _turned_layers(raw: dict, family: Family, layers: int, window: tuple[int, ...], where: object) -> tuple[int, ...]:
    """Which frequencies turn the heads of each layer: 0 the first, 1 the local ones, -1 none; empty if it is 0 everywhere."""
    if "rope_local_base_freq" in family.options:
        return tuple(int(width > 0) for width in window)
    if "no_rope_layers" not in family.options:
        return ()
    turned = raw.get("no_rope_layers")
    if turned is None:
        every = whole(raw, "no_rope_layer_interval", where, default=4, most=1 << 20)
        return tuple(0 if i % every else -1 for i in range(1, layers + 1))
    if not isinstance(turned, list) or len(turned) < layers or any(value not in (0, 1) for value in turned):
        raise ConfigError(
            f"{where}: no_rope_layers must list 0 or 1 for {layers} layers: download the checkpoint again"
        )
    return tuple(0 if value else -1 for value in turned[:layers])
