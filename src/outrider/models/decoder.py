"""The shape and the weights of a decoder, as the lean runtime and its native twin read them.

One family of shapes covers Llama, Qwen2, Qwen3 and Mistral, and Mixtral, Qwen3-MoE and OLMoE: RMSNorm, rotary positions, grouped
attention heads with optional biases, query/key norms and sliding windows, SwiGLU or a mixture of SwiGLUs.
`models/checkpoint.py` fills these from safetensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.nn.blocks import Segment, dequantise

Segments = tuple[Segment, ...]
"""A packed linear weight [out, in]: outputs of one type, then those of the next, as they are stored."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts of a decoder: a router sends every row to `used` of `count` SwiGLUs with `inner` units each.

    The weights of a row's experts are their softmax over all experts, divided by the sum over the used ones if `normalised`.
    sparse[i]: whether layer i has experts, or one SwiGLU of the decoder's `inner` units.
    """

    count: int
    used: int
    inner: int
    normalised: bool
    sparse: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and constants. `window[i]` is the sliding window of layer i in tokens (the row itself included), 0 for none.

    inv_freq: [head_dim / 2] rotary frequencies after any scaling; rope_scale multiplies cos and sin (1.0 for most). wide_norm: the
    norms of queries and keys, if there are any, go over all heads at once. clip: bound of queries, keys and values, 0 for none.
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
    wide_norm: bool = False
    clip: float = 0.0
    experts: Experts | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block. Linear weights are [out, in], fused where they share an input; None where the family has none.

    Of packed weights linears are segments, and norms and biases are float32. In a layer with E experts gate_up is [2 E I, H], the
    gates of all of them and then their ups, down is [E H, I], and router is [E, H].
    """

    norm1: Float[Tensor, "H"]
    qkv: Float[Tensor, "QKV H"] | Segments
    qkv_bias: Float[Tensor, "QKV"] | None
    q_norm: Float[Tensor, "Q"] | None
    k_norm: Float[Tensor, "K"] | None
    o: Float[Tensor, "H A"] | Segments
    o_bias: Float[Tensor, "H"] | None
    norm2: Float[Tensor, "H"]
    gate_up: Float[Tensor, "G H"] | Segments
    down: Float[Tensor, "O I"] | Segments
    router: Float[Tensor, "E H"] | Segments | None = None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights. `head` is the embedding itself (the same object) when they are tied.

    dtype: of plain weights; of packed ones the type of hidden states, keys and values. layers: of packed weights any iterable, read
    once: then no two blocks need to be in memory as they are stored.
    """

    embedding: Float[Tensor, "V H"] | Segments
    layers: tuple[LayerWeights, ...] | Iterable[LayerWeights]
    norm: Float[Tensor, "H"]
    head: Float[Tensor, "V H"] | Segments
    dtype: torch.dtype

    @property
    def packed(self) -> bool:
        """Whether linears are segments."""
        return isinstance(self.embedding, tuple)


def unpacked(w: DecoderWeights, device: torch.device | str = "cpu") -> DecoderWeights:
    """The values of packed weights as plain ones of their dtype: for machines without products in blocks."""

    def plain(weight: object) -> object:
        if isinstance(weight, tuple):
            rows = [s.outputs for s in weight]
            out = torch.empty(sum(rows), weight[0].inputs, dtype=w.dtype)
            for segment, part in zip(weight, out.split(rows), strict=True):
                dequantise(segment.rows, segment.block, part)
            return out.to(device)
        return weight.to(device, w.dtype) if isinstance(weight, Tensor) else weight

    def layer(packed: LayerWeights) -> LayerWeights:
        return LayerWeights(**{f.name: plain(getattr(packed, f.name)) for f in fields(packed)})  # type: ignore[arg-type]

    embedding = plain(w.embedding)
    head = embedding if w.head is w.embedding else plain(w.head)
    return replace(w, embedding=embedding, layers=tuple(map(layer, w.layers)), norm=plain(w.norm), head=head)  # type: ignore[arg-type]
