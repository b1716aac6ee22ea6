"""The shape and the weights of a dense decoder, as the lean runtime and its native twin read them.

One family of shapes covers Llama, Qwen2, Qwen3 and Mistral: RMSNorm, rotary positions, grouped attention heads with
optional biases, per-head query/key norms and sliding windows, SwiGLU. `models/checkpoint.py` fills these from safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and constants. `window[i]` is the sliding window of layer i in tokens (the row itself included), 0 for none.

    inv_freq: [head_dim / 2] rotary frequencies after any scaling; rope_scale multiplies cos and sin (1.0 for most).
    """

    family: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float
    max_length: int
    window: tuple[int, ...]
    inv_freq: Float[Tensor, "half"]
    rope_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block. Linear weights are [out, in], fused where they share an input; None where the family has none."""

    norm1: Float[Tensor, "H"]
    qkv: Float[Tensor, "QKV H"]
    qkv_bias: Float[Tensor, "QKV"] | None
    q_norm: Float[Tensor, "D"] | None
    k_norm: Float[Tensor, "D"] | None
    o: Float[Tensor, "H A"]
    o_bias: Float[Tensor, "H"] | None
    norm2: Float[Tensor, "H"]
    gate_up: Float[Tensor, "G H"]
    down: Float[Tensor, "H I"]


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of one dtype. `head` is the embedding itself (the same tensor) when they are tied."""

    embedding: Float[Tensor, "V H"]
    layers: tuple[LayerWeights, ...]
    norm: Float[Tensor, "H"]
    head: Float[Tensor, "V H"]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype
