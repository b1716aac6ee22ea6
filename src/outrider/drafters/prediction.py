"""The user's own prediction as a draft: an edited file mostly repeats the file."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

from outrider.drafters._forest import chains
from outrider.errors import ConfigError
from outrider.types import Draft, Evidence, SequenceView

MAX_N = 4
"""Longest n-gram looked for when the output has left the prediction."""


@runtime_checkable
class _Params(Protocol):
    """What this drafter reads of a request's sampling parameters."""

    @property
    def prediction(self) -> tuple[int, ...]: ...


class _Pointer:
    """Where in a prediction the output stands.

    at:   the predicted token the next output token should equal; -1 when the output is somewhere else.
    base: the last place that two tokens in a row agreed on. Searches start there, so that a single common token that
          matched by chance does not carry the pointer away for good.
    run:  output tokens in a row that agreed. read: output tokens seen.
    """

    __slots__ = ("at", "base", "behind", "last", "prediction", "read", "run")

    def __init__(self, prediction: tuple[int, ...]) -> None:
        self.prediction = prediction
        self.at = self.base = self.run = self.read = 0
        self.last = -1
        self.behind: defaultdict[int, list[int]] = defaultdict(list)  # token -> the places behind it, ascending
        for place, token in enumerate(prediction, start=1):
            self.behind[token].append(place)

    def follows(self, view: SequenceView, prediction: tuple[int, ...]) -> bool:
        """Whether `view` may be the sequence whose output was read so far."""
        if prediction is not self.prediction and prediction != self.prediction:
            return False
        end = view.prompt + self.read
        return self.read == 0 or (end <= len(view.tokens) and view.tokens[end - 1] == self.last)

    def advance(self, tokens: list[int], prompt: int) -> None:
        """Read the tokens behind the prompt that are new."""
        for n in range(prompt + self.read, len(tokens)):
            if 0 <= self.at < len(self.prediction) and self.prediction[self.at] == tokens[n]:
                self.at, self.run = self.at + 1, self.run + 1
            else:
                self.at, self.run = self._realign(tokens[max(prompt, n + 1 - MAX_N) : n + 1])
            if self.run > 1:
                self.base = self.at
        self.read, self.last = len(tokens) - prompt, tokens[-1]

    def _realign(self, end: list[int]) -> tuple[int, int]:
        """The place behind the longest n-gram at the output's `end`, nearest after `base` (or the first), and its n."""
        places = self.behind.get(end[-1])
        if places is None:
            return -1, 0
        n = 1
        while n < len(end) and (longer := [p for p in places if p > n and self.prediction[p - n - 1] == end[-n - 1]]):
            places, n = longer, n + 1
        i = bisect_left(places, self.base)
        return places[i if i < len(places) else 0], n


class Prediction:
    """Drafts from the request's own `params.prediction` (token ids), following the output through it.

    While output and prediction agree the draft is what comes next in the prediction. When they part, the longest n-gram
    (4 down to 1 tokens) of the output's end is looked for in the prediction, nearest after the last sure place.
    No prediction, no match: no draft. depth: most tokens a draft has, >= 1. Every node is a point mass.
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
        """Nothing to make room for."""

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """One chain per sequence. A budget of 0 reads nothing; the next larger one reads all that is new."""
        found = [
            self._continue(v, min(b, self.max_depth)) if b > 0 else ()
            for v, b in zip(evidence.sequences, budget, strict=True)
        ]
        return chains(found, evidence.scores.logits.device)

    def _continue(self, view: SequenceView, depth: int) -> Sequence[int]:
        prediction = cast(_Params, view.params).prediction
        if not prediction:
            return ()
        pointer = self._pointer.get(view.slot)
        if pointer is None or not pointer.follows(view, prediction):
            pointer = self._pointer[view.slot] = _Pointer(prediction)
        pointer.advance(view.tokens, view.prompt)
        return prediction[pointer.at : pointer.at + depth] if pointer.at >= 0 else ()

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        for slot in slots:
            self._pointer.pop(slot, None)


def accepted_of(prediction: tuple[int, ...], steps: Sequence[tuple[Sequence[int], int]]) -> int:
    """How many tokens of an output were accepted drafts of this `prediction`.

    steps: for each step of the output its tokens and how many of them were accepted drafts. The pointer is replayed: in a
    step where it had something to say it was first to speak (`first_of`), so what was accepted then was its own.
    """
    pointer, output, total = _Pointer(prediction), list[int](), 0
    for n, (tokens, accepted) in enumerate(steps):
        if n:
            pointer.advance(output, 0)
        if n and 0 <= pointer.at < len(prediction):
            total += accepted
        output += tokens
    return total
