"""A Hugging Face Llama checkpoint as one GGUF file; without its tokenizer where llama.cpp is only given token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def convert(folder: Path, out: Path, *, tokenizer: bool = False) -> None:
    """Write `out` in the checkpoint's own dtype, bfloat16 or float32; norms are float32, as llama.cpp wants them.

    tokenizer: also the vocabulary and the merges of tokenizer.json (byte-level BPE), which llama.cpp's server needs for its texts.
    """
    config = json.loads((folder / "config.json").read_text())
    part = out.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    _describe(writer, config)
    if tokenizer:
        _tokenizer(writer, config, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    else:
        writer.add_tokenizer_model("none")
    for name, array in read_safetensors(folder / "model.safetensors").items():
        if ".q_proj." in name or ".k_proj." in name:
            array = interleave(array, config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"])
        if array.dtype != np.uint16:
            writer.add_tensor(gguf_name(name), array)
        elif array.ndim == 1:
            writer.add_tensor(gguf_name(name), (array.astype(np.uint32) << 16).view(np.float32))
        else:
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array).view(np.uint8), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(out)


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _tokenizer(writer: gguf.GGUFWriter, config: dict[str, Any], found: dict[str, Any]) -> None:
    special = {token["id"] for token in found["added_tokens"] if token["special"]}
    words = {i: word for word, i in found["model"]["vocab"].items()} | {
        t["id"]: t["content"] for t in found["added_tokens"]
    }
    size = config["vocab_size"]
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words.get(i, f"<unused{i}>") for i in range(size)])
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges([" ".join(pair) for pair in found["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return NAMES[stem] + ".weight"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}.weight"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves (Hugging Face rotates i with i + d/2) to pairs (llama.cpp: 2i with 2i + 1)."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return split.swapaxes(1, 2).reshape(weight.shape)


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a file; bfloat16 ones as the uint16 of their bits, for numpy has no such type."""
    data = np.memmap(file, dtype=np.uint8, mode="r")
    start = 8 + int(data[:8].view(np.uint64)[0])
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    types = {"BF16": np.uint16, "F32": np.float32}
    return {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        .view(types[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in header.items()
    }
