"""Keys of the configurations of learned drafters: every key is read, has no effect, or is refused by name.

Ignoring a key without a message could give another drafter than the one that was trained: no text would change, but drafts would
be rejected for no visible reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, TypedDict

from outrider.config_keys import COMMON, LAYER_OPTIONS, ROPE, packed_key, real, unknown_keys, whole
from outrider.errors import ConfigError

LAYER = COMMON | LAYER_OPTIONS | {"qkv_bias"}
"""Keys that describe decoder layers: in `transformer_layer_config`, or at the top level of EAGLE's own folders."""
SPECULATORS = frozenset({
    "speculators_model_type", "speculators_version", "speculators_config", "transformer_layer_config", "auto_map",
    "has_no_defaults_at_init", "draft_vocab_size", "target_hidden_size", "tie_word_embeddings", "embed_requires_grad",
})  # fmt: skip
"""Keys that all drafters in the `speculators` layout have at the top level."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "partial_rotary_factor": (1,),
    "use_sliding_window": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "rope_scaling": ({},),
}
"""Keys of layers with the only supported values; null is always supported."""


def check_keys(config: Mapping[str, Any], known: Set[str], folder: Path) -> None:
    """Raise ConfigError, with its name, for a top-level key of a configuration that is not read."""
    packed = packed_key(config)
    if packed is not None:
        raise ConfigError(
            f"{folder} holds quantized weights ({packed}): use the drafter in bfloat16, as it was trained"
        )
    unknown = unknown_keys(config, known)
    if unknown:
        raise ConfigError(
            f"{folder}: config.json has the key {unknown[0][:80]!r}, which is not supported for this drafter"
        )


def check_layers(shape: Mapping[str, Any], folder: Path, family: str) -> None:
    """Raise ConfigError for a description of decoder layers of another `family` or with an unsupported part."""
    kind = shape.get("model_type", family)
    if kind != family:
        raise ConfigError(f"{folder}: layers of type {kind!r} are not supported, only {family!r}: use another drafter")
    for key, fine in NEUTRAL.items():
        value = shape.get(key)
        if value is not None and value not in fine:
            raise ConfigError(f"{folder}: {key} = {str(value)[:80]} is not supported: use a drafter without it")
    kinds = shape.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(k != "full_attention" for k in kinds)):
        raise ConfigError(
            f"{folder}: sliding windows (layer_types) are not supported: use a drafter with full attention"
        )
    if shape.get("sliding_window") is not None and kinds is None and shape.get("use_sliding_window") is not False:
        raise ConfigError(f"{folder}: sliding_window is not supported: use a drafter with full attention")


class LayerShape(TypedDict):
    """Sizes of a decoder layer, its epsilon and its rotary base, by the names of a drafter's configuration."""

    hidden: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float
    rope_theta: float


def layer_shape(shape: Mapping[str, Any], folder: Path) -> LayerShape:
    """The sizes in a description of decoder layers. Raises ConfigError for values that are missing or out of range."""
    hidden, heads = whole(shape, "hidden_size", folder), whole(shape, "num_attention_heads", folder)
    return LayerShape(
        hidden=hidden,
        vocab_size=whole(shape, "vocab_size", folder),
        heads=heads,
        kv_heads=whole(shape, "num_key_value_heads", folder, default=heads),
        head_dim=whole(shape, "head_dim", folder, default=max(1, hidden // heads)),
        inner=whole(shape, "intermediate_size", folder),
        eps=real(shape, "rms_norm_eps", folder, 1e-6),
        rope_theta=rope_theta(shape, folder),
    )


def layer_keys(c: Any, layers: int) -> dict[str, Any]:
    """What `layer_shape` reads of so many decoder layers, but for the rotary base, which formats write in ways of their own.

    c: the configuration of a network, with the fields of `LayerShape`.
    """
    return {
        "hidden_size": c.hidden,
        "intermediate_size": c.inner,
        "num_hidden_layers": layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.eps,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": 1 << 20,
    }


def rope_theta(shape: Mapping[str, Any], folder: Path) -> float:
    """The base of plain rotary positions; raises ConfigError for any other kind."""
    rope = shape.get("rope_parameters")
    rope = {} if rope is None else rope
    if not isinstance(rope, dict) or unknown_keys(rope, ROPE) or any(isinstance(v, dict) for v in rope.values()):
        raise ConfigError(f"{folder}: rope_parameters must describe plain rotary positions, got {str(rope)[:80]}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{folder}: rotary positions of type {kind!r} are not supported")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError(f"{folder}: partial_rotary_factor is not supported: use a drafter without it")
    return real(rope if rope.get("rope_theta") is not None else shape, "rope_theta", folder, 10000.0, most=1e12)


def layer_ids(config: Mapping[str, Any], key: str, folder: Path, default: list[int]) -> tuple[int, ...]:
    """The target's layers that are read; null is the default, an empty list is refused."""
    taps = config.get(key)
    taps = default if taps is None else taps
    if not isinstance(taps, list) or not taps or not all(isinstance(t, int) and not isinstance(t, bool) for t in taps):
        raise ConfigError(f"{folder}: {key} must be a list of layers, got {str(taps)[:80]}")
    return tuple(taps)
