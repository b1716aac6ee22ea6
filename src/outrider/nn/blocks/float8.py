"""Weights in float8 with one scale for every rectangle of them, as DeepSeek-V3's checkpoints have them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def scaled_blocks(
    codes: Float[Tensor, "n k"], scales: Float[Tensor, "blocks_down blocks_across"], down: int, across: int
) -> Float[Tensor, "n k"]:
    """The float32 weights: each block of `down` rows and `across` columns times its scale; the last ones may be smaller.

    A block that is larger than the weights, as a configuration may have it, takes no more memory than they do.
    """
    n, k = codes.shape
    each = scales.float().repeat_interleave(min(down, n), 0)[:n].repeat_interleave(min(across, k), 1)[:, :k]
    return codes.float() * each
