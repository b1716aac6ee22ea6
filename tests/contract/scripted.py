"""A drafter and a controller that do what a test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from outrider.records import StepRecord
from outrider.types import Draft, Evidence, Proposal, SequenceView

Script = Callable[[SequenceView, int], list[int]]


class Scripted:
    """Proposes the chain that `script(view, budget)` returns, one call per sequence and step; distributions from `law` if given."""

    name, layers, trees = "scripted", (), False

    def __init__(
        self, script: Script, depth: int = 8, distribution: Callable[[int], torch.Tensor] | None = None
    ) -> None:
        self.script, self.distribution = script, distribution
        self.max_depth = self.max_nodes = depth
        self.released: list[int] = []

    def bind(self, slots: int, length: int) -> None:
        pass

    def release(self, slots: Sequence[int]) -> None:
        self.released += slots

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        chains = [self.script(v, k)[:k] if k else [] for v, k in zip(evidence.sequences, budget, strict=True)]
        parent = tuple(i - 1 if i else -1 for c in chains for i in range(len(c)))
        offsets = [0]
        for c in chains:
            offsets.append(offsets[-1] + len(c))
        parent = tuple(offsets[b] + i - 1 if i else -1 for b, c in enumerate(chains) for i in range(len(c)))
        flat = [t for c in chains for t in c]
        q = Proposal(self.distribution(len(flat)), tuple(range(len(flat)))) if self.distribution and flat else None
        return Draft(torch.tensor(flat, dtype=torch.int64), parent, tuple(map(len, chains)), q)


class Budgets:
    """A controller whose depth is any function of the sequence."""

    def __init__(self, depth: Callable[[SequenceView], int]) -> None:
        self.depth = depth

    def budget(self, sequences: Sequence[SequenceView]) -> list[int]:
        return [self.depth(s) for s in sequences]

    def observe(self, record: StepRecord) -> None:
        pass
