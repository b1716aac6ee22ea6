"""The configuration keys of a folder of Medusa heads, in vLLM's layout, and of one whose heads follow one another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.config_keys import flag, real, whole
from outrider.drafters.config_keys import check_keys, check_layers, layer_ids
from outrider.errors import ConfigError
from outrider.protocols import Target

READ = frozenset({
    "hidden_size", "vocab_size", "truncated_vocab_size", "num_heads", "num_hidden_layers", "medusa_fc_bias", "original_lm_head",
    "rms_norm_eps", "target_layer", "hidden_act", "max_position_embeddings",
    "max_paths", "topk", "num_lookahead_tokens", "n_predict", "version",  # how other programs draft with the same heads
})  # fmt: skip
"""Keys of a folder of heads."""
SEQUENTIAL = frozenset({
    "architectures", "model_type", "sequential", "hidden_size", "vocab_size", "width", "intermediate_size", "num_hidden_layers",
    "hidden_act", "rms_norm_eps", "target_layers",
})  # fmt: skip
"""Keys of a folder of sequential heads."""


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """hidden: of the target. heads: positions ahead. layers: residual blocks of a head. shared: one output matrix for all heads.

    tap: number of the target's block whose output is read; the target's number of blocks for its last one. draft_vocab: tokens
    that are drafted, 0 for all.
    """

    hidden: int
    vocab_size: int
    heads: int
    tap: int
    layers: int = 1
    shared: bool = True
    eps: float = 1e-6
    draft_vocab: int = 0


def read_config(config: dict[str, Any], folder: Path, target: Target) -> MedusaConfig:
    check_keys(config, READ, folder)
    check_layers({**config, "model_type": "medusa"}, folder, "medusa")
    hidden, vocab_size = whole(config, "hidden_size", folder), whole(config, "vocab_size", folder)
    size = config.get("truncated_vocab_size") or vocab_size
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= vocab_size:
        raise ConfigError(f"{folder}: truncated_vocab_size must be a whole number of 1 .. {vocab_size}, got {size!r}")
    return MedusaConfig(
        hidden=hidden,
        vocab_size=vocab_size,
        heads=whole(config, "num_heads", folder, most=64),
        tap=whole(config, "target_layer", folder, default=target.layers),
        layers=whole(config, "num_hidden_layers", folder, most=64),
        shared=flag(config, "original_lm_head", folder),
        eps=real(config, "rms_norm_eps", folder, 1e-6),
        draft_vocab=0 if size == vocab_size else size,
    )


@dataclass(frozen=True, slots=True)
class SequentialConfig:
    """hidden, vocab_size: of the target. taps: its blocks whose outputs are read. width: of the heads. inner: of their residual
    blocks, of which each level goes through `layers`."""

    hidden: int
    vocab_size: int
    taps: tuple[int, ...]
    width: int
    inner: int
    layers: int = 1
    eps: float = 1e-6


def read_sequential(config: dict[str, Any], folder: Path) -> SequentialConfig:
    """Raises ConfigError for a folder of other heads, or values that are missing or out of range."""
    if not flag(config, "sequential", folder):
        raise ConfigError(f"{folder} holds heads that do not follow one another (no 'sequential' in config.json)")
    check_keys(config, SEQUENTIAL, folder)
    check_layers(config, folder, "medusa")
    return SequentialConfig(
        hidden=whole(config, "hidden_size", folder),
        vocab_size=whole(config, "vocab_size", folder),
        taps=layer_ids(config, "target_layers", folder, []),
        width=whole(config, "width", folder),
        inner=whole(config, "intermediate_size", folder),
        layers=whole(config, "num_hidden_layers", folder, most=64),
        eps=real(config, "rms_norm_eps", folder, 1e-6),
    )
