"""The families that the lean runtime has, as rows of one table: their parts, and transformers' defaults of absent keys."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.config_keys import WINDOWS
from outrider.models.expert_keys import GPT_OSS, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE, ExpertKeys

LLAMA_NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
GEMMA_NORMS = {
    "norm1": "input_layernorm",
    "post1": "post_attention_layernorm",
    "norm2": "pre_feedforward_layernorm",
    "post2": "post_feedforward_layernorm",
}


class Unsupported(Exception):
    """The lean runtime does not support this checkpoint, transformers may; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Family:
    """The parts of a model type, and transformers' defaults of absent keys.

    options: keys of `config_keys.OPTIONS` that its class reads; the others have no effect if they occur in its files. norms: a
    block's norms (fields of `LayerWeights`) -> their names in its files. wide_norms: they are multiplied before half precision is
    rounded. shifted: they multiply by 1 + weight. qk_norm: of queries and keys, "" none, "head" each head alone, "row" all heads
    of a row together. fused: linears ("qkv", "gate_up") that its files hold as one. act: the key of the activation. partial:
    `partial_rotary_factor` is read; rotary: its default. longrope: its only scaling. interleaved: pairs are neighbours, not
    halves. pattern: of every so many layers the last sees everything and the others a window (0: no such default). roots:
    embeddings are multiplied by the root of their size. o_bias: `attention_bias` is of the output too.
    experts: its layers may be mixtures of experts. clip: `clip_qkv` is read. sinks: heads have a score that takes weight and adds
    nothing; scaled: there is no default of how positions are scaled.
    """

    options: frozenset[str]

    kv_heads: int | None = None
    head_dim: int | None = None
    max_length: int = 32768
    window: int = 4096
    theta: float = 10000.0
    eps: float = 1e-6
    tied: bool = False
    attention_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = True
    qk_norm: str = ""
    norms: tuple[tuple[str, str], ...] = tuple(LLAMA_NORMS.items())
    wide_norms: bool = False
    shifted: bool = False
    fused: frozenset[str] = frozenset()
    act: str = "hidden_act"
    activation: str = "silu"
    partial: bool = False
    rotary: float = 1.0
    longrope: bool = False
    interleaved: bool = False
    pattern: int = 0
    roots: bool = False
    experts: ExpertKeys | None = None
    clip: bool = False
    sinks: bool = False
    scaled: bool = False


_GEMMA = {
    "wide_norms": True, "shifted": True, "activation": "gelu_pytorch_tanh", "head_dim": 256, "max_length": 8192, "tied": True,
    "roots": True,
}  # fmt: skip
_GEMMA_KEYS = frozenset(
    {"attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types", "final_logit_softcapping"}
)
_GEMMA_LATER = _GEMMA | {
    "kv_heads": 4,
    "norms": tuple(GEMMA_NORMS.items()),
    "act": "hidden_activation",
}

FAMILIES = {
    "llama": Family(frozenset({"attention_bias", "mlp_bias"}), max_length=2048),
    "qwen2": Family(WINDOWS, kv_heads=32, qkv_bias=True),
    "qwen3": Family(WINDOWS | {"attention_bias"}, kv_heads=32, head_dim=128, qk_norm="head"),
    # Ministral, if layer types are named
    "mistral": Family(frozenset({"sliding_window", "layer_types"}), kv_heads=8, max_length=131072),
    "gemma": Family(frozenset({"attention_bias"}), kv_heads=16, **_GEMMA),  # type: ignore[arg-type]
    "gemma2": Family(_GEMMA_KEYS | {"attn_logit_softcapping"}, pattern=2, **_GEMMA_LATER),  # type: ignore[arg-type]
    "gemma3_text": Family(
        _GEMMA_KEYS | {"sliding_window_pattern", "rope_local_base_freq"},
        pattern=6, theta=1e6, qk_norm="head", **(_GEMMA_LATER | {"max_length": 131072}),  # type: ignore[arg-type]
    ),
    "phi3": Family(
        frozenset({"sliding_window"}), max_length=4096, window=0, eps=1e-5, fused=frozenset({"qkv", "gate_up"}),
        partial=True, longrope=True,
    ),
    "olmo2": Family(
        frozenset({"attention_bias"}), max_length=2048, eps=1e-5, qk_norm="row", wide_norms=True,
        norms=(("post1", "post_attention_layernorm"), ("post2", "post_feedforward_layernorm")),
    ),
    "granite": Family(
        frozenset({
            "attention_bias", "mlp_bias", "embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier",
        }),
        max_length=2048,
    ),
    "smollm3": Family(
        frozenset({
            "attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "sliding_window",
            "layer_types",
        }),
        kv_heads=4, window=0, theta=2e6, tied=True,
    ),
    "glm4": Family(
        frozenset({"attention_bias"}), kv_heads=2, head_dim=128, max_length=131072, eps=1.5625e-07, attention_bias=True,
        o_bias=False, fused=frozenset({"gate_up"}), partial=True, rotary=0.5, interleaved=True,
        norms=(*LLAMA_NORMS.items(), ("post1", "post_self_attn_layernorm"), ("post2", "post_mlp_layernorm")),
    ),
    "mixtral": Family(
        frozenset({"sliding_window"}), kv_heads=8, max_length=131072, window=0, eps=1e-5, theta=1e6, experts=MIXTRAL,
    ),
    "qwen3_moe": Family(
        frozenset({"sliding_window", "use_sliding_window", "attention_bias"}), kv_heads=4, qk_norm="head", experts=QWEN3_MOE,
    ),
    "qwen2_moe": Family(WINDOWS | {"qkv_bias"}, kv_heads=16, qkv_bias=True, experts=QWEN2_MOE),
    "olmoe": Family(
        frozenset({"attention_bias"}), max_length=4096, eps=1e-5, qk_norm="row", experts=OLMOE, clip=True,
    ),
    "gpt_oss": Family(
        frozenset({"attention_bias", "sliding_window", "layer_types"}), kv_heads=8, head_dim=64, max_length=131072, window=128,
        theta=150000.0, eps=1e-5, attention_bias=True, wide_norms=True, pattern=2, experts=GPT_OSS, sinks=True, scaled=True,
    ),
}  # fmt: skip
"""By `model_type`."""
