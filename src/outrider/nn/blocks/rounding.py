"""Rounds float32 rows to blocks in one pass, without importance weights.

The types of 32 values round as ggml's reference code does, bit for bit. Those of 256 take scales from the extremes of their parts,
where ggml searches for better ones with less error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from outrider.errors import ConfigError, unknown_name
from outrider.nn.blocks.table import BlockType
from outrider.nn.blocks.values import FP4_VALUES, power

_ROWS = 1024
"""Rows that are rounded at a time."""

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


def _mxfp4(x: Numbers) -> Rounded:
    """The scale by the greatest magnitude, then the nearest of its sixteen numbers; of equally near ones the first."""
    d = x.abs().amax(1, keepdim=True)
    e = torch.where(d > 0, d.log2().floor() + 125, 0.0).clamp(min=0).to(torch.uint8)
    scale, best = power(e), torch.full_like(x, torch.inf)
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for code, value in enumerate(FP4_VALUES):
        error = (scale * value - x).abs_()
        nearer = error < best
        codes[nearer], best[nearer] = code, error[nearer]
    return torch.cat([e, _packed(codes)], 1)


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


def _six_bits(scale: Tensor, least: Tensor) -> UInt8[Tensor, "n twelve"]:
    """Eight scales and eight offsets of six bits, as `values.six_bit_scales` reads them."""
    a, b = scale.split(4, 1)
    c, d = least.split(4, 1)
    return torch.cat([a | (b >> 4 << 6), c | (d >> 4 << 6), (b & 15) | ((d & 15) << 4)], 1)


def _shared(parts: Float[Tensor, "n parts"], most: int) -> tuple[Float[Tensor, "n one"], Float[Tensor, "n parts"]]:
    """A half-precision unit (as float32), and the numbers in whole units of [-most, most]."""
    unit = (parts.abs().amax(1, keepdim=True) / most).half().float()
    return unit, (parts * _inverse(unit)).round().clamp(-most, most)


def _k_affine(most: int) -> Callable[[Numbers], Rounded]:
    """Eight parts of 32 values, each with a scale and an offset below 0 of six bits."""

    def take(x: Numbers) -> Rounded:
        parts = x.view(-1, 8, 32)
        least = parts.amin(2).clamp(max=0)
        d, scale = _shared((parts.amax(2) - least) / most, 63)
        dmin, offset = _shared(-least, 63)
        q = ((parts + (dmin * offset)[..., None]) * _inverse(d * scale)[..., None]).round().clamp(0, most)
        codes = q.to(torch.uint8).view(-1, 4, 2, 32)
        low = ((codes[:, :, 0] & 15) | ((codes[:, :, 1] & 15) << 4)).flatten(1)
        places = 1 << torch.arange(8, dtype=torch.int32).view(1, 8, 1)
        high = ((codes.view(-1, 8, 32) >> 4).int() * places).sum(1).to(torch.uint8)
        packed = _six_bits(scale.to(torch.uint8), offset.to(torch.uint8))
        return torch.cat([_halves(d, dmin), packed, *([high] if most == 31 else []), low], 1)

    return take


def _q6_k(x: Numbers) -> Rounded:
    """Sixteen parts of 16 values with a signed scale of eight bits each."""
    parts = x.view(-1, 16, 16)
    d, scale = _shared(_furthest(parts.reshape(-1, 16)).view(-1, 16) / -32, 127)
    codes = (parts * _inverse(d * scale)[..., None]).round().clamp(-32, 31).add(32).to(torch.uint8).view(-1, 2, 4, 32)
    low = torch.cat([(codes[:, :, g] & 15) | ((codes[:, :, g + 2] & 15) << 4) for g in (0, 1)], 2).flatten(1)
    places = torch.tensor([1, 4, 16, 64], dtype=torch.uint8).view(1, 1, 4, 1)
    high = ((codes >> 4) * places).sum(2, dtype=torch.uint8)
    return torch.cat([low, high.flatten(1), scale.to(torch.int8).view(torch.uint8), _halves(d)], 1)


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "f32": lambda x: x.view(torch.uint8),
    "f16": lambda x: x.half().view(torch.uint8),
    "bf16": lambda x: x.bfloat16().view(torch.uint8),
    "q8_0": _q8_0,
    "q4_0": _symmetric(8),
    "q4_1": _affine(15),
    "q5_0": _symmetric(16),
    "q5_1": _affine(31),
    "q4_k": _k_affine(15),
    "q5_k": _k_affine(31),
    "q6_k": _q6_k,
    "mxfp4": _mxfp4,
}
"""The types that numbers can be rounded to."""


def quantise(x: Float[Tensor, "N K"], block: BlockType) -> UInt8[Tensor, "N bytes"]:
    """Rows of numbers as rows of blocks. Raises ConfigError for a type without a rounding, or rows of broken blocks."""
    if block.name not in ROUNDED:
        raise ConfigError(unknown_name("type to round to", block.name, ROUNDED))
    width = block.row_bytes(x.shape[1])
    out = torch.empty(x.shape[0], width, dtype=torch.uint8)
    for rows, part in zip(x.split(_ROWS), out.split(_ROWS), strict=True):
        part.copy_(ROUNDED[block.name](rows.float().reshape(-1, block.values).contiguous()).view(part.shape))
    return out
