"""The table of block types: name, ggml's number, values and bytes of a block, and what its bytes mean.

Numbers and sizes are those of ggml (`ggml.h`, `ggml-common.h`). A row of a weight is whole blocks: K inputs are
K / values blocks, one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from outrider.errors import ConfigError, unknown_name
from outrider.nn.blocks import values

_CHUNK = 1 << 20
"""Values that are taken apart at a time: their codes take several times the bytes of the blocks."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """A ggml type. values, bytes: of one block. scales: where the half-precision numbers of a block begin, in bytes."""

    name: str
    number: int
    values: int
    bytes: int
    take: Callable[[Tensor], Tensor]
    scales: tuple[int, ...] = ()

    @property
    def widened(self) -> bool:
        """Whether the native decoder keeps its values in float32, as it has no products with them."""
        return self.number not in KERNELS and self.name not in ("f32", "bf16")

    @property
    def plain(self) -> bool:
        """Whether a block is one ordinary number."""
        return self.values == 1

    def row_bytes(self, inputs: int) -> int:
        """Bytes of a row of `inputs` values. Raises ConfigError if they are no whole blocks."""
        if inputs % self.values:
            raise ConfigError(f"{inputs} values are no whole blocks of {self.name}, which have {self.values}")
        return inputs // self.values * self.bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of a weight in one type: `rows` holds whole blocks, [N, bytes of a row of K inputs].

    A linear layer is one or several of them, one below the other: a file may hold queries and values in different types.
    """

    block: BlockType
    rows: UInt8[Tensor, "N bytes"]

    @property
    def outputs(self) -> int:
        """N."""
        return self.rows.shape[0]

    @property
    def inputs(self) -> int:
        """K."""
        return self.rows.shape[1] // self.block.bytes * self.block.values


_ALL = (
    BlockType("f32", 0, 1, 4, values.f32),
    BlockType("f16", 1, 1, 2, values.f16),
    BlockType("q4_0", 2, 32, 18, values.q4_0, (0,)),
    BlockType("q4_1", 3, 32, 20, values.q4_1, (0, 2)),
    BlockType("q5_0", 6, 32, 22, values.q5_0, (0,)),
    BlockType("q5_1", 7, 32, 24, values.q5_1, (0, 2)),
    BlockType("q8_0", 8, 32, 34, values.q8_0, (0,)),
    BlockType("q2_k", 10, 256, 84, values.q2_k, (80, 82)),
    BlockType("q3_k", 11, 256, 110, values.q3_k, (108,)),
    BlockType("q4_k", 12, 256, 144, values.q4_k, (0, 2)),
    BlockType("q5_k", 13, 256, 176, values.q5_k, (0, 2)),
    BlockType("q6_k", 14, 256, 210, values.q6_k, (208,)),
    BlockType("iq4_nl", 20, 32, 18, values.iq4_nl, (0,)),
    BlockType("iq4_xs", 23, 256, 136, values.iq4_xs, (0,)),
    BlockType("f64", 28, 1, 8, values.f64),
    BlockType("bf16", 30, 1, 2, values.bf16),
    BlockType("mxfp4", 39, 32, 17, values.mxfp4),
)
INT8 = BlockType("int8", 1000, 32, 36, values.int8)
"""One scale for a whole row, which stands in each of its blocks. No type of ggml, so never in a file of it."""
BLOCKS = {block.number: block for block in _ALL}
"""ggml's number -> the type, for every type that is read."""
KERNELS = frozenset(
    block.number
    for block in (*_ALL, INT8)
    if block.name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "mxfp4", "int8")
)
"""Types that the native decoder multiplies as they are stored; its formats.h has their layouts."""

UNREAD = {
    9: "q8_1", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 21: "iq3_s", 22: "iq2_s", 24: "i8",
    25: "i16", 26: "i32", 27: "i64", 29: "iq1_m", 34: "tq1_0", 35: "tq2_0", 40: "nvfp4", 41: "q1_0",
}  # fmt: skip
"""Types that ggml has and that are not read here."""
REMOVED = {
    4: "q4_2", 5: "q4_3", 31: "q4_0_4_4", 32: "q4_0_4_8", 33: "q4_0_8_8", 36: "iq4_nl_4_4", 37: "iq4_nl_4_8",
    38: "iq4_nl_8_8",
}  # fmt: skip
"""Types that ggml had once; llama.cpp refuses them too."""


def named(name: str) -> BlockType:
    """The type of that name, in any case. Raises ConfigError for an unknown one."""
    found = {block.name: block for block in (*_ALL, INT8)}
    if name.lower() not in found:
        raise ConfigError(unknown_name("type", name, found))
    return found[name.lower()]


def dequantise(
    rows: UInt8[Tensor, "N bytes"], block: BlockType, out: Float[Tensor, "N K"] | None = None
) -> Float[Tensor, "N K"]:
    """The values of rows of whole blocks, float32 (or rounded to the type of `out`, into which they are written).

    Equal to `gguf.quants.dequantize` bit for bit; it is the plain twin of the products with packed blocks.
    """
    count, width = rows.shape[0], rows.shape[1] // block.bytes * block.values
    out = rows.new_empty((count, width), dtype=torch.float32) if out is None else out
    step = max(1, _CHUNK * block.bytes // max(rows.shape[1] * block.values, 1))
    for first in range(0, count, step):
        part = rows[first : first + step]
        out[first : first + step] = block.take(part.reshape(-1, block.bytes)).view(part.shape[0], width)
    return out


def finite(segment: Segment) -> bool:
    """Whether every scale of a segment (every number of a plain one) is finite: one that is not makes all logits NaN."""
    block, rows = segment.block, segment.rows
    if block.plain:
        step = max(1, _CHUNK // max(rows.shape[1], 1))
        return all(bool(block.take(part).isfinite().all()) for part in rows.split(step))
    blocks = rows.reshape(-1, block.bytes)
    if block.name == "mxfp4":
        return not bool((blocks[:, 0] == 255).any())
    return all(bool(((blocks[:, at + 1] & 0x7C) != 0x7C).all()) for at in block.scales)
