"""Drafts the text that a grammar forces: keys, quotes and brackets of structured output, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

from outrider.drafters.tree.forest import chains
from outrider.errors import ConfigError
from outrider.types import Draft, Evidence, SequenceView


@runtime_checkable
class _Forcing(Protocol):
    """A logits pipeline with grammars."""

    def forced(self, sequence: SequenceView) -> list[int]: ...


class Forced:
    """Drafts the text that the request's grammar dictates, in the tokens its tokenizer would write it with.

    The text is certain; its tokens are not, since a model may split the same text differently. So they are point masses, verified
    like any draft. depth: most tokens of a draft, >= 1. least: with fewer tokens than this nothing is drafted, which leaves the
    sequence to the next drafter. Requests without a grammar have no draft.
    """

    name = "forced"
    layers: tuple[int, ...] = ()
    trees = False

    def __init__(self, depth: int, least: int = 1) -> None:
        if not 1 <= least <= depth:
            raise ConfigError(f"'forced:N' needs 1 <= N <= the draft length of {depth}, got {least}")
        self.max_depth = self.max_nodes = depth
        self.least = least

    def bind(self, slots: int, length: int) -> None:
        """Nothing to allocate."""

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """One chain per sequence of at most `budget[i]` tokens."""
        found = [
            self._chain(evidence, v, min(b, self.max_depth)) for v, b in zip(evidence.sequences, budget, strict=True)
        ]
        return chains(found, evidence.scores.logits.device)

    def _chain(self, evidence: Evidence, view: SequenceView, depth: int) -> list[int]:
        if depth < self.least or view.params.grammar is None:
            return []
        tokens = cast(_Forcing, evidence.pipeline).forced(view)[:depth]
        return tokens if len(tokens) >= self.least else []

    def release(self, slots: Sequence[int]) -> None:
        """This drafter keeps no state."""
