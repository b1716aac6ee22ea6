"""The shapes that the native decoder's weights must have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from outrider.models.decoder import NORMS, ROUTERS, DecoderConfig, DecoderWeights, Experts

ODD = "save the checkpoint again with tensors of its configuration's shapes and of one type"


def unlike(config: DecoderConfig, weights: DecoderWeights) -> str | None:
    """Why the decoder cannot read these plain weights, in a clause; None if it can. Readers check packed ones."""
    if weights.packed:
        return None
    for name, tensor, shape in _expected(config, weights):
        if tensor.shape != shape:
            return f"{name} has shape {tuple(tensor.shape)}, not {shape}; {ODD}"
        wide = weights.wide_norms and name.split()[0] in (*NORMS, "norm")
        dtype = (
            torch.float32 if wide or (name.split()[0] in ROUTERS and tensor.dtype is torch.float32) else weights.dtype
        )
        if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return f"{name} is not a contiguous CPU tensor of the embedding's type; {ODD}"
    return None


def _expected(config: DecoderConfig, weights: DecoderWeights) -> list[tuple[str, Tensor, tuple[int, ...]]]:
    """Every existing tensor, with the shape it must have."""
    c, wide = config, config.heads * config.head_dim
    fused = wide + 2 * config.kv_heads * config.head_dim
    rows = any(layer.q_norm is not None and len(layer.q_norm) != c.head_dim for layer in weights.layers)
    shapes: dict[str, tuple[int, ...]] = {
        "norm1": (c.hidden,),
        "qkv": (fused, c.hidden),
        "qkv_bias": (fused,),
        "q_norm": (wide,) if rows else (c.head_dim,),
        "k_norm": (c.kv_heads * c.head_dim,) if rows else (c.head_dim,),
        "post1": (c.hidden,),
        "post2": (c.hidden,),
        "o": (c.hidden, wide),
        "o_bias": (c.hidden,),
        "norm2": (c.hidden,),
        "gate_up": (2 * c.inner, c.hidden),
        "down": (c.hidden, c.inner),
        "sinks": (c.heads,),
    }
    count, _, inner, _, shared = sizes_of(c.experts)
    sparse = {"router": (count, c.hidden), "gate_up": (2 * count * inner, c.hidden), "down": (count * c.hidden, inner)}
    sparse |= {
        "shared_gate_up": (2 * shared, c.hidden),
        "shared_down": (c.hidden, shared),
        "shared_gate": (1, c.hidden),
    }
    sparse |= {"router_bias": (count,), "gate_up_bias": (2 * count * inner,), "down_bias": (count * c.hidden,)}
    out: list[tuple[str, Any, tuple[int, ...]]] = [
        ("embedding", weights.embedding, (c.vocab_size, c.hidden)),
        ("norm", weights.norm, (c.hidden,)),
        ("head", weights.head, (c.vocab_size, c.hidden)),
    ]
    for i, layer in enumerate(weights.layers):
        of = shapes if layer.router is None else shapes | sparse
        tensors = {name: getattr(layer, name) for name in of}
        out += [(f"{name} of layer {i}", t, of[name]) for name, t in tensors.items() if t is not None]
    return out


def sizes_of(experts: Experts | None) -> tuple[int, int, int, int, int]:
    """Experts, those that a row uses, units of one, whether weights are normalised, units of the one that every row uses."""
    e = experts
    return (0, 0, 0, 0, 0) if e is None else (e.count, e.used, e.inner, int(e.normalised), e.shared)
