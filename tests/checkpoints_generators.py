"""Small random models that write images as tokens, over a tokenizer of bytes; and what transformers writes with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    PreTrainedTokenizerFast,
)

SIDE, CODES = 4, 24
BYTES = 256
MARKS = {
    "janus": ("<pad>", "<s>", "</s>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>"),
    "emu3": ("<pad>", "<s>", "</s>", "<|image start|>", "<|image token|>", "<|image end|>", "<|extra_200|>", "<image>"),
}
VISUAL = [f"<|visual token {i:06d}|>" for i in range(CODES)]
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Bytes, the family's marks, and for Emu3 its image codes."""
    core = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([*MARKS[kind], *(VISUAL if kind == "emu3" else [])])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def janus_config(tokenizer: Any) -> JanusConfig:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), **TEXT}
    vq = {
        "embed_dim": 8, "num_embeddings": CODES, "latent_channels": 16, "num_patches": SIDE, "base_channels": 32,
        "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 64, "num_hidden_layers": 2,
        "image_token_embed_dim": 64,
    }  # fmt: skip
    vision = {**small, "projection_dim": 64, "num_image_tokens": SIDE * SIDE}
    return JanusConfig(text_config=text, vision_config=vision, vq_config=vq)


def emu3_config(tokenizer: Any) -> Emu3Config:
    vq = {
        "codebook_size": CODES, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1],
        "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32, "num_attention_heads": 1, "temporal_downsample_factor": 1,
    }  # fmt: skip
    text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **TEXT}
    return Emu3Config(vq_config=vq, text_config=text, vocabulary_map=tokenizer.get_vocab())


def generator(kind: str, place: Path) -> Path:
    """A checkpoint in a folder."""
    tokenizer = tokenizer_of(kind)
    torch.manual_seed(5)
    if kind == "janus":
        model: Any = JanusForConditionalGeneration(janus_config(tokenizer))
        model.generation_config.update(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
        model.generation_config.guidance_scale = 3.0
    else:
        model = Emu3ForConditionalGeneration(emu3_config(tokenizer))
    model.eval().save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.3] * 3}))
    return place


def noisy(folder: Path) -> Path:
    """A checkpoint of the same kind whose codes are a little less likely, or more."""
    place = folder.parent / f"{folder.name}-noisy"
    if not place.is_dir():
        shutil.copytree(folder, place)
        tensors = load_file(place / "model.safetensors")
        noise = torch.Generator().manual_seed(9)
        for name, tensor in tensors.items():
            if "mlp" in name and "vision" not in name:
                tensor += 0.05 * torch.randn(tensor.shape, generator=noise)
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def emu3_written(folder: Path, ids: list[int], size: tuple[int, int], **options: Any) -> tuple[Any, Any]:
    """What transformers' `generate` writes behind a prompt, with the rows enforced; and the model."""
    model: Any = Emu3ForConditionalGeneration.from_pretrained(folder)
    (height, width), names = size, model.vocabulary_mapping

    def allowed(_: int, text: torch.Tensor) -> list[int]:
        return [names.eol_token_id] if (len(text) - len(ids)) % (width + 1) == width else names.image_tokens

    inputs = torch.tensor([ids])
    options = {"do_sample": False, "return_dict_in_generate": True} | options
    made = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=height * (width + 1),
        prefix_allowed_tokens_fn=allowed, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    return made, model
