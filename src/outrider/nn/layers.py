"""Layers shared by decoders, and one decoder layer fused for serving.

RMSNorm: Zhang, Sennrich 2019. SwiGLU: Shazeer 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from outrider.nn.linear import Linear, draft_linear

Norm = Callable[[Tensor], Tensor]


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)), named as in Llama and Qwen3."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """A decoder layer fused for serving: products that share an input are one, with all heads side by side.

    norm1, norm2: of the inputs of attention and feed-forward part, or the identity. post1, post2: of their outputs. qk_norm: of
    queries and keys [n, heads + kv_heads, head_dim], or None. act: in place or not; scale: of what is added to the residual
    stream. sinks: see `nn.attention.attend`.
    """

    norm1: Norm
    qkv: Linear
    qk_norm: Norm | None
    o: Linear
    norm2: Norm
    gate_up: Linear
    down: Linear
    post1: Norm | None = None
    post2: Norm | None = None
    act: Norm = F.silu
    scale: float = 1.0
    sinks: Tensor | None = None

    @staticmethod
    def of(layer: Any) -> FusedLayer:
        """A layer of a learned drafter, named as in Llama and Qwen3, with `draft_linear`s of its weights."""
        attn, mlp = layer.self_attn, layer.mlp
        return FusedLayer(
            norm1=getattr(layer, "input_layernorm", nn.Identity()),
            qkv=draft_linear(*_joined(attn.q_proj, attn.k_proj, attn.v_proj)),
            qk_norm=_of_both(attn.q_norm, attn.k_norm, attn.q_proj.weight.shape[0])
            if hasattr(attn, "q_norm")
            else None,
            o=draft_linear(attn.o_proj.weight),
            norm2=layer.post_attention_layernorm,
            gate_up=draft_linear(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
            down=draft_linear(mlp.down_proj.weight),
        )

    def leave(self, seen: Float[Tensor, "n A"], residual: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        """The layer's output from the attention's output and the layer's input."""
        x = self._join(self.o, self.post1, seen, residual)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return self._join(self.down, self.post2, self.act(gate).mul_(up), x)

    def _join(self, linear: Linear, post: Norm | None, part: Tensor, x: Tensor) -> Tensor:
        if post is None and self.scale == 1:
            return linear.add(part, x)
        out = linear(part) if post is None else post(linear(part))
        return x + out * self.scale


def _joined(*linears: Any) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of linears side by side; None where they have no biases."""
    biases = [linear.bias for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    return weight, None if biases[0] is None else torch.cat(biases)


def of_rows(q_norm: Norm, k_norm: Norm, heads: int) -> Norm:
    """Norms of all queries (the first `heads` heads) of a row together, and of all keys, on both side by side (OLMo 2)."""

    def norm(qk: Float[Tensor, "n heads D"]) -> Float[Tensor, "n heads D"]:
        q, k = qk[:, :heads].flatten(1), qk[:, heads:].flatten(1)
        return torch.cat([q_norm(q), k_norm(k)], 1).view(qk.shape)

    return norm


def _of_both(q_norm: Norm, k_norm: Norm, width: int) -> Norm:
    """Norms of queries (the first `width` numbers) and of keys, on both side by side."""

    def norm(qk: Float[Tensor, "n heads D"]) -> Float[Tensor, "n heads D"]:
        heads = width // qk.shape[-1]
        return torch.cat([q_norm(qk[:, :heads]), k_norm(qk[:, heads:])], 1)

    return norm


def rms_norm(weight: Float[Tensor, "*h D"], eps: float, *, of: torch.dtype | None = None) -> Norm:
    """x / rms(x) * weight over the last dimension.

    of: the type of x, by default the weight's. Half precision is rounded before the weight, as in transformers' Llama; behind it if
    the weight is wider than x, as in its Gemma and OLMo 2.
    """
    dtype = of or weight.dtype
    if weight.device.type == "cpu" and weight.dtype == dtype and dtype in (torch.float32, torch.float64):
        return _CpuNorm(weight, eps)

    def norm(x: Tensor) -> Tensor:
        wide = x.float() if x.dtype.itemsize < 4 else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed if weight.dtype != dtype else normed.to(dtype)).mul(weight).to(dtype)

    return norm


class _CpuNorm:
    """The same in five operations instead of eleven: for few rows, starting an operation costs more than its arithmetic."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight, self._eps, self._share = weight, weight.new_full((), eps), 1 / weight.shape[-1]

    def __call__(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.addcmul(self._eps, norm, norm, value=self._share).rsqrt_().mul(x).mul_(self._weight)
