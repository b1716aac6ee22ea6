"""The configuration keys of a block drafter's folder, in the `speculators` layout of DFlash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.config_keys import whole
from outrider.drafters.checkpoint import SPECULATORS_VERSION, speculators_config
from outrider.drafters.config_keys import (
    LAYER,
    SPECULATORS,
    check_keys,
    check_layers,
    layer_ids,
    layer_keys,
    layer_shape,
)
from outrider.errors import ConfigError
from outrider.protocols import Target

TABLES = ("embed_tokens.weight", "lm_head.weight")
"""The target's own tables: read from the target, and written only on request."""
TAPS = "aux_hidden_state_layer_ids"
READ = frozenset({TAPS, "block_size", "mask_token_id", "sample_from_anchor", "sliding_window_non_causal"}) | SPECULATORS
"""Keys at the top of a folder."""


@dataclass(frozen=True, slots=True)
class DFlashConfig:
    """hidden: width of target and drafter. taps: blocks of the target whose outputs are read (0: the embeddings).

    block: slots, including the anchor's; block - 1 tokens are drafted. mask: id of the token in the other slots.
    layers: decoder layers of the drafter. inner: width of their feed-forward parts.
    """

    hidden: int
    taps: tuple[int, ...]
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    block: int
    mask: int
    layers: int = 1
    eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.block < 2 or not self.taps or self.layers < 1:
            raise ConfigError("a block drafter needs a block of at least 2 slots, one tap and one layer")
        if not 0 <= self.mask < self.vocab_size:
            raise ConfigError(f"the mask token {self.mask} is not one of the {self.vocab_size} tokens")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ConfigError("heads must be a multiple of kv_heads, and head_dim even")


def layout(c: DFlashConfig, verifier: str) -> dict[str, Any]:
    """config.json. Attention is full and bidirectional; vLLM needs the flag for it, and would use causal attention without it."""
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": SPECULATORS_VERSION,
        "draft_vocab_size": c.vocab_size,
        "target_hidden_size": None,
        "block_size": c.block,
        "mask_token_id": c.mask,
        "aux_hidden_state_layer_ids": list(c.taps),
        "sample_from_anchor": False,
        "sliding_window_non_causal": True,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "speculators_config": speculators_config("dflash", c.block - 1, verifier),
        "transformer_layer_config": {
            "model_type": "qwen3",
            **layer_keys(c, c.layers),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
            "layer_types": ["full_attention"] * c.layers,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
    }


def read_config(config: dict[str, Any], folder: Path, target: Target) -> DFlashConfig:
    shape = config.get("transformer_layer_config")
    if not isinstance(shape, dict):
        raise ConfigError(f"{folder}: transformer_layer_config must describe layers")
    check_keys(config, READ, folder)
    check_keys(shape, LAYER, folder)
    check_layers(shape, folder, "qwen3")
    layers = whole(shape, "num_hidden_layers", folder, most=64)
    if config.get("sample_from_anchor"):
        raise ConfigError(
            f"{folder}: sample_from_anchor is not supported: use a drafter whose anchor slot makes no prediction"
        )
    made = layer_shape(shape, folder)
    if config.get("draft_vocab_size", made["vocab_size"]) != made["vocab_size"]:
        raise ConfigError(f"{folder}: a reduced draft vocabulary is not supported: train with the full one")
    mask = config.get("mask_token_id")
    if isinstance(mask, bool) or not isinstance(mask, int):
        raise ConfigError(f"{folder}: mask_token_id must be a token, got {mask!r}")
    return DFlashConfig(
        **made,
        taps=layer_ids(config, TAPS, folder, [2, target.layers // 2, target.layers - 3]),
        block=whole(config, "block_size", folder, default=8, most=256),
        mask=mask,
        layers=layers,
    )
