"""Weights in blocks, as GGUF stores them: sizes, values, and rounding. See `table`."""

from outrider.nn.blocks.rounding import quantise
from outrider.nn.blocks.table import BLOCKS, REMOVED, UNREAD, BlockType, Segment, dequantise, finite, named

__all__ = ["BLOCKS", "REMOVED", "UNREAD", "BlockType", "Segment", "dequantise", "finite", "named", "quantise"]
