"""Grammars written as text, compiled to llguidance's automata (https://github.com/guidance-ai/llguidance), without torch.

`sampling.grammar` keeps the automata in step with texts. A server first compiles a client's grammar in a process that can be killed
(`serve.prep`), since no limit of the library holds for every schema.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from outrider.errors import CapabilityError, RequestError

KINDS = ("regex", "json")
LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""Limits of one grammar: some ten milliseconds to compile and a few for a step; and no text in errors. Some grammars are cheap to
compile and use up their limits in the middle of a text: see `sampling.grammar.Automaton.exhausted`. The library does not count the
cost of a schema's numbers (`multipleOf`)."""
BLANKS = {"whitespace_pattern": r"[ ]|\n[ ]{0,24}|\n\t{0,8}"}
"""White space between the parts of JSON: a space, or a line break and some indentation. Without a bound some models would write
only spaces until the last token. A schema may choose another pattern (`x-guidance`)."""
INSTALL = "structured output needs llguidance: pip install 'outrider[grammar]'"


def core_of(tokenizer: Any) -> str | None:
    """The text of a fast tokenizer's tokenizer.json; None for one that has none."""
    core = getattr(tokenizer, "_core", None) or getattr(tokenizer, "backend_tokenizer", None)
    return None if core is None else core.to_str()


def unspelled(core: str) -> str:
    """A tokenizer.json whose special tokens have names that no text can contain.

    A text that a grammar forces ("<pad>") is written with ordinary tokens, while the compiler, which uses the tokenizer, would
    force the special token and then refuse it.
    """
    data = json.loads(core)
    model = data["model"]
    special = {t["content"] for t in data.get("added_tokens") or () if t["special"]} - {model.get("unk_token")}
    hidden = {name: f"{name}{secrets.token_hex(12)}" for name in special}
    for token in data.get("added_tokens") or ():
        token["content"] = hidden.get(token["content"], token["content"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {hidden.get(name, name): i for name, i in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = [[hidden.get(row[0], row[0]), *row[1:]] for row in model["vocab"]]
    data["post_processor"] = None  # it names special tokens, and a forced text has neither a beginning nor an end
    return json.dumps(data)


class Compiler:
    """Compiles for one tokenizer.

    tokenizer: text of its tokenizer.json. eos: tokens that end a text. Raises CapabilityError if llguidance is missing.
    """

    def __init__(self, tokenizer: str, eos: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise CapabilityError(INSTALL) from None
        self._lib, self.eos = llguidance, tuple(eos)
        self._tokenizer = llguidance.LLTokenizer(tokenizer, eos_token=eos[0] if eos else None)
        self._limits = llguidance.LLParserLimits(**LIMITS)

    def make(self, text: str) -> Any:
        """A matcher for 'regex:...' or 'json:{schema}'. Raises RequestError with the reason, also for a grammar that costs more
        than LIMITS."""
        kind, colon, body = text.partition(":")
        matcher = self._lib.LLMatcher
        if not colon or kind not in KINDS:
            raise RequestError(f"a grammar is written 'regex:PATTERN' or 'json:SCHEMA', got {text[:60]!r}")
        if not self.eos:
            raise RequestError("a grammar needs an end-of-sequence token, and this target has none")
        try:
            grammar = (
                matcher.grammar_from_regex(body) if kind == "regex" else matcher.grammar_from_json_schema(body, BLANKS)
            )
        except Exception as error:  # the library raises ValueError, or its own errors for a schema it cannot read
            raise RequestError(f"the {kind} grammar cannot be read: {_first_line(error)}") from None
        made = matcher(self._tokenizer, grammar, limits=self._limits, log_level=0)
        if made.is_error():
            raise RequestError(f"the {kind} grammar cannot be used: {_first_line(made.get_error())}")
        return made


def _first_line(error: object) -> str:
    return " ".join(str(error).split())[:160]
