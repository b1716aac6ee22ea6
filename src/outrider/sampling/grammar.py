"""Structured output: which tokens a grammar allows next, along the text and along every drafted path.

The automaton is llguidance's (https://github.com/guidance-ai/llguidance); this module keeps one per sequence in step with its
text, and walks it down a drafted path and back again for each row of a step. The mask is part of the request's law, so drafts obey
it too, and the law under speculation is the law without: p restricted to the allowed tokens and renormalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from outrider.errors import CapabilityError, RequestError

KINDS = ("regex", "json")
INSTALL = "structured output needs llguidance: pip install 'outrider[grammar]'"


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
        try:
            import llguidance
        except ImportError:
            raise CapabilityError(INSTALL) from None
        self._lib, self.vocab_size, self.eos = llguidance, vocab_size, tuple(eos)
        self._tokenizer = llguidance.LLTokenizer(tokenizer, eos_token=eos[0] if eos else None)

    def compile(self, text: str) -> str:
        """What `start` takes, from 'regex:...' or 'json:{schema}'. Raises RequestError naming what is wrong."""
        kind, colon, body = text.partition(":")
        matcher = self._lib.LLMatcher
        if not colon or kind not in KINDS:
            raise RequestError(f"a grammar is written 'regex:PATTERN' or 'json:SCHEMA', got {text[:60]!r}")
        if not self.eos:
            raise RequestError("a grammar needs an end-of-sequence token, and this target has none")
        try:
            grammar = matcher.grammar_from_regex(body) if kind == "regex" else matcher.grammar_from_json_schema(body)
        except Exception as error:  # the library raises ValueError, or its own errors for a schema it cannot read
            raise RequestError(f"the {kind} grammar cannot be read: {_first_line(error)}") from None
        wrong = matcher.validate_grammar(grammar, self._tokenizer)
        if wrong:
            raise RequestError(f"the {kind} grammar cannot be used: {_first_line(wrong)}")
        return grammar

    def start(self, text: str) -> Automaton:
        return Automaton(self._lib.LLMatcher(self._tokenizer, self.compile(text)), self.vocab_size, self.eos, text)


def _first_line(error: object) -> str:
    return " ".join(str(error).split())[:160]


class Automaton:
    """Where one sequence stands in its grammar. A memo: `follow` starts again when the text is not the one it knows."""

    def __init__(self, matcher: Any, vocab_size: int, eos: tuple[int, ...], text: str) -> None:
        self._matcher, self._size, self._eos, self.text = matcher, vocab_size, eos, text
        self._seen: list[int] = []

    def follow(self, output: Sequence[int]) -> None:
        """Consume what `output` has more than last time."""
        if list(output[: len(self._seen)]) != self._seen:
            self._matcher.reset()
            self._seen = []
        new = [int(t) for t in output[len(self._seen) :]]
        self._matcher.try_consume_tokens(new)
        self._seen += new

    def allowed(self, path: Sequence[int]) -> Bool[Tensor, "V"]:
        """Tokens that may follow the text and then `path`; all of them behind a path that breaks the grammar, which no
        exact rule ever reaches."""
        taken = self._matcher.try_consume_tokens([int(t) for t in path]) if path else 0
        if taken < len(path):
            self._matcher.rollback(taken)
            return torch.ones(self._size, dtype=torch.bool)
        mask = np.zeros(self._size, dtype=bool)
        if self._matcher.is_stopped():
            mask[list(self._eos)] = True
        else:
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            size = min(len(bits), self._size)
            mask[:size] = bits[:size].astype(bool)
            if mask[self._eos[0]]:
                mask[list(self._eos)] = True
        if taken:
            self._matcher.rollback(taken)
        return torch.from_numpy(mask)
