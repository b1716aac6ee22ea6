"""The float32 values of blocks: [n, bytes of a block] -> [n, values of a block], one function for each type.

Each is one product (and one sum) of float32 numbers per value, in the order of the `gguf` package's own twin, so that both agree
bit for bit. Layouts: llama.cpp's `ggml-common.h`; the half-precision numbers d and m are scale and offset of a block.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the 16 codes of the types IQ4 stand for."""
FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the numbers of e2m1, by code."""

Blocks = UInt8[Tensor, "n bytes"]
Values = Float[Tensor, "n values"]


def half(part: UInt8[Tensor, "n two"]) -> Float[Tensor, "n one"]:
    """Half-precision numbers, widened."""
    return part.contiguous().view(torch.float16).float()


def nibbles(part: UInt8[Tensor, "n bytes"], span: int) -> UInt8[Tensor, "n codes"]:
    """Of every `span` bytes first the low halves, then the high ones."""
    bytes_ = part.reshape(part.shape[0], -1, 1, span)
    return torch.cat([bytes_ & 15, bytes_ >> 4], 2).reshape(part.shape[0], -1)


def bits(part: UInt8[Tensor, "n bytes"], width: int, span: int) -> UInt8[Tensor, "n codes"]:
    """Of every `span` bytes first all the lowest `width` bits, then the next ones, and so on."""
    shift = torch.arange(0, 8, width, dtype=torch.uint8, device=part.device).view(1, 1, -1, 1)
    spread = part.reshape(part.shape[0], -1, 1, span) >> shift
    return (spread & ((1 << width) - 1)).reshape(part.shape[0], -1)


def q8_0(b: Blocks) -> Values:
    return b[:, 2:].contiguous().view(torch.int8).float() * half(b[:, :2])


def int8(b: Blocks) -> Values:
    return b[:, 4:].contiguous().view(torch.int8).float() * b[:, :4].contiguous().view(torch.float32)


def q4_0(b: Blocks) -> Values:
    return half(b[:, :2]) * (nibbles(b[:, 2:], 16).float() - 8)


def q4_1(b: Blocks) -> Values:
    return half(b[:, :2]) * nibbles(b[:, 4:], 16).float() + half(b[:, 2:4])


def _fifth(high: UInt8[Tensor, "n four"], low: UInt8[Tensor, "n sixteen"]) -> Float[Tensor, "n codes"]:
    """Codes of five bits: bit i of the 32 in `high` is the top bit of code i."""
    return (nibbles(low, 16) | (bits(high, 1, 1) << 4)).float()


def q5_0(b: Blocks) -> Values:
    return half(b[:, :2]) * (_fifth(b[:, 2:6], b[:, 6:]) - 16)


def q5_1(b: Blocks) -> Values:
    return half(b[:, :2]) * _fifth(b[:, 4:8], b[:, 8:]) + half(b[:, 2:4])


def _spread(scale: Float[Tensor, "n parts"], codes: Float[Tensor, "n codes"]) -> Float[Tensor, "n codes"]:
    """The product, each scale for an equal part of the codes."""
    parts = codes.reshape(*scale.shape, -1)
    return (scale[..., None] * parts).reshape(codes.shape)


def q2_k(b: Blocks) -> Values:
    scales = b[:, :16]
    low, least = half(b[:, 80:82]) * (scales & 15).float(), half(b[:, 82:84]) * (scales >> 4).float()
    return _spread(low, bits(b[:, 16:80], 2, 32).float()) - least.repeat_interleave(16, 1)


def q3_k(b: Blocks) -> Values:
    """32 bytes of top bits (0 means: minus 4), 64 of codes, 12 of sixteen scales of six bits, d."""
    low, high = nibbles(b[:, 96:104], 8), bits(b[:, 104:108], 2, 4)
    scale = half(b[:, 108:110]) * ((low | (high << 4)).float() - 32)
    codes = bits(b[:, 32:96], 2, 32).float() - 4 * (1 - bits(b[:, :32], 1, 32).float())
    return _spread(scale, codes)


def six_bit_scales(s: UInt8[Tensor, "n twelve"]) -> tuple[UInt8[Tensor, "n eight"], UInt8[Tensor, "n eight"]]:
    """Scales and offsets of the eight parts of a block of Q4_K or Q5_K."""
    a, m, rest = s.split(4, 1)
    scale = torch.cat([a & 63, (rest & 15) | ((a >> 2) & 48)], 1)
    return scale, torch.cat([m & 63, (rest >> 4) | ((m >> 2) & 48)], 1)


def _k_scaled(b: Blocks, codes: Float[Tensor, "n codes"]) -> Values:
    scale, least = six_bit_scales(b[:, 4:16])
    high, low = half(b[:, :2]) * scale.float(), half(b[:, 2:4]) * least.float()
    return _spread(high, codes) - low.repeat_interleave(32, 1)


def q4_k(b: Blocks) -> Values:
    return _k_scaled(b, nibbles(b[:, 16:], 32).float())


def q5_k(b: Blocks) -> Values:
    return _k_scaled(b, (nibbles(b[:, 48:], 32) | (bits(b[:, 16:48], 1, 32) << 4)).float())


def q6_k(b: Blocks) -> Values:
    scale = half(b[:, 208:]) * b[:, 192:208].contiguous().view(torch.int8).float()
    codes = nibbles(b[:, :128], 64) | (bits(b[:, 128:192], 2, 32) << 4)
    return _spread(scale, codes.float() - 32)


def iq4_nl(b: Blocks) -> Values:
    return half(b[:, :2]) * _looked_up(IQ4_VALUES, nibbles(b[:, 2:], 16))


def iq4_xs(b: Blocks) -> Values:
    low = torch.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], -1).flatten(1)
    scale = half(b[:, :2]) * ((low | (bits(b[:, 2:4], 2, 1) << 4)).float() - 32)
    return _spread(scale, _looked_up(IQ4_VALUES, nibbles(b[:, 8:], 16)))


def power(e: UInt8[Tensor, "n one"]) -> Float[Tensor, "n one"]:
    """The scale 2 ** (e - 128) of MXFP4: half of what e8m0 says, since the table holds doubles."""
    e = e.to(torch.int32)
    word = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1).clamp(min=0) << 23)
    return word.view(torch.float32)


def mxfp4(b: Blocks) -> Values:
    return power(b[:, :1]) * _looked_up(FP4_VALUES, nibbles(b[:, 1:], 16))


def _looked_up(values: tuple[int, ...], codes: UInt8[Tensor, "n codes"]) -> Float[Tensor, "n codes"]:
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.long()]


def f32(b: Blocks) -> Values:
    return b.contiguous().view(torch.float32)


def f16(b: Blocks) -> Values:
    return half(b)


def bf16(b: Blocks) -> Values:
    return b.contiguous().view(torch.bfloat16).float()


def f64(b: Blocks) -> Values:
    return b.contiguous().view(torch.float64).float()
