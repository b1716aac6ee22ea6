"""A small language model with new weights, in the format that Outrider's loaders read, and a tokenizer made for a corpus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from outrider.errors import ConfigError

PAD, BEGIN, END = SPECIAL = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2; END follows every document


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


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the corpus with ``size`` entries.

    Every byte is one of them, so any text can be encoded and decodes to itself exactly.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END, clean_up_tokenization_spaces=False
    )
