"""The tokens that a grammar allows next, along the text and along every drafted path.

The automaton is llguidance's (https://github.com/guidance-ai/llguidance); this module keeps one per sequence in step with its
text, and walks it down a drafted path and back again for each row of a step. The mask is part of the request's distribution, so
drafts obey it too, and the distribution is the same with and without speculation: p restricted to the allowed tokens and
renormalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool
from torch import Tensor

from outrider.automata import Compiler

EXHAUSTED = (
    "the grammar needs more work than this server allows, and was abandoned in the middle of the text: make it simpler"
)
LOST = "the grammar allows only tokens to which the model gives no probability, in the middle of the text: change it"


@runtime_checkable
class Compiled(Protocol):
    """What an automaton needs of the grammars of its tokenizer, see `sampling.grammar.Grammars`."""

    vocab_size: int
    eos: tuple[int, ...]

    @property
    def compiler(self) -> Compiler:
        """The compiler of this tokenizer."""
        ...

    def shared(self, text: str) -> Any:
        """A matcher whose copies share a budget."""
        ...

    def expensive(self, text: str) -> bool:
        """Whether it takes too long to compile in the middle of a text."""
        ...

    def drop(self, text: str) -> None:
        """Compile it again at the next use."""
        ...

    def own(self, text: str) -> Any:
        """A matcher that shares nothing."""
        ...


class Automaton:
    """The position of one sequence in its grammar. A memo: it starts again if the text is not the one it has read.

    After the end of a text, which only `ignore_eos` passes, only end tokens are allowed.
    """

    def __init__(self, grammars: Compiled, text: str) -> None:
        self._grammars, self.text = grammars, text
        self._size, self._eos = grammars.vocab_size, grammars.eos
        self._dear = grammars.expensive(text)
        self._matcher, self._alone = grammars.shared(text), False
        self._tokens, self._prompt = list[int](), 0
        self.exhausted_on_draft = False
        self._start()

    def _start(self) -> None:
        self._seen: list[int] = []
        self._ended = self._strayed = False
        self._void: dict[tuple[int, ...], str] = {}

    @property
    def exhausted(self) -> bool:
        """Whether the grammar has used up its LIMITS in this text, or the text does not match it. Its allowed tokens are then
        unknown: only the end is left, and the engine must report it."""
        return self._matcher.is_error() or self._strayed

    def keep_up(self, tokens: list[int], prompt: int) -> None:
        """`follow` the output after the first `prompt` of `tokens`; O(new tokens) while the same list only grows at its end."""
        size = prompt + len(self._seen)
        same = tokens is self._tokens and prompt == self._prompt and len(tokens) >= size
        if same and (not self._seen or tokens[size - 1] == self._seen[-1]):
            self._advance(tokens[size:])
            return
        self._tokens, self._prompt = tokens, prompt
        self.follow(tokens[prompt:])

    def follow(self, output: Sequence[int]) -> None:
        """Consume the new tokens of `output`."""
        if list(output[: len(self._seen)]) != self._seen:
            if self._alone:
                self._matcher, self._alone = self._grammars.shared(self.text), False
            self._matcher.reset()
            self._start()
        self._advance(output[len(self._seen) :])

    def _advance(self, new: Sequence[int]) -> None:
        if not new:
            return
        _, self._ended, broken = self._walk(new)
        self._strayed = self._strayed or broken
        self._seen += [int(t) for t in new]
        self._void.clear()

    def _walk(self, path: Sequence[int]) -> tuple[int, bool, bool]:
        """Consume `path`; returns how many tokens the matcher took, whether it ended, and whether the grammar forbids it."""
        taken, ended = 0, self._ended
        for token in path:
            final = token in self._eos and (ended or self._matcher.is_accepting())
            if not final and (ended or not self._matcher.try_consume_tokens([int(token)])):
                return taken, ended, True
            ended, taken = ended or final, taken + (not final)
        return taken, ended, False

    def _renew(self) -> bool:
        """Other sequences with this grammar may have used up the budget: try once with a separate matcher. False if that fails."""
        if self._alone:
            return False
        self._restore()
        return not self.exhausted

    def _restore(self) -> None:
        """A separate matcher at the text's position. None for an expensive grammar: its text then ends here, with an error."""
        if self._dear:
            self._grammars.drop(self.text)
            return
        self._matcher, self._alone = self._grammars.own(self.text), True
        self._matcher.try_consume_tokens([t for t in self._seen if t not in self._eos])

    def forced(self) -> list[int]:
        """Tokens of the text that the grammar forces next, as the tokenizer would write it; none if there is a choice."""
        if self._ended or self._matcher.is_stopped():
            return []
        return [t for t in self._matcher.compute_ff_tokens() if t < self._size]

    def allowed(self, path: Sequence[int]) -> Bool[Tensor, "V"]:
        """Tokens that may follow the text and then `path`; all tokens after a path that violates the grammar, which no rule ever
        reaches; only the end if the grammar is exhausted. If that happens on the path only, nothing more should be drafted for
        this sequence (`exhausted_on_draft`), since the text itself may still be completed."""
        mask = self._mask(path)
        if self._matcher.is_error() and self._renew():
            mask = self._mask(path)
        if self._matcher.is_error() and path:
            self.exhausted_on_draft = True
            self._void[tuple(path)] = EXHAUSTED
            self._restore()
            mask = self._ends()
        return torch.from_numpy(self._ends() if self.exhausted else mask)

    def lose(self, path: Sequence[int]) -> None:
        """Record that the model gives no probability to any token that is allowed after `path`."""
        self._void[tuple(path)] = LOST

    def trouble(self, path: Sequence[int]) -> str:
        """Why the tokens of a step that accepted the drafted `path` are unusable, or an empty string."""
        if self.exhausted:
            return EXHAUSTED
        return next((self._void[p] for n in range(len(path) + 1) if (p := tuple(path[:n])) in self._void), "")

    def _ends(self) -> npt.NDArray[np.bool_]:
        mask = np.zeros(self._size, dtype=bool)
        mask[list(self._eos)] = True
        return mask

    def _mask(self, path: Sequence[int]) -> npt.NDArray[np.bool_]:
        """[V] bool: the allowed tokens while the budget lasts."""
        taken, ended, broken = self._walk(path)
        if broken:
            mask = np.ones(self._size, dtype=bool)
        elif ended:
            mask = self._ends()
        else:
            mask = self._matched(self._matcher)
        if taken:
            self._matcher.rollback(taken)
        return mask

    def _matched(self, matcher: Any) -> npt.NDArray[np.bool_]:
        """[V] bool: the tokens that a matcher allows next."""
        if matcher.is_stopped():
            return self._ends()
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        mask = np.zeros(self._size, dtype=bool)
        size = min(len(bits), self._size)
        mask[:size] = bits[:size].astype(bool)
        if mask[self._eos[0]]:
            mask[list(self._eos)] = True
        return mask
