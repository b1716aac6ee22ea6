"""Keys of a model's configuration: those that do not affect what the network computes, and how the others are read.

Every other key of a configuration is read, or the model is refused by a reader that does not support it: ignoring a key could
change the text. A test checks the list against transformers: none of these changes a logit of a supported family.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Set
from typing import Any

from outrider.errors import ConfigError

GENERATION = frozenset({
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff",
    "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
    "max_length", "min_length", "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
"""Generation settings in old config.json files; transformers 5 removes them and does not use them."""

BOOKKEEPING = GENERATION | frozenset({
    # about the file
    "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "dtype",
    "torch_dtype", "torchscript", "use_bfloat16", "tokenizer_class", "prefix", "unsloth_fixed", "unsloth_version",
    "base_model_name", "base_model_name_or_path", "license", "language", "pipeline_tag", "_attn_implementation_autoset",
    "_flash_attn_2_enabled", "model_max_length", "max_sequence_length", "is_llama_config", "rope_interleaved", "use_mrope",
    "transformers.js_config", "attn_implementation", "_sliding_window_pattern",
    # labels and tasks
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    # tokens; which of them end a text is read elsewhere
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
    # how a library runs the model, and how it was trained
    "use_cache", "output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward", "pretraining_tp",
    "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "tie_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "is_decoder", "pruned_heads",
    # heads for drafting, which a target leaves out
    "num_nextn_predict_layers",
})  # fmt: skip

WINDOWS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
LAYER_OPTIONS = WINDOWS | {"attention_bias", "mlp_bias"}
"""Keys of some families that a drafter's layer may have too."""
OPTIONS = LAYER_OPTIONS | {
    "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "hidden_activation", "sliding_window_pattern",
    "rope_local_base_freq", "embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier",
    "no_rope_layers", "no_rope_layer_interval", "qkv_bias",
}  # fmt: skip
"""Keys of some of the families."""
COMMON = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", "auto_map",
    "is_causal", "use_bidirectional_attention", "is_encoder_decoder",
})  # fmt: skip
"""Keys of all families."""
ROPE = frozenset({
    "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "partial_rotary_factor",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "truncate", "mscale", "mscale_all_dim",
    "finetuned", "mrope_section", "short_factor", "long_factor",
})  # fmt: skip
"""Keys of rotary parameters; keys of another kind than the named one have no effect."""


def unknown_keys(raw: Mapping[str, Any], known: Set[str]) -> list[str]:
    """Keys of a configuration that are neither known to its reader nor without effect, sorted; null values are ignored."""
    return sorted(str(key) for key, value in raw.items() if value is not None and key not in known | BOOKKEEPING)


PACKED = ("quantization_config", "compression_config", "quantization")


def packed_key(config: Mapping[str, Any]) -> str | None:
    """The key of a configuration that marks its weights as quantized, if there is one."""
    return next((key for key in PACKED if config.get(key) is not None), None)


def whole(
    config: Mapping[str, Any],
    key: str,
    where: object,
    *,
    default: int | None = None,
    null: int | None = None,
    least: int = 1,
    most: int = 1 << 24,
) -> int:
    """config[key] as a whole number of [least, most]; `default` if the key is absent, `null` if its value is null.

    where: the file or folder that the error names. Raises ConfigError for anything else.
    """
    value = config.get(key, default)
    value = null if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(
            f"{where}: {key} must be a whole number from {least} to {most}, got {reprlib.repr(value)}: "
            "the file is damaged, download it again"
        )
    return value


def real(
    config: Mapping[str, Any],
    key: str,
    where: object,
    default: float | None = None,
    *,
    null: float | None = None,
    least: float | None = None,
    most: float = 1.0,
) -> float:
    """The same for a number of [least, most], or of (0, most] without `least`."""
    value = config.get(key, default)
    value = null if value is None else value
    number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else value
    if not number <= most or not (number > 0 if least is None else number >= least):
        allowed = f"above 0, at most {most:g}" if least is None else f"from {least:g} to {most:g}"
        raise ConfigError(
            f"{where}: {key} must be a number {allowed}, got {reprlib.repr(value)}: "
            "the file is damaged, download it again"
        )
    return float(number)


def flag(config: Mapping[str, Any], key: str, where: object, default: bool = False) -> bool:
    """The same for true or false; null is the default."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {key} must be true or false, got {reprlib.repr(value)}: correct the file")
    return value
