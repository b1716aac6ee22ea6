"""What each release of vLLM takes as `speculative_config`: frozen tables, so that a configuration is checked where no vLLM is.

Read in the source of the released wheels (`vllm/config/speculative.py`); `tests/outside/plan` compares them with the wheels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outrider.errors import ConfigError, unknown_name

_KEYS_032 = frozenset({
    "enforce_eager", "num_speculative_tokens", "model", "method", "draft_tensor_parallel_size", "tensor_parallel_size",
    "quantization", "moe_backend", "attention_backend", "kv_cache_dtype", "max_model_len", "revision", "code_revision",
    "index_share_for_mtp_iteration", "disable_padded_drafter_batch", "disable_eagle_block_drop", "use_local_argmax_reduction",
    "use_heterogeneous_vocab", "prompt_lookup_max", "prompt_lookup_min", "parallel_drafting",
    "num_speculative_tokens_per_batch_size", "suffix_decoding_max_tree_depth", "suffix_decoding_max_cached_requests",
    "suffix_decoding_max_spec_factor", "suffix_decoding_min_token_prob", "draft_load_config", "rejection_sample_method",
    "synthetic_acceptance_rates", "synthetic_acceptance_length", "enable_adaptive_verification", "draft_sample_method",
    "dspark_draft_topk",
})  # fmt: skip
_METHODS_032 = frozenset({
    "ngram", "ngram_gpu", "medusa", "mlp_speculator", "draft_model", "suffix", "custom_class", "eagle", "eagle3",
    "extract_hidden_states", "dflash", "dspark", "mtp",
})  # fmt: skip
INTERNAL = frozenset({"target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config"})
"""Fields of the class that vLLM fills in itself."""
_LENGTH_BY_LOAD = frozenset({"ngram", "eagle", "eagle3", "mtp", "draft_model", "dflash"})


@dataclass(frozen=True, slots=True)
class VllmVersion:
    """keys: of `speculative_config`, without `INTERNAL`. methods: without the per-model names of `mtp`, which are deprecated.

    rules: values of `rejection_sample_method`. by_load: methods that obey `num_speculative_tokens_per_batch_size` under both of
    its model runners; for others the older one drops the schedule with a warning.
    """

    name: str
    keys: frozenset[str]
    methods: frozenset[str]
    rules: frozenset[str]
    by_load: frozenset[str] = _LENGTH_BY_LOAD

    def check(self, config: Mapping[str, Any]) -> None:
        """Raises ConfigError for what this release would refuse, or drop with a warning, in a `speculative_config`."""
        for key in config:
            if key not in self.keys:
                raise ConfigError(f"vLLM {self.name}: {unknown_name('key of speculative_config', str(key), self.keys)}")
        method, rule = config.get("method"), config.get("rejection_sample_method")
        if method is not None and method not in self.methods and not str(method).endswith("_mtp"):
            raise ConfigError(f"vLLM {self.name} has no method {method!r}{self._elsewhere(method)}")
        if rule is not None and rule not in self.rules:
            raise ConfigError(f"vLLM {self.name} has no rejection_sample_method {rule!r}")
        if config.get("draft_sample_method") not in (None, "greedy", "probabilistic"):
            raise ConfigError(f"vLLM {self.name}: draft_sample_method is greedy or probabilistic")
        length = config.get("num_speculative_tokens")
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ConfigError(f"vLLM {self.name}: num_speculative_tokens must be a whole number >= 1, got {length!r}")
        schedule = config.get("num_speculative_tokens_per_batch_size")
        if schedule is not None:
            check_schedule(schedule, length)
            if method is not None and method not in self.by_load:
                raise ConfigError(f"vLLM {self.name} drops lengths by batch size for method {method!r}")

    @staticmethod
    def _elsewhere(method: object) -> str:
        have = [v.name for v in VERSIONS.values() if method in v.methods]
        return f": it is one of vLLM {' and '.join(have)}" if have else ""


VERSIONS: Mapping[str, VllmVersion] = {
    "0.32": VllmVersion("0.32", _KEYS_032, _METHODS_032, frozenset({"standard", "synthetic", "block"})),
    "0.33": VllmVersion(
        "0.33",
        _KEYS_032
        | {
            "disable_lookahead_block_hashes", "draft_lm_head_quantization", "xpress_topc", "fly_window_size",
            "fly_entropy_threshold", "fly_entropy_top_k",
        },
        _METHODS_032 - {"medusa", "mlp_speculator"},
        frozenset({"standard", "synthetic", "block", "fly"}),
    ),
}  # fmt: skip


NEWEST = list(VERSIONS)[-1]


def version(name: str) -> VllmVersion:
    """The table of a release, by "0.33" or "0.33.1". Raises ConfigError for a release that was not read."""
    found = VERSIONS.get(".".join(name.split(".")[:2]))
    if found is None:
        raise ConfigError(f"vLLM {name!r} was not read; known releases: {', '.join(VERSIONS)}")
    return found


def check_some(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a configuration that no known release takes: what the newest one says against it."""
    refused: ConfigError | None = None
    for release in VERSIONS.values():
        try:
            release.check(config)
        except ConfigError as error:
            refused = error
        else:
            return
    assert refused is not None
    raise refused


def check_schedule(schedule: object, longest: int | None) -> None:
    """Ranges [first, last, length] of batch sizes: the first begins at 1, none overlap, no length is above `longest`.

    A gap takes the length before it, and batches beyond the last range the last one's, in vLLM.
    """
    if not isinstance(schedule, list | tuple) or not schedule:
        raise ConfigError("num_speculative_tokens_per_batch_size is a list of [first, last, length]")
    end = 0
    for entry in schedule:
        whole = isinstance(entry, list | tuple) and len(entry) == 3
        if not whole or not all(isinstance(x, int) and not isinstance(x, bool) for x in entry):
            raise ConfigError(f"num_speculative_tokens_per_batch_size: expected [first, last, length], got {entry!r}")
        first, last, length = entry
        if first <= end or last < first or length < 0 or (end == 0 and first != 1):
            raise ConfigError(
                "num_speculative_tokens_per_batch_size: ranges begin at batch size 1, rise and do not overlap, lengths are >= 0; "
                f"got {entry!r}"
            )
        if longest is not None and length > longest:
            raise ConfigError(
                f"num_speculative_tokens_per_batch_size has length {length} above num_speculative_tokens {longest}"
            )
        end = last
