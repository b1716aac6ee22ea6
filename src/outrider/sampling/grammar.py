"""Structured output: which tokens a grammar allows next, along the text and along every drafted path.

The automaton is llguidance's (https://github.com/guidance-ai/llguidance); this module keeps one per sequence in step with its
text, and walks it down a drafted path and back again for each row of a step. The mask is part of the request's law, so drafts obey
it too, and the law under speculation is the law without: p restricted to the allowed tokens and renormalised.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from outrider.automata import Compiler

KEPT = 64
"""Compiled grammars that are kept."""


def tokenizer_json(tokenizer: Any) -> str | None:
    """The contents of tokenizer.json of a fast tokenizer, or None for one that has none."""
    core = getattr(tokenizer, "_core", None) or getattr(tokenizer, "backend_tokenizer", None)
    return core.to_str() if core is not None else None


class Grammars:
    """Compiled grammars of one tokenizer.

    tokenizer: text of its tokenizer.json. vocab_size: columns of the logits. eos: tokens that end a text; allowed where the
    grammar may end. Raises CapabilityError if llguidance is missing.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos: Sequence[int]) -> None:
        self._compiler, self.vocab_size, self.eos = Compiler(tokenizer, eos), vocab_size, tuple(eos)
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = Lock()

    def compile(self, text: str) -> None:
        """Compile 'regex:...' or 'json:{schema}' and keep it. Raises RequestError naming what is wrong, a grammar that costs more
        than LIMITS among it. May be called from any thread, ahead of `start`, so that an engine need not wait for it.
        """
        self._matcher(text)

    def _matcher(self, text: str) -> Any:
        """The compiled grammar, never advanced; made at most KEPT grammars ago, or now."""
        with self._lock:
            if text in self._compiled:
                self._compiled.move_to_end(text)
                return self._compiled[text]
        made = self._compiler.make(text)
        with self._lock:
            self._compiled[text] = made
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return made

    def start(self, text: str) -> Automaton:
        """The automaton of a new sequence."""
        return Automaton(self, text)

    def shared(self, text: str) -> Any:
        """A matcher of the grammar that has not been advanced. Copies share what they learn of the grammar, and its budget."""
        return self._matcher(text).deep_copy()

    def own(self, text: str) -> Any:
        """A matcher that shares nothing. The kept one is dropped: whoever asks for an own one has found it spent."""
        with self._lock:
            self._compiled.pop(text, None)
        return self._compiler.make(text)


class Automaton:
    """Where one sequence stands in its grammar. A memo: `follow` starts again when the text is not the one it knows."""

    def __init__(self, grammars: Grammars, text: str) -> None:
        self._grammars, self.text = grammars, text
        self._size, self._eos = grammars.vocab_size, grammars.eos
        self._matcher, self._alone = grammars.shared(text), False
        self._seen: list[int] = []

    @property
    def exhausted(self) -> bool:
        """The grammar has spent what LIMITS allow, in this text or on a drafted path behind it. Nobody knows any more what it
        allows: only the end is left, and the text is no text of the grammar. Whoever decodes must say so."""
        return self._matcher.is_error()

    def follow(self, output: Sequence[int]) -> None:
        """Consume what `output` has more than last time."""
        if list(output[: len(self._seen)]) != self._seen:
            if self._alone:
                self._matcher, self._alone = self._grammars.shared(self.text), False
            self._matcher.reset()
            self._seen = []
        new = [int(t) for t in output[len(self._seen) :]]
        self._matcher.try_consume_tokens(new)
        self._seen += new

    def _renew(self) -> bool:
        """Others with this grammar may have spent the budget: try once with one of our own. False if that is not enough."""
        if self._alone:
            return False
        self._matcher, self._alone = self._grammars.own(self.text), True
        self._matcher.try_consume_tokens(self._seen)
        return not self.exhausted

    def forced(self) -> list[int]:
        """Tokens of the text that the grammar dictates next, as the tokenizer would write it; none where there is a choice."""
        if self._matcher.is_stopped():
            return []
        return [t for t in self._matcher.compute_ff_tokens() if t < self._size]

    def allowed(self, path: Sequence[int]) -> Bool[Tensor, "V"]:
        """Tokens that may follow the text and then `path`; all of them behind a path that breaks the grammar, which no
        exact rule ever reaches; the end alone once the grammar is exhausted."""
        mask = self._mask(path)
        if self.exhausted and self._renew():
            mask = self._mask(path)
        if self.exhausted:
            mask[:] = False
            mask[list(self._eos)] = True
        return torch.from_numpy(mask)

    def _mask(self, path: Sequence[int]) -> Any:
        """[V] bool: the same, while the budget lasts."""
        taken = self._matcher.try_consume_tokens([int(t) for t in path]) if path else 0
        mask = np.zeros(self._size, dtype=bool)
        if taken < len(path):
            mask[:] = True
        elif self._matcher.is_stopped():
            mask[list(self._eos)] = True
        else:
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            size = min(len(bits), self._size)
            mask[:size] = bits[:size].astype(bool)
            if mask[self._eos[0]]:
                mask[list(self._eos)] = True
        if taken:
            self._matcher.rollback(taken)
        return mask
