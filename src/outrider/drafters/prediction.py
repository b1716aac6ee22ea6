"""The user's predicted output as a draft: an edited file mostly repeats the file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from outrider.drafters.tree.forest import chains
from outrider.errors import ConfigError
from outrider.types import Draft, Evidence, SequenceView

MAX_N = 4
"""Longest n-gram looked for when the output has left the prediction."""


_MASK = (1 << 64) - 1
_FACTORS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)
"""A key is the sum of an n-gram's tokens, last first, times these, modulo 2^64."""


class Places:
    """Positions of a prediction's n-grams, for n up to MAX_N: sorted by their keys once, then found by bisection.

    Prepared in O(n log n) by the first look-up, or by `prepare` from any thread; a look-up is O(log n) for any prediction.
    """

    def __init__(self, prediction: tuple[int, ...]) -> None:
        self.prediction = prediction
        self._tables: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]] | None = None

    def prepare(self) -> None:
        """Sort the n-grams, if that has not been done."""
        if self._tables is not None:
            return
        tokens = np.array(self.prediction, dtype=np.uint64)
        keys, tables = np.zeros(len(tokens) + 1, dtype=np.uint64), []
        for n in range(1, MAX_N + 1):  # keys[i]: of the n tokens before place i + n
            keys = keys[1:] + tokens[: max(len(keys) - 1, 0)] * np.uint64(_FACTORS[n - 1])
            order = np.argsort(keys, kind="stable")
            tables.append((keys[order], order + n))
        self._tables = tables

    def behind(self, end: list[int], base: int) -> tuple[int, int]:
        """The position after the longest n-gram that equals the last n tokens of `end`, and n. Of several, the nearest at or after
        `base`, or else the first.

        (-1, 0): not even the last token occurs in the prediction.
        """
        self.prepare()
        assert self._tables is not None
        key, best = 0, (-1, 0)
        for n, (keys, places) in enumerate(self._tables, start=1):
            if n > len(end):
                break
            key = (key + end[-n] * _FACTORS[n - 1]) & _MASK
            low, high = (int(np.searchsorted(keys, np.uint64(key), side)) for side in ("left", "right"))
            if low == high:
                break
            near = low + int(np.searchsorted(places[low:high], base))
            place = int(places[near if near < high else low])
            if list(self.prediction[place - n : place]) != end[-n:]:  # two n-grams with one key: use a shorter match
                break
            best = place, n
        return best


class _Pointer:
    """The position of the output in a prediction.

    at:   the predicted token the next output token should equal; -1 when the output is somewhere else.
    base: the last position where two tokens in a row agreed. Searches start there, so that one common token that matched by
          chance does not move the pointer away for good.
    run:  output tokens in a row that agreed. read: output tokens seen.
    """

    __slots__ = ("at", "base", "last", "places", "prediction", "read", "run")

    def __init__(self, places: Places) -> None:
        self.places, self.prediction = places, places.prediction
        self.at = self.base = self.run = self.read = 0
        self.last = -1

    def follows(self, view: SequenceView, prediction: tuple[int, ...]) -> bool:
        """Whether `view` may be the sequence whose output was read so far."""
        if prediction is not self.prediction and prediction != self.prediction:
            return False
        end = view.prompt + self.read
        return self.read == 0 or (end <= len(view.tokens) and view.tokens[end - 1] == self.last)

    def advance(self, tokens: list[int], prompt: int) -> None:
        """Read the new tokens after the prompt."""
        for n in range(prompt + self.read, len(tokens)):
            if 0 <= self.at < len(self.prediction) and self.prediction[self.at] == tokens[n]:
                self.at, self.run = self.at + 1, self.run + 1
            else:
                self.at, self.run = self.places.behind(tokens[max(prompt, n + 1 - MAX_N) : n + 1], self.base)
            if self.run > 1:
                self.base = self.at
        self.read, self.last = len(tokens) - prompt, tokens[-1]


class PredictedOutput:
    """Drafts from the request's `params.prediction` (token ids), following the output through it.

    While output and prediction agree, the draft is the next tokens of the prediction. When they differ, the longest n-gram
    (4 down to 1 tokens) at the output's end is looked up in the prediction, nearest after the last confirmed position.
    Without a prediction or a match there is no draft. depth: most tokens a draft has, >= 1. Every node is a point mass.
    """

    name = "prediction"
    layers: tuple[int, ...] = ()
    trees = False

    def __init__(self, depth: int) -> None:
        if depth < 1:
            raise ConfigError(f"the prediction drafter needs a length >= 1, got {depth}; use 'none' to draft nothing")
        self.max_depth = self.max_nodes = depth
        self._pointer: dict[int, _Pointer] = {}

    def bind(self, slots: int, length: int) -> None:
        """Nothing to allocate."""

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """One chain per sequence. With budget 0 nothing is read; the next positive budget reads all new tokens."""
        found = [
            self._continue(v, min(b, self.max_depth)) if b > 0 else ()
            for v, b in zip(evidence.sequences, budget, strict=True)
        ]
        return chains(found, evidence.scores.logits.device)

    def _continue(self, view: SequenceView, depth: int) -> Sequence[int]:
        prediction = view.params.prediction
        if not prediction:
            return ()
        pointer = self._pointer.get(view.slot)
        if pointer is None or not pointer.follows(view, prediction):
            pointer = self._pointer[view.slot] = _Pointer(self.places_of(prediction))
        pointer.advance(view.tokens, view.prompt)
        return prediction[pointer.at : pointer.at + depth] if pointer.at >= 0 else ()

    def places_of(self, prediction: tuple[int, ...]) -> Places:
        """The places of a prediction: those of another sample of the same request, or new ones."""
        others = (p.places for p in self._pointer.values() if p.prediction is prediction)
        return next(others, None) or Places(prediction)

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        for slot in slots:
            self._pointer.pop(slot, None)


class Replay:
    """How many tokens of an output were accepted drafts of a prediction, kept up to date as the output grows.

    steps: for each step of the output its tokens and how many of them were accepted drafts; the list may grow. read: how many
    steps were read. The pointer is replayed: in a step where it had something to say it was first to speak (`first_of`), so what
    was accepted then was its own.
    """

    def __init__(self, places: Places, steps: Sequence[tuple[Sequence[int], int]]) -> None:
        self.places, self.steps = places, steps
        self._pointer, self._output = _Pointer(places), list[int]()
        self.read = self._total = 0

    def accepted(self) -> int:
        """The number, after all steps so far. O(tokens that are new)."""
        for tokens, accepted in islice(self.steps, self.read, None):
            if self.read:
                self._pointer.advance(self._output, 0)
            if self.read and 0 <= self._pointer.at < len(self.places.prediction):
                self._total += accepted
            self._output += tokens
            self.read += 1
        return self._total


def accepted_of(prediction: tuple[int, ...], steps: Sequence[tuple[Sequence[int], int]]) -> int:
    """How many tokens of an output were accepted drafts of this `prediction`; see `Replay`."""
    return Replay(Places(prediction), steps).accepted()
