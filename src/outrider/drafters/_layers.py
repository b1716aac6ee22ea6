"""What the networks of learned drafters have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)), named as in Llama and Qwen3."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotation(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [*n, 1, head_dim] of rotary positions."""
    half = head_dim // 2
    powers = torch.arange(half, dtype=torch.float32, device=position.device) / half
    angle = position[..., None].float() * theta**-powers
    turned = torch.cat([angle, angle], -1)[..., None, :]
    return turned.cos().to(dtype), turned.sin().to(dtype)


def turn(x: Float[Tensor, "*n h d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*n h d"]:
    """Rotate queries or keys by their positions; the halves of a head are its pairs, as in Llama."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin
