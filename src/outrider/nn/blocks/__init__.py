"""Weights in blocks, as GGUF stores them: sizes, values, and rounding. See `table`."""

from outrider.nn.blocks.rounding import quantise
from outrider.nn.blocks.table import (
    BLOCKS,
    INT8,
    KERNELS,
    REMOVED,
    UNREAD,
    BlockType,
    Segment,
    dequantise,
    finite,
    named,
)

__all__ = [
    "BLOCKS",
    "INT8",
    "KERNELS",
    "REMOVED",
    "UNREAD",
    "BlockType",
    "Segment",
    "dequantise",
    "finite",
    "named",
    "quantise",
]
