"""Files of a synthetic pair: checkpoints that every peer reads, and a tokenizer that is valid and nothing more."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One token per byte; the ids from 256 on decode to their own number, and no text encodes to them. vocab >= 256.

    Id 256 is the one merge that a GGUF file must have: twice the byte 0xff, which is in no text.
    """
    if vocab < 256:
        raise ValueError(f"a byte-level vocabulary needs 256 tokens, not {vocab}")
    tokens = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    never = "\xff"  # the alphabet writes this byte as its Latin-1 letter
    merges = [(never, never)] if vocab > 256 else []
    tokens |= {a + b: 256 for a, b in merges} | {f"<{i}>": i for i in range(257, vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def write_json(path: Path, content: object) -> None:
    """Replace a file in one step."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def save(model: LlamaForCausalLM, folder: Path, dtype: str, vocab: int) -> None:
    """Write a float32 model as a checkpoint of `dtype`, with its tokenizer."""
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=tensors)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"dtype": dtype})  # it names the dtype of the model, not of `tensors`
    byte_tokenizer(vocab).save_pretrained(folder)
