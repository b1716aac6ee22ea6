"""Rotary positions (Su et al. 2021); pairs are formed from the halves of a head, as in Llama.

Networks and plain twins use `rotation` and `turn`. Serving uses a `table` and `rotate`: the rotation's sign is folded into the
sines, and the sum is rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Float[Tensor, "half"]:
    """theta ** (-i / half), float32: angle per position of each pair of a head, without any scaling."""
    half = head_dim // 2
    return theta ** -(torch.arange(half, dtype=torch.float32, device=device) / half)


def rotation(position: Int[Tensor, "*n"], inv_freq: Float[Tensor, "half"]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [*n, 1, head_dim] of positions, in the type of the frequencies."""
    angle = position[..., None].to(inv_freq.dtype) * inv_freq
    both = torch.cat([angle, angle], -1)[..., None, :]
    return both.cos(), both.sin()


def turn(x: Float[Tensor, "*n h d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*n h d"]:
    """Rotate queries or keys by a `rotation` of their positions."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def table(inv_freq: Float[Tensor, "half"], length: int, scale: float = 1.0) -> Float[Tensor, "L DD"]:
    """Row t: cosines of position t for a head's two halves, then sines with the rotation's sign folded in.

    scale: factor of cosines and sines (YaRN; 1.0 for most). In the type of the frequencies, which is float32 for every model.
    """
    angle = torch.outer(torch.arange(length, dtype=inv_freq.dtype, device=inv_freq.device), inv_freq)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return torch.cat([cos, cos, -sin, sin], -1)


def angles(turns: Float[Tensor, "L DD"], position: Int[Tensor, "n"]) -> tuple[Tensor, Tensor]:
    """Rows of a `table` as `rotate` takes them, [n, 1, head_dim] each."""
    cos, sin = F.embedding(position, turns).view(position.shape[0], 2, 1, -1).unbind(1)
    return cos, sin


def rotate(x: Float[Tensor, "n h d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "n h d"]:
    """`turn` by the `angles` of a table, which may be of the first numbers of a head: then the others stay."""
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], -1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
