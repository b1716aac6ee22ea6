"""The shape and the weights of a decoder, as the lean runtime and its native twin read them.

One family of shapes covers the rows of `families.py`: RMSNorm before or behind a part, rotary positions, grouped attention heads
with optional biases, query/key norms, bounds and sliding windows, a gated feed-forward part or a mixture of such parts.
`models/checkpoint.py` fills these from safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.nn.blocks import Segment, dequantise

Segments = tuple[Segment, ...]
"""A packed linear weight [out, in]: outputs of one type, then those of the next, as they are stored."""
Later = Callable[[], Segments]
"""One that is read when it is asked for, so that only it is in memory twice while it is repacked."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts of a decoder: a router sends every row to `used` of `count` SwiGLUs with `inner` units each.

    The weights of a row's experts are their softmax over all experts, divided by the sum over the used ones if `normalised`.
    sparse[i]: whether layer i has experts, or one feed-forward part of the decoder's `inner` units. limit: 0, or the bound of gates
    (from above) and ups (on both sides) in gpt-oss's experts, whose units are gate sigmoid(gain gate) (up + 1). shared: units of
    one more SwiGLU, which every row uses with the weight sigmoid(gate row); 0 for none.
    """

    count: int
    used: int
    inner: int
    normalised: bool
    sparse: tuple[bool, ...]
    limit: float = 0.0
    gain: float = 1.0
    shared: int = 0


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and constants. `window[i]` is the sliding window of layer i in tokens (the row itself included), 0 for none.

    inv_freq: [rotary / 2] rotary frequencies after any scaling, of the first `rotary` numbers of a head; rope_scale multiplies
    cos and sin (1.0 for most). local_freq, turns: of layers whose `turns` is 1; layers of -1 are not turned (empty: all are 0).
    activation: of the feed-forward part. attention_scale: of scores, None for head_dim ** -0.5. embed_scale (rounded to the
    weights' type if embed_scale_rounded), residual_scale, logit_scale: factors of embeddings, of what a block adds, and of
    logits. Bounds c tanh(x / c) of scores and logits: attention_cap, logit_cap, 0 for none. wide_norms: norms are float32 and
    multiplied before half precision is rounded. clip: bound of queries, keys and values behind their norms, 0 for none.
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
    local_freq: Float[Tensor, "half"] | None = None
    turns: tuple[int, ...] = ()
    activation: str = "silu"
    attention_scale: float | None = None
    attention_cap: float = 0.0
    embed_scale: float = 1.0
    embed_scale_rounded: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    wide_norms: bool = False
    clip: float = 0.0
    experts: Experts | None = None

    def scale_of_embeddings(self, dtype: torch.dtype) -> float:
        """`embed_scale` for weights of a type."""
        return torch.tensor(self.embed_scale, dtype=dtype).item() if self.embed_scale_rounded else self.embed_scale

    def turn_of(self, layer: int) -> int:
        """The frequencies that turn the heads of a layer: see `turns`."""
        return self.turns[layer] if self.turns else 0

    @property
    def block_numbers(self) -> int:
        """Numbers in the linears of a dense block."""
        return self.hidden * (2 * self.head_dim * (self.heads + self.kv_heads) + 3 * self.inner)

    def first_layers(self, layers: int) -> DecoderConfig:
        """The same with the first blocks only."""
        experts = self.experts and replace(self.experts, sparse=self.experts.sparse[:layers])
        return replace(self, layers=layers, window=self.window[:layers], turns=self.turns[:layers], experts=experts)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block. Linear weights are [out, in], fused where they share an input; None where the family has none.

    norm1, norm2: of the inputs of attention and feed-forward part; post1, post2: of their outputs, before they are added. q_norm
    and k_norm have a head's size, or that of all heads of a row, which are then normed together. Of packed weights linears are
    segments, and norms and biases are float32. In a layer with E experts gate_up is [2 E I, H], the gates of all of them and then
    their ups, down is [E H, I], and router is [E, H], of packed weights float32; biases likewise. sinks: a score for each head,
    which takes weight and adds nothing (gpt-oss). shared_gate_up [2 S, H] and shared_down [H, S] are of the expert that every row
    uses; shared_gate, of which its weight is made, is of the router's type.
    """

    norm1: Float[Tensor, "H"] | None
    qkv: Float[Tensor, "QKV H"] | Segments | Later
    qkv_bias: Float[Tensor, "QKV"] | None
    q_norm: Float[Tensor, "Q"] | None
    k_norm: Float[Tensor, "K"] | None
    o: Float[Tensor, "H A"] | Segments | Later
    o_bias: Float[Tensor, "H"] | None
    norm2: Float[Tensor, "H"] | None
    gate_up: Float[Tensor, "G H"] | Segments | Later
    down: Float[Tensor, "O I"] | Segments | Later
    post1: Float[Tensor, "H"] | None = None
    post2: Float[Tensor, "H"] | None = None
    router: Float[Tensor, "E H"] | None = None
    router_bias: Float[Tensor, "E"] | None = None
    gate_up_bias: Float[Tensor, "G"] | None = None
    down_bias: Float[Tensor, "O"] | None = None
    sinks: Float[Tensor, "heads"] | None = None
    shared_gate_up: Float[Tensor, "SG H"] | Segments | Later | None = None
    shared_down: Float[Tensor, "H S"] | Segments | Later | None = None
    shared_gate: Float[Tensor, "one H"] | None = None


def taken(weight: Any) -> Any:
    """A linear's weight itself, read now if it is one for later."""
    return weight() if callable(weight) else weight


NORMS = frozenset({"norm1", "q_norm", "k_norm", "norm2", "post1", "post2"})
"""The norms of a block."""
ROUTERS = frozenset({"router", "shared_gate"})
"""What decides how much of an expert a row takes: of packed weights float32, never in blocks."""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights. `head` is the embedding itself (the same object) when they are tied.

    dtype: of plain weights; of packed ones the type of hidden states, keys and values. layers: of packed weights any iterable, read
    once: then no two blocks need to be in memory as they are stored. wide_norms: see `DecoderConfig`.
    twice: products with packed weights round their inputs to about 16 bits, not to 8 (`NativeLinear`).
    """

    embedding: Float[Tensor, "V H"] | Segments
    layers: tuple[LayerWeights, ...] | Iterable[LayerWeights]
    norm: Float[Tensor, "H"]
    head: Float[Tensor, "V H"] | Segments
    dtype: torch.dtype
    wide_norms: bool = False
    twice: bool = False

    @property
    def packed(self) -> bool:
        """Whether linears are segments."""
        return isinstance(self.embedding, tuple)


def unpacked(w: DecoderWeights, device: torch.device | str = "cpu") -> DecoderWeights:
    """The values of packed weights as plain ones of their dtype: for machines without products in blocks."""

    def plain(weight: object) -> object:
        weight = taken(weight)
        if isinstance(weight, tuple):
            rows = [s.outputs for s in weight]
            out = torch.empty(sum(rows), weight[0].inputs, dtype=w.dtype)
            for segment, part in zip(weight, out.split(rows), strict=True):
                dequantise(segment.rows, segment.block, part)
            return out.to(device)
        return weight.to(device, w.dtype) if isinstance(weight, Tensor) else weight

    def norm(weight: Tensor | None) -> Tensor | None:
        return weight if weight is None else weight.to(device, weight.dtype if w.wide_norms else w.dtype)

    def layer(packed: LayerWeights) -> LayerWeights:
        parts = {f.name: getattr(packed, f.name) for f in fields(packed)}
        values = {
            name: norm(part) if name in NORMS else plain(part) for name, part in parts.items() if name not in ROUTERS
        }
        # in their own type: rounded they may choose others
        routers = {name: part if part is None else part.to(device) for name, part in parts.items() if name in ROUTERS}
        return LayerWeights(**values, **routers)  # type: ignore[arg-type]

    embedding = plain(w.embedding)
    head = embedding if w.head is w.embedding else plain(w.head)
    return replace(w, embedding=embedding, layers=tuple(map(layer, w.layers)), norm=norm(w.norm), head=head)  # type: ignore[arg-type]
