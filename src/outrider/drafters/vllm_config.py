"""vLLM's `speculative_config`, read unchanged: supported keys are applied, all others are refused.

Keys and values are those of the releases in `vllm_versions`: a configuration that none of them takes is refused. A key that only
affects vLLM's own kernels is accepted for the values that match the behaviour here, and refused for all others; nothing is
accepted and ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from outrider.drafters import vllm_versions
from outrider.errors import ConfigError, unknown_name
from outrider.files import parse_json

RULES = {"standard": "speculative_sampling", "block": "block"}
DEFAULT_NGRAM = 5
"""vLLM's prompt_lookup_min and _max when neither is given."""

_READ = (
    "method", "model", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min", "quantization",
    "rejection_sample_method", "draft_sample_method", "draft_vocabulary",
)  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "draft_tensor_parallel_size": (None, 1),
    "tensor_parallel_size": (None,),
    "draft_load_config": (None,),
    "index_share_for_mtp_iteration": (None,),
    "disable_lookahead_block_hashes": (None, True, False),
    "parallel_drafting": (None, False),
    "use_heterogeneous_vocab": (None, False),
    "enable_adaptive_verification": (None, False),
    "use_local_argmax_reduction": (None, False),
    "enforce_eager": (None, True, False),
    "disable_padded_drafter_batch": (None, True, False),
    "disable_eagle_block_drop": (None, False),
    "kv_cache_dtype": (None, "auto"),
    "attention_backend": (None,),
    "moe_backend": (None, "auto"),
    "max_model_len": (None,),
    "revision": (None,),
    "code_revision": (None,),
    "draft_lm_head_quantization": (None,),
    "num_speculative_tokens_per_batch_size": (None,),
    "suffix_decoding_max_tree_depth": (None,),
    "suffix_decoding_max_cached_requests": (None,),
    "suffix_decoding_max_spec_factor": (None,),
    "suffix_decoding_min_token_prob": (None,),
    "synthetic_acceptance_rates": (None,),
    "synthetic_acceptance_length": (None,),
    "fly_window_size": (None,),
    "fly_entropy_threshold": (None,),
    "fly_entropy_top_k": (None,),
    "dspark_draft_topk": (None,),
    "xpress_topc": (None,),
}


def engine_options(
    config: str | Mapping[str, Any], learned: Mapping[str, str], carried: Set[str] = frozenset()
) -> dict[str, Any]:
    """Engine options for vLLM's `speculative_config` (a JSON text or an object).

    learned: vLLM's methods that are drafters trained for one target, with their names here. carried: those of
    them that the target's own checkpoint may hold, so that no model need be named.

    Returns `draft` (a spec of `load_drafter`) and, if given, `length`, `rule`, `draft_quantize` and `draft_vocabulary` (a key that
    vLLM does not have: see `EngineOptions`). Without
    `draft_sample_method` a draft model samples from its distribution, while vLLM proposes its most likely tokens: the text has
    the same distribution, and more draft tokens are accepted. Raises ConfigError for anything that is not supported.
    """
    values = _object(config)
    _refuse_unsupported(values)
    options: dict[str, Any] = {"draft": _drafter(values, learned, carried)}
    length = values.get("num_speculative_tokens")
    if length is not None:
        options["length"] = _whole("num_speculative_tokens", length)
    method = values.get("rejection_sample_method")
    if method is not None:
        options["rule"] = _choice("rejection_sample_method", method, RULES)
    if values.get("quantization") is not None:
        options["draft_quantize"] = values["quantization"]
    if values.get("draft_vocabulary") is not None:
        options["draft_vocabulary"] = values["draft_vocabulary"]
    vllm_versions.check_some({k: v for k, v in values.items() if k != "draft_vocabulary"})
    return options


def _object(config: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, str):
        config = parse_json(config, "speculative_config")
    if not isinstance(config, Mapping):
        raise ConfigError(f"speculative_config must be a JSON object, got {type(config).__name__}")
    return dict(config)


def _refuse_unsupported(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key in _READ:
            continue
        if key not in _NEUTRAL:
            raise ConfigError(unknown_name("key of speculative_config", str(key), (*_READ, *_NEUTRAL)))
        fine = _NEUTRAL[key]
        if not any(type(value) is type(v) and value == v for v in fine):
            allowed = [json.dumps(v) for v in fine if v is not None]
            remedy = f"only {' or '.join(allowed)} is supported" if allowed else "it is not supported, remove it"
            raise ConfigError(f"speculative_config key {key!r} has the value {value!r}: {remedy}")


def _drafter(values: dict[str, Any], learned: Mapping[str, str], carried: Set[str]) -> str:
    """The `load_drafter` spec."""
    model = values.get("model")
    if model is not None and not (isinstance(model, str) and model):
        raise ConfigError(f"speculative_config key 'model' must be a path or a Hub name, got {model!r}")
    method = values.get("method") or ("ngram" if model == "ngram" else "draft_model")
    _choice("method", method, {m: m for m in ("draft_model", "ngram", *learned)})
    if method == "ngram":
        _only("ngram", values, ("quantization", "draft_sample_method", "draft_vocabulary"))
        if model not in (None, "ngram"):
            raise ConfigError(
                f"speculative_config names the model {model!r}, which method 'ngram' does not use: remove one"
            )
        low, high = _ngram_sizes(values)
        return f"ngram:{low}-{high}"
    of_models = ("quantization", "draft_vocabulary") if method in learned else ()
    _only(method, values, ("prompt_lookup_max", "prompt_lookup_min", *of_models))
    if model is None and method not in carried:
        raise ConfigError(f"speculative_config needs 'model' (a path or a Hub name) for method {method!r}")
    how = values.get("draft_sample_method") or "probabilistic"
    prefix = _choice("draft_sample_method", how, {"greedy": "greedy:", "probabilistic": ""})
    return prefix + ":".join(part for part in (learned.get(method), model) if part)


def _ngram_sizes(values: dict[str, Any]) -> tuple[int, int]:
    low, high = values.get("prompt_lookup_min"), values.get("prompt_lookup_max")
    if low is None and high is None:
        low = high = DEFAULT_NGRAM
    low, high = (high if low is None else low), (low if high is None else high)
    low, high = _whole("prompt_lookup_min", low), _whole("prompt_lookup_max", high)
    if low > high:
        raise ConfigError(f"prompt_lookup_min ({low}) must be <= prompt_lookup_max ({high})")
    return low, high


def _only(method: str, values: dict[str, Any], foreign: tuple[str, ...]) -> None:
    for key in foreign:
        if values.get(key) is not None:
            raise ConfigError(f"speculative_config key {key!r} has no effect for method {method!r}: remove it")


def _choice(key: str, value: object, known: Mapping[str, str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"speculative_config key {key!r} has the value {value!r}; supported: {', '.join(known)}")
    return known[value]


def _whole(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"speculative_config key {key!r} must be a whole number >= 1, got {value!r}")
    return value
