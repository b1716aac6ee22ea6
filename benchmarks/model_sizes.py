"""Small random models of every family of transformers that can continue text: names, sizes, and what a family needs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForTextToWaveform
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from outrider.models.admit import model_class

VOCAB, WIDTH, LAYERS, POSITIONS = 512, 64, 4, 512
NAMED = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
FAMILIES = tuple(sorted(NAMED))
"""All that transformers has as causal models, and all that read pictures besides, whose text part is a target."""


def each(names: str, value: Any) -> dict[str, Any]:
    """The same value for every name."""
    return dict.fromkeys(names.split(), value)


SMALL: dict[str, Any] = {
    **each("hidden_size n_embd d_model dim word_embed_proj_dim attention_hidden_size embedding_dim lru_width", WIDTH),
    **each("num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers", LAYERS),
    **each("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
    **each("intermediate_size ffn_dim ffn_hidden_size n_inner decoder_ffn_dim encoder_ffn_dim d_ff", 2 * WIDTH),
    **each("intermediate_size_mlp shared_intermediate_size dense_intermediate_size block_ff_dim", 2 * WIDTH),
    **each("max_position_embeddings n_positions n_ctx max_seq_len context_length seq_length", POSITIONS),
    **each("head_dim global_head_dim swa_head_dim v_head_dim qk_nope_head_dim attention_head_dim", 16),
    **each("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **each("num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts", 2),
    **each("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size", WIDTH // 2),
    **each("state_size ssm_state_size mamba_d_state", 8),
    **each("mamba_n_heads mamba_num_heads n_mamba_heads", 8),
    **each("mamba_d_head mamba_head_dim mamba_headdim linear_key_head_dim linear_value_head_dim linear_head_dim", 16),
    **each("n_group topk_group mamba_n_groups mamba_ngroups n_groups n_shared_experts", 1),
    **each("vocab_size vocab_size_per_layer_input", VOCAB),
    "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_num_heads": 4,
    "mamba_chunk_size": 16, "chunk_size": 16,
    "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_head_dim": 24, "first_k_dense_replace": 1,
    "sliding_window": 16, "attention_window_size": 16, "attention_chunk_size": 16, "hidden_size_per_layer_input": 16,
    "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "use_cache": True,
    "initializer_range": 0.1,
}  # fmt: skip
"""What a configuration is given of the names that it knows."""
SECTIONS: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
COMPASS = each("sliding_attention full_attention", SECTIONS)
KINDS = {kind: [kind, "full_attention"] * (LAYERS // 2) for kind in ("linear_attention", "sliding_attention", "conv")}
Plain = int | float | str | bool
"""Values that `SMALL` may take the place of: not None, and not a list for several parts."""
ALWAYS = ("num_key_value_heads", "head_dim", "num_experts_per_tok", "n_group", "topk_group", "eos_token_id")
"""Given even where the configuration has no value for them, or several."""
INDEX = {"index_head_dim": 16, "index_n_heads": 16, "index_topk": 32}
"""Fewer keys than a text has. With two heads many keys score exactly nothing, and which of them are chosen depends on the number of
rows: transformers' own text with its cache is another one than without then."""
NOTE = {
    **INDEX, "layer_types": ["indexed_attention", "sliding_attention"] * (LAYERS // 2),
    "shared_experts_intermediate_size": WIDTH // 2, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32, "swa_kv_lora_rank": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
INDEXER = {
    "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32, "indexer_compress_ratio": 4,
}  # fmt: skip
NEMOTRON = {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "moe_shared_expert_intermediate_size": 32}
OWN: dict[str, dict[str, Any]] = {
    **each("qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text olmo_hybrid minimax",
        {"layer_types": KINDS["linear_attention"]}),
    **each("gemma2 gemma3_text gemma3 gemma4_text gemma4 olmo3 gpt_oss ministral cohere2 exaone4",
        {"layer_types": KINDS["sliding_attention"]}),
    **each("lfm2 lfm2_moe lfm2_vl", {"layer_types": KINDS["conv"], "num_dense_layers": 1}),
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "kimi_linear": {"layer_types": KINDS["linear_attention"]},
    "bailing_hybrid": {"layer_types": KINDS["linear_attention"], "num_expert_group": 1},
    "cohere_compass_text": {"layer_types": KINDS["sliding_attention"], "rope_parameters": COMPASS},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dory": {
        "layer_types": KINDS["sliding_attention"], "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": NOTE,
    "dots3_note": {
        "text_config": NOTE,
        "vision_config": {"mlp_layer_types": ["dense"] * LAYERS, "adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH}},
    **each("qwen4_exp qwen4_exp_text", {"layer_types": ["linear_attention", "indexed_attention"] * (LAYERS // 2), **INDEXER}),
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"] * (LAYERS // 2), "axial_pos_embds_dim": [16, WIDTH - 16],
        "axial_pos_shape": [16, POSITIONS // 16], "attention_head_size": 16, "feed_forward_size": 2 * WIDTH, "hash_seed": 0,
        "num_buckets": 4},
    "blt": {"vocab_size": VOCAB, "encoder_hash_byte_group_vocab": 97, "patcher_config": {}},
    "apertus1p5": {
        "image_token_offset": 256, "vision_config": {"codebook_size": 64}, "audio_token_offset": 320,
        "audio_config": {"codebook_dim": WIDTH, "codebook_size": 64}},
    "chameleon": {"vocabulary_map": {"<image>": 5}, "vq_config": {}},
    "cohere_compass": {"layer_types": KINDS["sliding_attention"], "rope_parameters": COMPASS},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)]},
    "diffusion_gemma": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": WIDTH // 2},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [WIDTH // 2] * 2, "rope_parameters": {**SECTIONS, "mrope_section": [3, 3, 2]}},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": LAYERS},
    "glm5_next": {"qk_rope_head_dim": 0, **INDEX},
    **each("deepseek_v32 glm_moe_dsa axk2 hy_v4", INDEX),
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 1], "text_hidden_size": WIDTH}},
    "step3p7": {"sliding_window": 16},
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "img_size": [28, 28], "ref_feat_shape": [2, 2], "init_values": 0.1,
                "global_pool": "", "use_post_transformer_norm": False}}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 5, "text_config": {"rope_parameters": SECTIONS}},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5, "vision_config": {}},
    **each("kosmos-2 kosmos-2.5",
        {"text_config": {"embed_dim": WIDTH, "layers": LAYERS, "attention_heads": 4, "ffn_dim": 2 * WIDTH}}),
    "muse_spark": {"audio_config": {"out_hidden_size": WIDTH}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}, "text_config": NEMOTRON},
    "granite4_vision": {"deepstack_layer_map": [[-1, 1]], "downsample_rate": "1/2", "vision_config": {}},
    "granite_docling": {"vision_config": {"out_hidden_size": WIDTH}},
    "hunyuan_vl": {"rope_parameters": {**SECTIONS, "mrope_section": [2, 2, 2, 2]}},
    "hy_v4_vl": {"rope_parameters": {**SECTIONS, "mrope_section": [1, 1, 2]}},
    **each("inkling2 inkling2_loop",
        {"text_config": {"unpadded_vocab_size": VOCAB}, "vision_config": {"text_hidden_size": WIDTH}}),
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    **each("gemma3n_text gemma3n",
        {"layer_types": KINDS["sliding_attention"], "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2,
         "activation_sparsity_pattern": [0.0] * LAYERS}),
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2), "num_local_experts": 0, "num_experts_per_tok": 0},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"] * 2, "moe_layers": [0, 1, 2, 3]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "falcon_h1": {"mamba_d_ssm": 2 * WIDTH},
    "nemotron_h": NEMOTRON,
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "attention_head_dim": 32,
        "attention_hidden_size": 2 * WIDTH, "mamba_expand": 2, "adapter_rank": 8},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 32, "attention_hidden_size": 2 * WIDTH,
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "num_hidden_layers": 2, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    **each("qwen2_vl qwen2_5_vl glm4v glm46v glm_ocr glmga cosmos3_edge paddleocr_vl",
        {"rope_parameters": SECTIONS}),
    "falcon": {"alibi": False},
    "moshi": {"sliding_window": POSITIONS},  # all of its positions, as the default: its masks know no window
    "doge": {"is_moe": False},
    "opt": {"init_std": 0.1},
}  # fmt: skip
"""What a family needs besides."""

FIRST: dict[str, dict[str, Any]] = each(
    "gemma4_assistant gemma4_unified_assistant",
    {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
)
"""Of families whose defaults their own classes refuse: what the configuration is made with before it is shrunk."""

NEEDS = each("fast_vlm gemma3n perception_lm", "timm")
"""Packages without which transformers does not make a family's model."""


def shrink(config: Any, own: dict[str, Any]) -> Any:
    """The configuration of a small model: the same class made again, with what it knows of `SMALL`, its parts as well.

    own: keys of this one, parts by their names; without any part, keys of the part that is the language model.
    """
    held, kind = config.to_dict(), type(config)
    renamed = {v: k for k, v in getattr(kind, "attribute_map", {}).items()}
    given = {k: v for k, v in SMALL.items() if k in held and isinstance(held[k], Plain) and renamed.get(k) not in held}
    given |= {k: SMALL[k] for k in ALWAYS if k in held}
    if "qk_rope_head_dim" in held:  # latent attention: its rotary part is a head of its own
        given |= {"head_dim": SMALL["qk_rope_head_dim"], "num_key_value_heads": 4}
    parts = {k: getattr(config, k) for k in getattr(kind, "sub_configs", {}) if getattr(config, k, None) is not None}
    named = {k: v for k, v in own.items() if k in parts}
    smaller = {k: shrink(c, named.get(k, own if "text" in k and not named else {})) for k, c in parts.items()}
    spoken = any("vocab_size" in c.to_dict() for c in parts.values())
    if spoken and "num_hidden_layers" not in held:  # the language model is one of them
        given = {k: v for k, v in given.items() if k.endswith("token_id")}
        own = own if named else {}  # else it was the language model's
    return kind(**{**given, **own, **smaller})


def build(family: str) -> Any:
    """A small random model of a family, the same every time, with larger weights than usual, so that its text wanders."""
    torch.manual_seed(0)
    config = shrink(AutoConfig.for_model(family, **FIRST.get(family, {})), OWN.get(family, {}))
    # whose decoders transformers also has as causal models, without an encoder's configuration
    sounds = AutoModelForTextToWaveform
    own = sounds if type(config) in sounds._model_mapping else model_class(config)
    known = type(config) in own._model_mapping
    model = (own.from_config(config) if known else getattr(transformers, NAMED[family])(config)).eval()
    with torch.no_grad():
        for p in model.parameters():  # some families start at one or zero what should differ
            p += 0.02 * torch.randn_like(p)
    return model
