"""Structured output: the grammars of a tokenizer, compiled once; a sequence gets an automaton of its own (`sampling.automaton`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from time import thread_time
from typing import Any

from outrider.automata import STAGED, Compiler, core_of, unspelled
from outrider.errors import RequestError
from outrider.sampling.automaton import Automaton
from outrider.sampling.stages import StagedAutomaton

DEAR = 0.1
"""Grammars that take more seconds to compile are not compiled again for a single text: it would block all others for that time."""
KEPT = 64
"""Number of compiled grammars that are cached."""


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
