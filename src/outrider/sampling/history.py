"""Token counts of a sequence for penalties, updated instead of recounted in every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class History:
    """Distinct tokens of one sequence and how often each occurs in its output; grows with the sequence.

    A memo, not a state: `follow` recounts from the start unless the same list has only grown at its end.
    """

    def __init__(self) -> None:
        self._reset([], 0)

    def _reset(self, tokens: list[int], prompt: int) -> None:
        self._tokens, self._prompt = tokens, prompt
        self._seen = 0  # tokens counted so far
        self._place: dict[int, int] = {}  # token -> its place in the arrays
        self._ids = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.float64)
        self._last = -1

    def follow(self, tokens: list[int], prompt: int) -> None:
        """Count the new tokens of `tokens` (the first `prompt` of them are the prompt). O(new tokens)."""
        grown = tokens is self._tokens and prompt == self._prompt and len(tokens) >= self._seen
        if not grown or (self._seen and tokens[self._seen - 1] != self._last):
            self._reset(tokens, prompt)
        for i in range(self._seen, len(tokens)):
            token = tokens[i]
            place = self._place.get(token)
            if place is None:
                place = self._place[token] = len(self._place)
                self._grow(place + 1)
                self._ids[place], self._counts[place] = token, 0.0
            if i >= prompt:
                self._counts[place] += 1.0
        self._seen = len(tokens)
        self._last = tokens[-1] if tokens else -1

    def _grow(self, size: int) -> None:
        if size > len(self._ids):
            room = max(64, 2 * size)
            self._ids = np.concatenate([self._ids, np.empty(room - len(self._ids), dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.empty(room - len(self._counts), dtype=np.float64)])

    def along(self, path: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Distinct tokens [u] of the sequence followed by `path`, and their counts [u] in the output, including the path."""
        size = len(self._place)
        ids, counts = self._ids[:size], self._counts[:size]
        if not path:
            return ids, counts
        counts = counts.copy()
        new: dict[int, float] = {}
        for token in path:
            place = self._place.get(token)
            if place is None:
                new[token] = new.get(token, 0.0) + 1.0
            else:
                counts[place] += 1.0
        if new:
            ids = np.concatenate([ids, np.fromiter(new, dtype=np.int64, count=len(new))])
            counts = np.concatenate([counts, np.fromiter(new.values(), dtype=np.float64, count=len(new))])
        return ids, counts
