"""Tiny random models of transformers, by family, and the path on which the adapter runs each."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

V = 61
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OLD = {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
NEW = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    **SPECIAL,
}
WINDOW = {"sliding_window": 6, "head_dim": 8}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("seam", NEW),
    "qwen2": ("seam", NEW),
    "qwen3": ("seam", {**NEW, "head_dim": 8}),
    "mistral": ("seam", {**NEW, **WINDOW}),
    "gemma2": ("seam", {**NEW, **WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "gemma3_text": (
        "seam",
        {**NEW, **WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi": ("seam", NEW),
    "phi3": ("seam", NEW),
    "cohere2": ("seam", {**NEW, "sliding_window": 6}),
    "olmo2": ("seam", NEW),
    "gpt2": ("seam", OLD),
    "gpt_bigcode": ("seam", OLD),
    "opt": (
        "seam",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "init_std": 0.3,
        },
    ),
    "gpt_neox": ("seam", NEW),
    "mixtral": ("seam", {**NEW, "num_local_experts": 4}),
    "qwen2_moe": ("seam", {**NEW, **EXPERTS}),
    "gpt_oss": ("seam", {**NEW, **WINDOW, "num_local_experts": 4}),
    "deepseek_v3": ("seam", {**NEW, **MLA}),
    "gemma4_text": (  # layers that share keys, heads of two sizes, embeddings per layer
        "seam",
        {
            **NEW,
            **WINDOW,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": V,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
        },
    ),
    "stablelm": ("cache", NEW),
    "falcon": ("cache", {**NEW, "alibi": False}),
    "bloom": ("cache", {"vocab_size": V, "hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}),
    "mpt": (
        "cache",
        {"vocab_size": V, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, "initializer_range": 0.3},
    ),
    "gptj": ("cache", {**OLD, "rotary_dim": 4}),
    "gpt_neo": (
        "cache",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
        },
    ),
    "llama4_text": (
        "cache",
        {**NEW, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8, "attention_chunk_size": 16},
    ),
    "mamba": (
        "snapshots",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "initializer_range": 0.3},
    ),
    "mamba2": (
        "snapshots",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "initializer_range": 0.3,
        },
    ),
    "jamba": (
        "snapshots",
        {
            **NEW,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_next": ("snapshots", {**NEW, **EXPERTS, **LINEAR, "head_dim": 8}),
    "lfm2": ("snapshots", {**NEW, "layer_types": ["conv", "full_attention", "conv"]}),
    "rwkv": ("snapshots", {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 64}),
    "openai-gpt": ("recompute", OLD),
}
DAILY = frozenset(
    (
        "llama",
        "mistral",
        "gemma2",
        "gpt2",
        "opt",
        "mixtral",
        "gpt_oss",
        "deepseek_v3",
        "falcon",
        "bloom",
        "mamba",
        "rwkv",
    )
)
"""One family for every way of attending, embedding, caching or failing; the others run nightly."""
SPREAD = [f if f in DAILY else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
EXACT = ("gpt2", "opt", "gpt_neox", "phi", "gpt_bigcode")
"""Families without float32 islands (RMSNorm, and some softmaxes, compute in float32 whatever the model's type)."""


@cache
def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model. Shared by all tests: nothing a target does may change it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family][1]))
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # the fused one has no cap, and does not say so in every release
    for parameter in model.parameters():  # some families start at one or zero what should differ
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.to(dtype).eval()


@torch.no_grad()
def plain(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits after `tokens` by the model as transformers runs it, without any cache."""
    return model(input_ids=torch.tensor([tokens])).logits[0, -1]
