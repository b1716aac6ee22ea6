"""Structured output: the tokens that a grammar allows next, along the text and along every drafted path.

The automaton is llguidance's (https://github.com/guidance-ai/llguidance); this module keeps one per sequence in step with its
text, and walks it down a drafted path and back again for each row of a step. The mask is part of the request's distribution, so
drafts obey it too, and the distribution is the same with and without speculation: p restricted to the allowed tokens and
renormalised.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from time import thread_time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool
from torch import Tensor

from outrider.automata import STAGED, Compiler, core_of, unspelled
from outrider.errors import RequestError

DEAR = 0.1
"""Grammars that take more seconds to compile are not compiled again for a single text: it would block all others for that time."""
KEPT = 64
"""Number of compiled grammars that are cached."""
EXHAUSTED = (
    "the grammar needs more work than this server allows, and was abandoned in the middle of the text: make it simpler"
)
LOST = "the grammar allows only tokens to which the model gives no probability, in the middle of the text: change it"


def tokenizer_json(tokenizer: Any) -> str | None:
    """The tokenizer.json of a fast tokenizer in the form that a compiler should read, or None if it has none."""
    core = core_of(tokenizer)
    return None if core is None else unspelled(core)


def grammars_of(tokenizer: Any, vocab_size: int, eos: Sequence[int]) -> Grammars:
    """The grammars of a tokenizer, or of None. Compiling a grammar raises RequestError if it is not a fast tokenizer."""

    def text() -> str:
        found = tokenizer_json(tokenizer)
        if found is None:
            raise RequestError("a grammar needs a fast tokenizer (tokenizer.json), and this engine has none")
        return found

    return Grammars(text, vocab_size, eos)


class Grammars:
    """Compiled grammars of one tokenizer.

    tokenizer: text of its tokenizer.json, or a function that returns it. vocab_size: columns of the logits.
    eos: tokens that end a text; allowed where the grammar may end. Compiling raises CapabilityError if llguidance is missing.
    """

    def __init__(self, tokenizer: str | Callable[[], str], vocab_size: int, eos: Sequence[int]) -> None:
        self.vocab_size, self.eos = vocab_size, tuple(eos)
        self._tokenizer = tokenizer
        self._made_compiler: Compiler | None = None
        self._compiled: OrderedDict[str, tuple[Any, float]] = OrderedDict()  # and the seconds of work that it took
        self._lock = Lock()

    @property
    def kept(self) -> tuple[str, ...]:
        """The compiled grammars, the last used last."""
        with self._lock:
            return tuple(self._compiled)

    def compile(self, text: str) -> None:
        """Compile 'regex:...' or 'json:{schema}' and cache it. Raises RequestError with the reason, also for a grammar that costs
        more than LIMITS. May be called from any thread, ahead of `start`, so that the engine does not wait for it.
        """
        self._matcher(text)

    def _matcher(self, text: str) -> Any:
        """The compiled grammar, never advanced, from the cache or compiled now."""
        return self._made(text)[0]

    def _compiler(self) -> Compiler:
        with self._lock:
            if self._made_compiler is None:
                text = self._tokenizer if isinstance(self._tokenizer, str) else self._tokenizer()
                self._made_compiler = Compiler(text, self.eos)
            return self._made_compiler

    def _made(self, text: str) -> tuple[Any, float]:
        with self._lock:
            if text in self._compiled:
                self._compiled.move_to_end(text)
                return self._compiled[text]
        compiler = self._compiler()
        start = thread_time()
        made = compiler.make(text)
        kept = made, thread_time() - start
        with self._lock:
            self._compiled[text] = kept
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return kept

    def start(self, text: str) -> Automaton:
        """The automaton of a new sequence."""
        if text.startswith(f"{STAGED}:"):
            from outrider.sampling.stages import StagedAutomaton  # which is an Automaton

            return StagedAutomaton(self, text)
        return Automaton(self, text)

    @property
    def compiler(self) -> Compiler:
        """The compiler of this tokenizer."""
        return self._compiler()

    def shared(self, text: str) -> Any:
        """A matcher of the grammar that has not been advanced. Copies share the compiler's caches, and the budget."""
        return self._matcher(text).deep_copy()

    def expensive(self, text: str) -> bool:
        """Whether it takes too long to compile this grammar in the middle of a text, where all sequences wait."""
        return self._made(text)[1] > DEAR

    def drop(self, text: str) -> None:
        """Drop the cached grammar, so that the next use compiles it again: its budget is used up."""
        with self._lock:
            self._compiled.pop(text, None)

    def own(self, text: str) -> Any:
        """A matcher that shares nothing. The cached one is dropped, since its budget was found used up."""
        self.drop(text)
        return self._compiler().make(text)


class Automaton:
    """The position of one sequence in its grammar. A memo: it starts again if the text is not the one it has read.

    After the end of a text, which only `ignore_eos` passes, only end tokens are allowed.
    """

    def __init__(self, grammars: Grammars, text: str) -> None:
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
