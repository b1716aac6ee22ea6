"""Rounds float32 rows to blocks, as ggml's reference code does (one pass, no importance weights)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from outrider.errors import ConfigError, unknown_name
from outrider.nn.blocks.table import BlockType

Rounded = UInt8[Tensor, "n bytes"]
Numbers = Float[Tensor, "n values"]


def _halves(*numbers: Float[Tensor, "n one"]) -> UInt8[Tensor, "n bytes"]:
    return torch.cat([x.half() for x in numbers], 1).view(torch.uint8)


def _inverse(d: Float[Tensor, "n one"]) -> Float[Tensor, "n one"]:
    return torch.where(d == 0, 0.0, 1 / d)


def _furthest(x: Numbers) -> Float[Tensor, "n one"]:
    """The number of greatest magnitude, with its sign; the first of several."""
    return x.gather(1, x.abs().argmax(1, keepdim=True))


def _packed(codes: UInt8[Tensor, "n thirtytwo"]) -> UInt8[Tensor, "n sixteen"]:
    low, high = (codes & 15).chunk(2, 1)
    return low | (high << 4)


def _top_bits(codes: UInt8[Tensor, "n thirtytwo"]) -> UInt8[Tensor, "n four"]:
    places = 1 << torch.arange(8, dtype=torch.int32)
    return ((codes >> 4).view(-1, 4, 8).int() * places).sum(-1).to(torch.uint8)


def _codes(x: Numbers, most: int) -> UInt8[Tensor, "n values"]:
    return x.trunc().clamp(0, most).to(torch.uint8)


def _q8_0(x: Numbers) -> Rounded:
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    q = torch.where(scaled < 0, (scaled - 0.5).ceil(), (scaled + 0.5).floor())
    return torch.cat([_halves(d), q.to(torch.int8).view(torch.uint8)], 1)


def _symmetric(levels: int) -> Callable[[Numbers], Rounded]:
    """d from the number of greatest magnitude, which becomes the lowest code."""

    def take(x: Numbers) -> Rounded:
        d = _furthest(x) / -levels
        q = _codes(x * _inverse(d) + (levels + 0.5), 2 * levels - 1)
        return torch.cat([_halves(d), *([_top_bits(q)] if levels == 16 else []), _packed(q)], 1)

    return take


def _affine(most: int) -> Callable[[Numbers], Rounded]:
    """d and m from the least and the greatest number."""

    def take(x: Numbers) -> Rounded:
        least = x.amin(1, keepdim=True)
        d = (x.amax(1, keepdim=True) - least) / most
        q = _codes((x - least) * _inverse(d) + 0.5, most)
        return torch.cat([_halves(d, least), *([_top_bits(q)] if most == 31 else []), _packed(q)], 1)

    return take


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "f32": lambda x: x.view(torch.uint8),
    "f16": lambda x: x.half().view(torch.uint8),
    "bf16": lambda x: x.bfloat16().view(torch.uint8),
    "q8_0": _q8_0,
    "q4_0": _symmetric(8),
    "q4_1": _affine(15),
    "q5_0": _symmetric(16),
    "q5_1": _affine(31),
}
"""The types that numbers can be rounded to."""


def quantise(x: Float[Tensor, "N K"], block: BlockType) -> UInt8[Tensor, "N bytes"]:
    """Rows of numbers as rows of blocks. Raises ConfigError for a type without a rounding, or rows of broken blocks."""
    if block.name not in ROUNDED:
        raise ConfigError(unknown_name("type to round to", block.name, ROUNDED))
    width = block.row_bytes(x.shape[1])
    return ROUNDED[block.name](x.float().reshape(-1, block.values).contiguous()).view(x.shape[0], width)
