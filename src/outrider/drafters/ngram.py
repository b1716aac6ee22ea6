"""Prompt lookup: drafts what followed the latest earlier occurrence of the text's end (Saxena 2023; Yang et al. 2023). No model."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.drafters.tree.forest import chains
from outrider.errors import ConfigError
from outrider.types import Draft, Evidence


class _Index:
    """For every n-gram of a history that has a follower, the position of its most recent follower."""

    __slots__ = ("last", "size", "tables")

    def __init__(self, min_n: int, max_n: int) -> None:
        self.tables: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(max_n, min_n - 1, -1)}
        self.size = 0  # tokens read
        self.last = -1  # the last of them: a cheap check that the slot still holds the same text

    def follows(self, tokens: list[int]) -> bool:
        """Whether `tokens` may continue the indexed text."""
        return self.size <= len(tokens) and (self.size == 0 or tokens[self.size - 1] == self.last)

    def extend(self, tokens: list[int]) -> None:
        """Index the new tokens: O(max_n) dictionary writes per token, in bulk, each token once."""
        end = len(tokens)
        for n, table in self.tables.items():
            # an n-gram ending before token e (exclusive) is entered once token e, its follower, is known
            begin, stop = max(self.size - n, 0), max(end - n, 0)
            grams = zip(*(tokens[begin + j : stop + j] for j in range(n)), strict=False)
            table.update(zip(grams, range(begin + n, end), strict=False))
        self.size, self.last = end, tokens[-1]

    def find(self, tokens: list[int]) -> int:
        """Position of the most recent follower of the longest known suffix of `tokens`; -1 if there is none."""
        for n, table in self.tables.items():
            at = table.get(tuple(tokens[-n:]))
            if at is not None:
                return at
        return -1


class NGram:
    """Drafts what followed the most recent occurrence of the longest n-gram (max_n down to min_n) that ends the text.

    depth: most tokens a draft has, >= 1. 1 <= min_n <= max_n. Every node is a point mass.
    """

    name = "ngram"
    layers: tuple[int, ...] = ()
    trees = False

    def __init__(self, depth: int, *, max_n: int = 4, min_n: int = 2) -> None:
        if depth < 1:
            raise ConfigError(
                f"the n-gram drafter needs a length >= 1, got {depth}; use the drafter 'none' to draft nothing"
            )
        if not 1 <= min_n <= max_n:
            raise ConfigError(f"n-gram sizes must satisfy 1 <= min_n <= max_n, got min_n={min_n}, max_n={max_n}")
        self.max_depth = self.max_nodes = depth
        self.sizes = (min_n, max_n)
        self._index: dict[int, _Index] = {}

    def bind(self, slots: int, length: int) -> None:
        """Nothing to allocate: an index grows with its text."""

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """One chain per sequence. With budget 0 nothing is indexed; the next positive budget indexes all new tokens."""
        found = [
            self._continue(v.slot, v.tokens, min(b, self.max_depth)) if b > 0 else ()
            for v, b in zip(evidence.sequences, budget, strict=True)
        ]
        return chains(found, evidence.scores.logits.device)

    def _continue(self, slot: int, tokens: list[int], depth: int) -> list[int]:
        index = self._index.get(slot)
        if index is None or not index.follows(tokens):
            index = self._index[slot] = _Index(*self.sizes)
        index.extend(tokens)
        at = index.find(tokens)
        return tokens[at : at + depth] if at >= 0 else []

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        for slot in slots:
            self._index.pop(slot, None)
