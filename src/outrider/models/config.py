"""`config.json` of a decoder -> DecoderConfig. The folder may be hostile: every number is bounded before it is used.

Both spellings are read: transformers 4 (`rope_theta` beside `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`,
`dtype`). Defaults of absent keys are those of each family's configuration class in transformers.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.config_keys import COMMON, OPTIONS, ROPE, WINDOWS, flag, packed_key, real, unknown_keys, whole
from outrider.errors import ConfigError
from outrider.files import read_json
from outrider.models.decoder import DecoderConfig
from outrider.models.experts import MIXTRAL, OLMOE, QWEN3_MOE, ExpertKeys, Unsupported, block_shapes, read_experts

CONFIG = "config.json"
CONFIG_BYTES = 4 << 20
"""Largest config.json that is read; real ones have a few kilobytes."""


@dataclass(frozen=True, slots=True)
class Family:
    """The parts of a model type, and transformers' defaults of absent keys.

    options: keys of `OPTIONS` that its class reads; the others have no effect if they occur in its files.
    """

    options: frozenset[str]

    kv_heads: int | None = None
    head_dim: int | None = None
    max_length: int = 32768
    window: int | None = 4096
    eps: float = 1e-6
    theta: float = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False
    wide_norm: bool = False
    experts: ExpertKeys | None = None


FAMILIES = {
    "llama": Family(frozenset({"attention_bias", "mlp_bias"}), max_length=2048),
    "qwen2": Family(WINDOWS, kv_heads=32, qkv_bias=True),
    "qwen3": Family(WINDOWS | {"attention_bias"}, kv_heads=32, head_dim=128, qk_norm=True),
    "mistral": Family(frozenset({"sliding_window"}), kv_heads=8, max_length=131072),
    "mixtral": Family(
        frozenset({"sliding_window"}), kv_heads=8, max_length=131072, window=None, eps=1e-5, theta=1e6, experts=MIXTRAL
    ),
    "qwen3_moe": Family(
        frozenset({"sliding_window", "use_sliding_window", "attention_bias"}), kv_heads=4, qk_norm=True, experts=QWEN3_MOE
    ),
    "olmoe": Family(
        frozenset({"attention_bias"}), max_length=4096, eps=1e-5, qk_norm=True, wide_norm=True, experts=OLMOE
    ),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """The expected contents of the weight files. stored: the dtype the config names, if any."""

    decoder: DecoderConfig
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tied: bool
    stored: str | None


def read_raw_config(folder: Path) -> dict:
    """Read config.json; refused if it requires its own code to be run."""
    raw = read_json(folder / CONFIG, CONFIG_BYTES)
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
    layers = whole(raw, "num_hidden_layers", where, most=1024)
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
    inv_freq, rope_scale = _rope(raw, family.theta, head_dim, positions, where)
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
        window=_windows(raw, family, layers, where),
        inv_freq=inv_freq,
        rope_scale=rope_scale,
        wide_norm=family.wide_norm,
        clip=real(raw, "clip_qkv", where, 0.0, null=0.0, least=0.0, most=1e9) if family.wide_norm else 0.0,
        experts=None if family.experts is None else read_experts(raw, family.experts, layers, inner, where),
    )
    bias = "attention_bias" in family.options and flag(raw, "attention_bias", where)
    stored = raw.get("dtype") or raw.get("torch_dtype")
    return Layout(
        decoder=decoder,
        qkv_bias=family.qkv_bias or bias,
        o_bias=bias,
        qk_norm=family.qk_norm,
        tied=flag(raw, "tie_word_embeddings", where),
        stored=stored if isinstance(stored, str) else None,
    )


def shapes_of(layout: Layout, head: bool, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a decoder. head: whether the output head is one of its own. fused: whether all experts of a
    layer are in one tensor."""
    c = layout.decoder
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden)}
    if head:
        out["lm_head.weight"] = (c.vocab_size, c.hidden)
    out["model.norm.weight"] = (c.hidden,)
    block, sparse = _block_shapes(layout), {} if c.experts is None else block_shapes(c, fused)
    mlp = {f"mlp.{name}_proj.weight": (c.inner, c.hidden) for name in ("gate", "up")}
    mlp["mlp.down_proj.weight"] = (c.hidden, c.inner)
    for i in range(c.layers):
        rest = sparse if c.experts is not None and c.experts.sparse[i] else mlp
        out |= {f"model.layers.{i}.{name}": shape for name, shape in (*block.items(), *rest.items())}
    return out


def _block_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """A block's tensors but for those of its SwiGLU or experts."""
    c = layout.decoder
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    out: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (c.hidden,),
        "post_attention_layernorm.weight": (c.hidden,),
    }
    for name, size in (("q", queries), ("k", keys), ("v", keys)):
        out[f"self_attn.{name}_proj.weight"] = (size, c.hidden)
        if layout.qkv_bias:
            out[f"self_attn.{name}_proj.bias"] = (size,)
    out["self_attn.o_proj.weight"] = (c.hidden, queries)
    if layout.o_bias:
        out["self_attn.o_proj.bias"] = (c.hidden,)
    if layout.qk_norm:
        wide = (queries, keys) if c.wide_norm else (c.head_dim, c.head_dim)
        out |= {"self_attn.q_norm.weight": wide[:1], "self_attn.k_norm.weight": wide[1:]}
    return out


def _family(raw: dict, where: object) -> Family:
    """The family of the file, after refusing options that the lean runtime does not support."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise Unsupported(f"model_type {reprlib.repr(kind)} is not one of {', '.join(FAMILIES)}")
    named = raw.get("architectures") or []
    if isinstance(named, list) and named and not any(str(n).endswith("ForCausalLM") for n in named):
        raise Unsupported(f"architecture {reprlib.repr(named[0])} is not a causal language model")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise Unsupported(f"hidden_act {reprlib.repr(raw.get('hidden_act'))} is not silu")
    packed = packed_key(raw)
    if packed is not None:
        raise Unsupported(f"the weights are quantized ({packed})")
    family = FAMILIES[kind]
    if "mlp_bias" in family.options and flag(raw, "mlp_bias", where):
        raise Unsupported("mlp_bias is set")
    if not raw.get("is_causal", True) or raw.get("use_bidirectional_attention") or raw.get("is_encoder_decoder"):
        raise Unsupported("its attention is not causal")
    known = COMMON | OPTIONS | (family.experts.known if family.experts else frozenset())
    unknown = unknown_keys(raw, known | ({"clip_qkv"} if family.wide_norm else set()))
    if unknown:
        raise Unsupported(f"config.json has a key {unknown[0][:80]!r} that is not known to be without effect")
    return family


def _windows(raw: dict, family: Family, layers: int, where: object) -> tuple[int, ...]:
    """Sliding window of each layer, 0 for none: a row sees itself and the `window - 1` positions before it."""
    if "sliding_window" not in family.options:
        return (0,) * layers
    if "layer_types" not in family.options:
        absent = raw.get("sliding_window", family.window) is None
        absent |= "use_sliding_window" in family.options and not flag(raw, "use_sliding_window", where)
        return (0 if absent else whole(raw, "sliding_window", where, default=family.window, most=1 << 30),) * layers
    kinds = raw.get("layer_types")
    if not flag(raw, "use_sliding_window", where) or raw.get("sliding_window", family.window) is None:
        width = 0
    else:
        width = whole(raw, "sliding_window", where, default=family.window, most=1 << 30)
    if kinds is None:
        first = whole(raw, "max_window_layers", where, default=28, least=0, most=1 << 20)
        return tuple(width if i >= first else 0 for i in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(f"{where}: layer_types must name {layers} layers: the file is damaged, download it again")
    if any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise Unsupported(f"layer_types has {reprlib.repr(sorted({str(kind) for kind in kinds}))}")
    if "sliding_attention" in kinds and not width:
        raise Unsupported("layer_types has sliding_attention without a sliding_window")
    return tuple(width if kind == "sliding_attention" else 0 for kind in kinds)


def _rope(raw: dict, base: float, head_dim: int, positions: int, where: object) -> tuple[Float[Tensor, "half"], float]:
    """Rotary frequencies and the factor of cos and sin, computed in float32 in the order transformers computes them.

    base: the family's default of rope_theta.
    """
    rope = rope_keys(raw, base)
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise Unsupported("partial_rotary_factor is not 1")
    theta = real(rope, "rope_theta", where, base, least=1.0, most=1e12)
    inv_freq = plain_frequencies(theta, head_dim)
    if kind == "default":
        return inv_freq, 1.0
    if kind == "linear":
        return inv_freq / real(rope, "factor", where, least=1e-6, most=1e6), 1.0
    if kind == "llama3":
        return _llama3(inv_freq, rope, positions, where), 1.0
    if kind == "yarn":
        return _yarn(rope, theta, head_dim, positions, where)
    raise Unsupported(f"rotary scaling {reprlib.repr(kind)}")


def rope_keys(raw: dict, theta: float = 10000.0) -> dict:
    """The rotary parameters of a config.json, wherever it has them; always with rope_theta (default: `theta`) and rope_type."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise Unsupported("rotary parameters differ between layers")
    unknown = unknown_keys(given, ROPE)
    if unknown:
        raise Unsupported(f"the rotary parameters have a key {unknown[0][:80]!r} that is not known here")
    rope = {"rope_theta": raw.get("rope_theta", theta), "rope_type": given.get("type", "default")} | given
    if "original_max_position_embeddings" in raw:  # beside the parameters it takes precedence over a value among them
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    return rope


def plain_frequencies(theta: float, head_dim: int) -> Float[Tensor, "half"]:
    """Rotary frequencies before any scaling, in the order transformers computes them."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


def _llama3(inv_freq: Float[Tensor, "half"], rope: dict, positions: int, where: object) -> Float[Tensor, "half"]:
    """Llama 3.1: divide frequencies slower than the old context by `factor`, keep fast ones, blend between."""
    factor = real(rope, "factor", where, least=1e-6, most=1e6)
    low, high = (
        real(rope, "low_freq_factor", where, least=1e-6, most=1e6),
        real(rope, "high_freq_factor", where, least=1e-6, most=1e6),
    )
    if high <= low:
        raise ConfigError(f"{where}: high_freq_factor ({high}) must exceed low_freq_factor ({low}): correct the file")
    old = whole(rope, "original_max_position_embeddings", where, default=positions, most=1 << 26)
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > old / low, inv_freq / factor, inv_freq)
    smooth = (old / wavelength - low) / (high - low)
    between = ~(wavelength < old / high) * ~(wavelength > old / low)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled)


def _yarn(
    rope: dict, theta: float, head_dim: int, positions: int, where: object
) -> tuple[Float[Tensor, "half"], float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate slow frequencies, keep fast ones, a ramp between."""
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise Unsupported("yarn with mscale")
    if "factor" not in rope:
        raise Unsupported("yarn without a factor")
    old = whole(rope, "original_max_position_embeddings", where, default=positions, most=1 << 26)
    factor = real(rope, "factor", where, positions / old, null=positions / old, least=1e-6, most=1e6)

    def dimension(rotations: float) -> float:
        return (head_dim * math.log(old / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low = dimension(real(rope, "beta_fast", where, 32.0, null=32.0, least=1e-6, most=1e6))
    high = dimension(real(rope, "beta_slow", where, 1.0, null=1.0, least=1e-6, most=1e6))
    if rope.get("truncate", True) is not None and flag(rope, "truncate", where, True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / ((high + 0.001 if low == high else high) - low)).clamp(0, 1)
    powers = theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    keep = 1 - ramp
    default = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    scale = real(rope, "attention_factor", where, default, null=default, least=1e-6, most=1e6)
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep, scale
