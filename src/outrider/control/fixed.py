"""The same draft length for every sequence."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.errors import ConfigError
from outrider.records import StepRecord
from outrider.types import SequenceView


class Fixed:
    """Every sequence may draft `length` >= 0 tokens in every step."""

    def __init__(self, length: int) -> None:
        if length < 0:
            raise ConfigError(f"the draft length must be >= 0, got {length}; 0 is plain decoding")
        self.length = length

    def budget(self, sequences: Sequence[SequenceView]) -> list[int]:
        """`length` for each of `sequences`."""
        return [self.length] * len(sequences)

    def observe(self, record: StepRecord) -> None:
        """A fixed length does not use records."""
