"""The native decoder's weights: linears behind handles, norms and biases in float32."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.models.decoder import DecoderWeights, LayerWeights, taken
from outrider.nn.large_pages import LargePages
from outrider.nn.products import NativeLinear

LINEARS = ("qkv", "o", "gate_up", "down", "router", "shared_gate_up", "shared_down", "shared_gate")
"""A router, and what belongs to an expert that every row uses, is None where there is none."""
VECTORS = (
    "norm1", "qkv_bias", "q_norm", "k_norm", "o_bias", "norm2", "post1", "post2", "sinks", "router_bias",
    "gate_up_bias", "down_bias",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """A block's linears and vectors by their names in `LayerWeights`; None where the family has none."""

    linears: dict[str, NativeLinear | None]
    vectors: dict[str, Tensor | None]


@dataclass(frozen=True, slots=True)
class NativeWeights:
    """What forwards read. dtype: of hidden states, keys and values."""

    embedding: NativeLinear
    layers: tuple[NativeLayer, ...]
    norm: Float[Tensor, "H"]
    head: NativeLinear
    dtype: torch.dtype

    @property
    def linears(self) -> list[NativeLinear]:
        every = (linear for layer in self.layers for linear in layer.linears.values())
        return [self.embedding, self.head, *(linear for linear in every if linear is not None)]

    def expert_share(self, used: int, count: int) -> float:
        """Share of the bytes of a forward of one row that are of the `used` of `count` experts in each sparse layer."""
        read = lambda names, layer: sum(found.bytes for n in names if (found := layer.linears[n]) is not None)  # noqa: E731
        parts = ("gate_up", "down")
        sparse = [layer for layer in self.layers if layer.linears["router"] is not None]
        experts = sum(read(parts, layer) for layer in sparse) * used / count
        rest = sum(read(set(LINEARS) - set(parts), layer) for layer in self.layers) + self.head.bytes
        rest += sum(read(parts, layer) for layer in self.layers if layer.linears["router"] is None)
        return experts / (experts + rest)

    @classmethod
    def of(cls, library: ctypes.CDLL, w: DecoderWeights) -> NativeWeights:
        """Linears are taken one after the other: packed ones are let go of as soon as they are repacked."""
        linear = partial(NativeLinear, library, twice=w.twice, memory=LargePages())
        embedding = linear(w.embedding)
        head = embedding if w.head is w.embedding else linear(w.head)
        return cls(embedding, _layers(linear, w.layers), w.norm.float().contiguous(), head, w.dtype)


def _layers(linear: Callable[[Any], NativeLinear], layers: Iterable[LayerWeights]) -> tuple[NativeLayer, ...]:
    out = []
    for layer in layers:
        given = {name: getattr(layer, name) for name in LINEARS}
        linears = {name: None if w is None else linear(taken(w)) for name, w in given.items()}
        vectors = {name: getattr(layer, name) for name in VECTORS}
        out.append(NativeLayer(linears, {k: None if v is None else v.float().contiguous() for k, v in vectors.items()}))
    return tuple(out)
