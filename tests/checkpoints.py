"""Small random checkpoints in Hugging Face format, made by transformers' own classes: the ground truth of loading tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HEAD = {"head_dim": 16}
BOUNDS = hasattr(AutoConfig.for_model("gpt_oss"), "swiglu_limit")
"""Whether this release of transformers reads the bounds of gpt-oss's experts; before, they were constants."""
FAMILIES: dict[str, dict] = {
    "llama": {}, "qwen2": {}, "qwen3": HEAD, "mistral": {}, "gemma": HEAD, "gemma2": HEAD | {"sliding_window": 5},
    "gemma3_text": HEAD | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0, "logits_scaling": 0.7, "residual_multiplier": 0.6, "attention_multiplier": 0.4,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "glm4": HEAD | {"pad_token_id": 0, "eos_token_id": [2]},
    "mixtral": {"num_local_experts": 5, "tie_word_embeddings": False},
    "qwen3_moe": HEAD | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    "qwen2_moe": {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "pad_token_id": None, "eos_token_id": None},
    "gpt_oss": HEAD | {
        "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5, **({"swiglu_limit": 1.5} if BOUNDS else {}),
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False,
            "beta_fast": 32.0, "beta_slow": 1.0,
        },
    },
}  # fmt: skip
"""Families of the lean runtime -> what their small models have beside `SIZES`."""
SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def make_model(
    family: str, *, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32, **overrides
) -> PreTrainedModel:
    """A random model of a family of `FAMILIES` whose logits differ strongly.

    scale: weights are normal with standard deviation scale / sqrt(inputs) (embeddings: scale), biases and norms move
    too, so that a part that is forgotten shows. overrides: keys of the configuration class, over `SIZES`.
    """
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family] | overrides))
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    middle = 0.0 if family.startswith("gemma") else 1.0
    noise = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=noise, dtype=torch.float64)
        if weight.ndim == 1:
            value = 0.3 * drawn + (0.0 if name.endswith("bias") else middle)
        else:
            value = scale * drawn / (1.0 if "embed" in name else weight.shape[-1] ** 0.5)
            value = value * (2.0 if "q_proj" in name or "k_proj" in name or "lm_head" in name else 1.0)
        weight.copy_(value)
    return model


def make_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    tokenizer: bool = False,
    **overrides,
) -> Path:
    """Save `make_model(family, ...)` to `folder` and return it.

    shards: into how many files, about. tokenizer: add a byte-level one (`make_tokenizer`); give vocab_size >= 260 then.
    """
    folder = Path(folder)
    if tokenizer:
        overrides = {"vocab_size": 260} | overrides
    model = make_model(family, seed=seed, scale=scale, dtype=dtype, **overrides)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else size // shards)
    if tokenizer:
        make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer without merges: ids 0..3 are <pad>, <s>, </s>, <unk>, then the 256 bytes; with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {piece: i for i, piece in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    wrapped.save_pretrained(folder)
    return Path(folder)


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes) -> Path:
    """Rewrite keys of config.json by hand: old spellings, wrong values, options no class would save."""
    path = Path(folder) / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in raw.items() if k not in remove} | changes))
    return Path(folder)
