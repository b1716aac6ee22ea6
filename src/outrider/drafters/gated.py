"""Some of the loaded drafters for one request, others for another: who may propose is the request's to say."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.drafters.combine import FirstOf, first_of
from outrider.protocols import Drafter
from outrider.types import Draft, Evidence


class SelectableDrafter:
    """The drafter `inner` as part number `number`: silent for a sequence whose `params.drafters` does not name it.

    It then has budget 0, as if another part had spoken: it still catches up. The choice is made before anything is drawn, so the
    laws of drafts stay honest. Requests without `drafters` may have them all.
    """

    def __init__(self, inner: Drafter, number: int) -> None:
        self.inner, self.number = inner, number
        self.name, self.layers, self.trees = inner.name, inner.layers, inner.trees
        self.max_nodes, self.max_depth = inner.max_nodes, inner.max_depth

    def bind(self, slots: int, length: int) -> None:
        """Bind the drafter."""
        self.inner.bind(slots, length)

    def release(self, slots: Sequence[int]) -> None:
        """The drafter forgets these slots."""
        self.inner.release(slots)

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """What the drafter proposes for the sequences that chose it."""
        chosen = [v.params.drafters for v in evidence.sequences]
        left = [b if c is None or self.number in c else 0 for b, c in zip(budget, chosen, strict=True)]
        return self.inner.draft(evidence, left)


def gated(drafter: Drafter) -> Drafter:
    """The same parts in the same order, each with its gate; the parts of a bound drafter stay bound."""
    parts = drafter.parts if isinstance(drafter, FirstOf) else (drafter,)
    return first_of(*(SelectableDrafter(part, number) for number, part in enumerate(parts)))
