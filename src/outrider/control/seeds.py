"""Which requests keep one draft length whatever is measured."""

from __future__ import annotations

from outrider.types import SequenceView


def pinned(view: SequenceView, invariant: bool) -> bool:
    """Whether measurements may not set this sequence's draft length: it is sampled with its request's own seed, and its text, which
    must depend on the seed alone, depends on the length unless the rule is `invariant`."""
    return not invariant and view.params.seed is not None and not view.params.greedy
