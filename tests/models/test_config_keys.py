"""Every key of a configuration is used as transformers uses it, without effect there too, or refused."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from outrider.config_keys import BOOKKEEPING
from outrider.errors import ConfigError
from outrider.models.checkpoint import load_checkpoint
from outrider.models.config import FAMILIES, Unsupported, layout_of, read_raw_config
from outrider.models.lean import LeanTarget
from outrider.types import Draft, Rows
from tests.checkpoints import BOUNDS, edit_config, make_checkpoint
from tests.covering import slow_beyond

TOKENS = [5, 17, 3, 40, 88, 9, 61, 2, 33, 71, 12, 50]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VALUES: dict[str, list[Any]] = {
    "sliding_window": [4, 0, None, -1, 10**6],
    "use_sliding_window": [True, None, 1],
    "max_window_layers": [0, 1, None],
    "layer_types": [
        ["sliding_attention", "full_attention", "full_attention"],
        ["full_attention"] * 3, ["full_attention"], ["attention"] * 3, ["linear_attention"] * 3, None, "full_attention",
    ],
    "attention_bias": [True, None],
    "mlp_bias": [True, None],
    "tie_word_embeddings": [True, None],
    "head_dim": [16, 12, 8, None, 0],
    "num_key_value_heads": [4, 1, None],
    "num_hidden_layers": [2, 4],
    "hidden_act": ["gelu", "relu", "swish", "quick_gelu", None],
    "rms_norm_eps": [0.1, None, 0],
    "rope_theta": [100.0, 500, None],
    "rope_scaling": [
        None, {}, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "linear"},
        {"type": "linear", "rope_type": "default", "factor": 3.0}, LLAMA3, LLAMA3 | {"original_max_position_embeddings": 32},
        YARN, YARN | {"truncate": False}, YARN | {"truncate": None}, YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
        YARN | {"factor": None}, {"rope_type": "yarn"}, YARN | {"beta_fast": 8, "beta_slow": 2, "attention_factor": 1.3},
        YARN | {"finetuned": True, "rope_theta": 77.0}, {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "factor": 9.0, "beta_fast": 3}, {"rope_type": "default", "mrope_section": [2, 2, 2]},
        {"rope_type": "proportional", "factor": 2.0}, {"rope_type": None}, {"full_attention": LLAMA3}, {"ratio": 3.0},
    ],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 50.0}, {"rope_theta": 50.0}, {"rope_theta": None}, None,
        {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_type": "default", "rope_theta": 50.0}, "sliding_attention": {"rope_theta": 9.0}},
    ],
    "original_max_position_embeddings": [16, None],
    "partial_rotary_factor": [0.5, 1.0],
    "is_causal": [False, None, 0, True],
    "use_bidirectional_attention": [True, False, None],
    "is_encoder_decoder": [True],
    "per_layer_config": [{"1": {"sliding_window": 2, "hidden_act": "gelu", "intermediate_size": 8}}, {}],
    "architectures": [["LlamaForSequenceClassification"], "MistralForCausalLM", [], None],
    "text_config": [{"model_type": "llama", "hidden_size": 7}],
    "quantization_config": [{}, {"quant_method": "fp8"}],
    "max_position_embeddings": [16, 512],
    "attn_logit_softcapping": [2.0, None, 0], "final_logit_softcapping": [1.5, None], "query_pre_attn_scalar": [7, None],
    "sliding_window_pattern": [2, 1, None], "rope_local_base_freq": [3.0, None], "hidden_activation": ["relu", "gelu", None],
    "embedding_multiplier": [3.0, 0, None], "logits_scaling": [4.0, 0, None], "residual_multiplier": [0.2, None],
    "attention_multiplier": [0.3, 0.0], "no_rope_layers": [[0, 0, 1], [1], None, [2, 2, 2]], "no_rope_layer_interval": [2, 0],
}  # fmt: skip
"""Values of keys that matter to some family, in some release."""
VALUES |= {
    "num_experts": [4, 8, None, 0], "num_local_experts": [5, 8, 3, None], "num_experts_per_tok": [1, 2, 9, None, True],
    "norm_topk_prob": [True, False, None, 1], "moe_intermediate_size": [40, 16, None],
    "mlp_only_layers": [[], [1], [0, 1, 2], 3, None],
    "decoder_sparse_step": [2, 0, 4, None], "clip_qkv": [0.5, None, -1.0], "router_jitter_noise": [0.3],
    "output_router_logits": [True], "shared_expert_intermediate_size": [8],
    "swiglu_limit": [0.5, 0.0, None], "swiglu_alpha": [1.0, None],
}  # fmt: skip
TOGETHER: dict[str, dict[str, Any]] = {
    "layer_types": {"sliding_window": 5}, "use_sliding_window": {"sliding_window": 5, "max_window_layers": 1},
    "max_window_layers": {"sliding_window": 5, "use_sliding_window": True},
}  # fmt: skip
"""Keys that do nothing by themselves -> what makes them do something in prompts as short as these."""
FIRST = ("llama", "qwen2", "qwen3", "mistral")
"""Of these llama meets every key in every run; the others meet those of `THEIRS`, and of the rest one meets each key."""
THEIRS = (
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attention_bias", "mlp_bias"),
    *("tie_word_embeddings", "head_dim", "num_key_value_heads", "hidden_act", "is_causal"),
)
MATTER = {
    "gemma2": ("sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    "gemma3_text": ("rope_scaling", "rope_parameters", "sliding_window_pattern", "rope_local_base_freq", "rope_theta"),
    "phi3": ("rope_scaling", "partial_rotary_factor"),
    "olmo2": ("num_key_value_heads",),
    "granite": ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"),
    "smollm3": ("no_rope_layers", "no_rope_layer_interval", "use_sliding_window"),
    "glm4": ("partial_rotary_factor", "attention_bias"),
    "mixtral": (
        "num_experts", "num_local_experts", "num_experts_per_tok", "router_jitter_noise", "norm_topk_prob", "sliding_window",
    ),
    "qwen3_moe": (
        "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size",
        "mlp_only_layers", "decoder_sparse_step", "use_sliding_window", "output_router_logits",
        "shared_expert_intermediate_size",
    ),
    "qwen2_moe": (
        "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_only_layers", "decoder_sparse_step", "qkv_bias",
        "norm_topk_prob", "sliding_window", "use_sliding_window", "layer_types", "num_local_experts",
    ),
    "olmoe": ("num_experts", "num_experts_per_tok", "norm_topk_prob", "clip_qkv", "attention_bias", "num_key_value_heads"),
    "gpt_oss": ("swiglu_limit", "swiglu_alpha", "sliding_window", "layer_types", "num_local_experts", "attention_bias"),
}  # fmt: skip
"""Keys that are tried in every run for the families that came later; all others are in the slow tests."""
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
OTHERS = {
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "logit_scale": 0.1, "logits_scaling": 4.0,
    "embedding_multiplier": 3.0, "residual_multiplier": 0.2, "attention_multiplier": 0.3, "query_pre_attn_scalar": 7,
    "scale_emb": 12, "scale_depth": 1.4, "qkv_bias": True, "use_qkv_bias": True, "use_qk_norm": True, "qk_layernorm": True,
    "clip_qkv": 0.1, "layer_norm_eps": 0.5, "norm_eps": 0.5, "attention_chunk_size": 3, "no_rope_layers": [0, 1, 0],
    "num_experts": 4, "num_local_experts": 2, "rotary_dim": 4, "rope_interleave": True, "attn_temperature_tuning": True,
    "use_parallel_residual": True, "alibi": True, "multi_query": True, "activation": "relu", "hidden_activation": "relu",
    "sliding_window_pattern": 2, "lm_head_bias": True, "num_kv_shared_layers": 2, "rope_local_base_freq": 3.0,
}  # fmt: skip
"""Keys of other families' configurations, with values that would show."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    out = {}
    for family in FAMILIES:
        folder = make_checkpoint(tmp_path_factory.mktemp(family), family, scale=1.5)
        out[family] = folder, load_file(folder / "model.safetensors")
    return out


def by_transformers(folder: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Logits of the unmodified class with every weight in its place, or None where it refuses."""
    try:
        config = AutoConfig.from_pretrained(folder)
        experts = any("experts" in name for name in weights)
        if config.tie_word_embeddings or experts:  # its own loader decides which table is used, and joins experts
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            model.load_state_dict(weights)
        if getattr(config, "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")  # the fused one has no cap, and does not say so in every release
        with torch.no_grad():
            return model(torch.tensor([TOKENS])).logits[0]
    except Exception:  # a wrong configuration ends in whatever the class stumbles over
        return None


def by_lean(folder: Path) -> torch.Tensor | str:
    """Logits of the lean runtime, or why it refuses."""
    try:
        target = LeanTarget(*load_checkpoint(folder, torch.float32), native=False)
    except (Unsupported, ConfigError) as refusal:
        return str(refusal)
    rows = [
        target.forward(Rows.assemble([0], [TOKENS[:n]], [0], Draft.empty(1)), target.new_kv(1, 16)) for n in (1, 7, 12)
    ]
    return torch.cat([scores.logits for scores in rows])


def agree_or_refuse(model: tuple[Path, dict[str, torch.Tensor]], copy: Path, **changes: Any) -> str | None:
    """None if the lean runtime agrees with transformers under `changes`, else why one of them refuses; anything else fails."""
    folder, weights = model
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    edit_config(copy, (), **changes)
    ours = by_lean(copy)
    if isinstance(ours, str):
        return ours
    theirs = by_transformers(copy, weights)
    if theirs is None:
        return "there is no text of transformers to agree with"
    assert (ours - theirs[[0, 6, 11]]).abs().max() < 2e-3, f"another text under {changes}"
    return None


def in_every_run(key: str, family: str) -> bool:
    """Whether `make test` tries a key with a family; `make test-slow` tries every pair."""
    turn = FIRST[1 + list(VALUES).index(key) % (len(FIRST) - 1)]
    return family in (FIRST[0], turn) or (family in FIRST and key in THEIRS) or key in MATTER.get(family, ())


@pytest.mark.parametrize(("key", "family"), [
    pytest.param(key, family, marks=() if in_every_run(key, family) else pytest.mark.slow)
    for key in VALUES for family in FAMILIES
])  # fmt: skip
def test_every_value_of_a_key_agrees_with_transformers_or_is_refused(models, tmp_path, key: str, family: str) -> None:
    if family == "gpt_oss" and key.startswith("swiglu_") and not BOUNDS:
        pytest.skip("this release of transformers has constants there")
    for value in VALUES[key]:
        agree_or_refuse(models[family], tmp_path, **{key: value})
        if key in TOGETHER:
            agree_or_refuse(models[family], tmp_path, **TOGETHER[key], **{key: value})


def test_a_mistral_whose_layers_are_named_is_a_ministral(models, tmp_path) -> None:
    """transformers reads `layer_types` of such files as Ministral does, whose layers alternate: the key alone decides it."""
    sliding, full = ["sliding_attention"] * 3, ["full_attention"] * 3
    said = {}
    for name, kinds in {"sliding": sliding, "mixed": [sliding[0], *full[1:]], "full": full, "unnamed": None}.items():
        assert agree_or_refuse(models["mistral"], tmp_path, sliding_window=5, layer_types=kinds) is None
        said[name] = by_lean(tmp_path)[-1]
    assert torch.equal(said["unnamed"], said["sliding"])
    assert all(
        (said[a] - said[b]).abs().max() > 0.1 for a, b in (("sliding", "mixed"), ("mixed", "full"), ("full", "sliding"))
    )


LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.3, 1.6, 1.9, 2.2, 2.5],
    "long_factor": [2.0] * 6,
    "rope_theta": 50.0,
}


@pytest.mark.parametrize(("family", "changes"), [
    ("gemma3_text", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("gemma3_text", {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rope_theta": 60.0}),
    ("phi3", {"rope_parameters": LONG | {"factor": 4.0}}),
    ("phi3", {"rope_parameters": LONG | {"factor": None}}),
    ("phi3", {"rope_parameters": LONG | {"factor": 4.0, "attention_factor": 1.2}}),
])  # fmt: skip
def test_scalings_mean_what_they_mean_to_transformers(models, tmp_path, family: str, changes: dict[str, Any]) -> None:
    assert agree_or_refuse(models[family], tmp_path, **changes) is None


THIRDS = [(family, part) for family in FAMILIES for part in range(3)]


@pytest.mark.parametrize(
    ("family", "part"), slow_beyond(THIRDS, [(family, i % 3) for i, family in enumerate(FAMILIES)])
)
def test_keys_of_other_families_agree_or_are_refused(models, tmp_path, family: str, part: int) -> None:
    """A third of the keys with each family in `make test`, every key with some."""
    for key, value in list(OTHERS.items())[part::3]:
        if family in SPARSE and "expert" in key:  # its own key
            continue
        refusal = agree_or_refuse(models[family], tmp_path, **{key: value})
        assert refusal is None or key in refusal


LEFTOVERS = {
    "llama": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0, "layer_types": ["sliding_attention"] * 3},
    "mistral": {"attention_bias": True, "mlp_bias": True, "use_sliding_window": False, "max_window_layers": 1},
    "qwen2": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"mlp_bias": True, "head_dim": 16},
    "mixtral": {"attention_bias": True, "use_sliding_window": False, "max_window_layers": 1},
    "qwen3_moe": {"mlp_bias": True, "max_window_layers": 1, "router_aux_loss_coef": 0.3},
    "qwen2_moe": {"mlp_bias": True, "attention_bias": True, "router_aux_loss_coef": 0.3},
    "olmoe": {"sliding_window": 4, "mlp_bias": True, "router_aux_loss_coef": 0.3},
    "gpt_oss": {
        "mlp_bias": True, "use_sliding_window": False, "max_window_layers": 1, "experts_per_token": 2, "initial_context_length": 16,
    },
    "gemma": {"sliding_window": 4, "query_pre_attn_scalar": 7, "hidden_activation": "relu", "mlp_bias": True},
    "gemma2": {"sliding_window_pattern": 3, "rope_local_base_freq": 7.0, "hidden_act": "relu", "max_window_layers": 1},
    "gemma3_text": {"attn_logit_softcapping": 0.5, "use_sliding_window": False, "hidden_act": "relu"},
    "phi3": {"attention_bias": True, "mlp_bias": True, "logits_scaling": 2.0},
    "olmo2": {"sliding_window": 4, "mlp_bias": True, "logits_scaling": 3.0},
    "granite": {"sliding_window": 4, "final_logit_softcapping": 2.0},
    "smollm3": {"max_window_layers": 1, "residual_multiplier": 0.3},
    "glm4": {"mlp_bias": True, "sliding_window": 4, "embedding_multiplier": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_options_of_another_family_mean_nothing_and_the_lean_runtime_stays(models, tmp_path, family: str) -> None:
    assert agree_or_refuse(models[family], tmp_path, **LEFTOVERS[family]) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_bookkeeping_moves_no_logit(models, tmp_path, family: str) -> None:
    """All of it at once, with values that no default has: neither transformers nor the lean runtime shows a difference."""
    shaped: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": family, "dtype": "float32", "torch_dtype": "float32",
        "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0}, "num_labels": 3, "return_dict": True,
        "problem_type": "regression", "tokenizer_class": "T", "bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6,
        "is_decoder": False, "use_cache": False, "output_attentions": False, "output_hidden_states": True,
        "attn_implementation": "eager", "pretraining_tp": 4, "chunk_size_feed_forward": 2, "initializer_range": 0.5,
        "transformers_version": "4.1.0",
    }  # fmt: skip
    odd = {key: shaped.get(key, 0.37) for key in sorted(BOOKKEEPING)}
    assert agree_or_refuse(models[family], tmp_path, **odd) is None


def test_options_of_experts_are_honoured(models, tmp_path) -> None:
    """They agree, and are not only refused."""
    for changes in (
        {"norm_topk_prob": True},
        {"num_experts_per_tok": 2},
        {"use_sliding_window": True, "sliding_window": 4},
    ):
        assert agree_or_refuse(models["qwen3_moe"], tmp_path, **changes) is None
    assert agree_or_refuse(models["olmoe"], tmp_path, clip_qkv=0.5) is None
    assert agree_or_refuse(models["mixtral"], tmp_path, num_experts_per_tok=1, router_jitter_noise=0.3) is None


def test_a_key_nobody_knows_is_refused_by_name(models, tmp_path) -> None:
    assert "my_scale" in str(agree_or_refuse(models["llama"], tmp_path, my_scale=2.0))
    assert agree_or_refuse(models["llama"], tmp_path, my_scale=None) is None


@pytest.mark.parametrize(("family", "changes"), [
    ("gemma3_text", {"rope_scaling": "linear"}),
    ("gemma3_text", {"rope_parameters": {"full_attention": [1]}}),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": 3}}),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 6}, "original_max_position_embeddings": 1}),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": ["1"] * 6}}),
    ("llama", {"rope_parameters": YARN | {"rope_theta": 1.0}}),
])  # fmt: skip
@pytest.mark.parametrize("max_length", [None, 1])
def test_wrong_rotary_parameters_end_in_a_sentence(models, family: str, changes: dict, max_length: int | None) -> None:
    raw = read_raw_config(models[family][0])
    with pytest.raises((ConfigError, Unsupported)):
        layout_of(raw | changes, max_length)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_random_configurations_agree_or_are_refused(models, tmp_path, seed: int) -> None:
    """Several keys at once, of this family and of others."""
    dice = random.Random(seed)
    keys = dice.sample(sorted(VALUES), dice.randint(1, 5))
    changes = {key: dice.choice(VALUES[key]) for key in keys}
    changes |= {key: OTHERS[key] for key in dice.sample(sorted(OTHERS), dice.choice([0, 0, 1]))}
    agree_or_refuse(models[dice.choice(sorted(FAMILIES))], tmp_path, **changes)
