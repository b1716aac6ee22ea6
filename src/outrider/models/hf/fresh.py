"""A small language model with fresh weights, in the format that every loader of ours reads: what a draft is trained from."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from outrider.errors import ConfigError


def small_llama(
    vocab_size: int, width: int, layers: int, length: int, *, seed: int = 0, **special: Any
) -> LlamaForCausalLM:
    """A float32 Llama with tied embeddings, heads of 32 and a feed-forward part of 8/3 of its width.

    width: a multiple of 32. length: most positions. special: pad_token_id, bos_token_id, eos_token_id. A function of the seed.
    """
    if width < 32 or width % 32 or layers < 1:
        raise ConfigError(
            f"a draft needs a width that is a multiple of 32 (its heads) and layers >= 1, got {width}, {layers}"
        )
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            head_dim=32,
            intermediate_size=-(-8 * width // 3 // 32) * 32,
            max_position_embeddings=length,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **special,
        )
    )
