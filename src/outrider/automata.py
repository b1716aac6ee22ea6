"""Grammars written as text, compiled to llguidance's automata (https://github.com/guidance-ai/llguidance), without torch.

`sampling.automaton` keeps the automata in step with texts. A server first compiles a client's grammar in a process that can be
killed (`serve.prep`), since no limit of the library holds for every schema.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from outrider.errors import CapabilityError, RequestError
from outrider.schemas import without_other_formats

KINDS = ("regex", "json", "lark")
STAGED = "staged"
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
compile and use up their limits in the middle of a text: see `sampling.automaton.Automaton.exhausted`. The library does not count
the cost of a schema's numbers (`multipleOf`)."""
BLANKS = {"whitespace_pattern": r"[ ]|\n[ ]{0,24}|\n\t{0,8}"}
"""White space between the parts of JSON: a space, or a line break and some indentation. Without a bound some models would write
only spaces until the last token. A schema may choose another pattern (`x-guidance`)."""
HIDDEN = re.compile(rb"[0-9a-f]{24}$")
"""What `unspelled` adds to the names of special tokens."""
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
    special = {t["content"] for t in data.get("added_tokens") or () if _stands_alone(t)} - {model.get("unk_token")}
    hidden = {name: f"{name}{secrets.token_hex(12)}" for name in special}
    for token in data.get("added_tokens") or ():
        if token["content"] in hidden:
            token["content"], token["special"] = hidden[token["content"]], True
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {hidden.get(name, name): i for name, i in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = [[hidden.get(row[0], row[0]), *row[1:]] for row in model["vocab"]]
    data["post_processor"] = None  # it names special tokens, and a forced text has neither a beginning nor an end
    return json.dumps(data)


def _stands_alone(token: dict[str, Any]) -> bool:
    """Whether the compiler takes an added token for a special one, which no text of a grammar may contain."""
    name = token["content"]
    return bool(token["special"]) or (name.startswith("<") and name.endswith(">"))


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark in a text. token: its id if it is one token. start: it counts only at the beginning, and belongs to what it begins."""

    text: str
    token: int | None = None
    start: bool = False


@dataclass(frozen=True, slots=True)
class Stages:
    """A grammar that holds for parts of a text only: `Stages(...).text` is a `SamplingParams.grammar`.

    grammar: what holds, 'json:', 'regex:' or 'lark:'. trigger: the mark behind which it holds, to its end; then the text is free
    again. None: it holds for the whole text (behind the thinking). thinking: the marks of thinking, in which anything is allowed
    but the end of a text that must still come. opened: the prompt has opened the thinking. final: nothing follows its end.
    """

    grammar: str
    trigger: Mark | None = None
    thinking: tuple[Mark, Mark] | None = None
    opened: bool = False
    final: bool = False

    @property
    def text(self) -> str:
        """In the form of `SamplingParams.grammar`."""
        return f"{STAGED}:{json.dumps(asdict(self), ensure_ascii=False)}"

    @staticmethod
    def read(text: str) -> Stages:
        """From `text`. Raises RequestError for anything else."""
        try:
            found = json.loads(text.partition(":")[2])
            for name in ("trigger", "thinking"):
                marks = found.get(name)
                if marks is not None:
                    found[name] = Mark(**marks) if name == "trigger" else tuple(Mark(**m) for m in marks)
            return Stages(**found)
        except (ValueError, TypeError, AttributeError):
            raise RequestError("a staged grammar is made by the server, not by hand") from None


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
        """A matcher for 'regex:...', 'json:{schema}', 'lark:...' or the grammar of `Stages`. Raises RequestError with the reason,
        also for a grammar that costs more than LIMITS."""
        kind, colon, body = text.partition(":")
        if kind == STAGED:
            kind, colon, body = Stages.read(text).grammar.partition(":")
        matcher = self._lib.LLMatcher
        if not colon or kind not in KINDS:
            raise RequestError(
                f"a grammar is written 'lark:RULES', 'regex:PATTERN' or 'json:SCHEMA', got {text[:60]!r}"
            )
        if not self.eos:
            raise RequestError("a grammar needs an end-of-sequence token, and this target has none")
        try:
            grammar = self._read(kind, body)
        except Exception as error:  # the library raises ValueError, or its own errors for a schema it cannot read
            raise RequestError(f"the {kind} grammar cannot be read: {_first_line(error)}") from None
        made = matcher(self._tokenizer, grammar, limits=self._limits, log_level=0)
        if made.is_error():
            raise RequestError(f"the {kind} grammar cannot be used: {_first_line(made.get_error())}")
        return made

    def _read(self, kind: str, body: str) -> Any:
        matcher = self._lib.LLMatcher
        if kind == "lark":
            return matcher.grammar_from_lark(body)
        if kind == "regex":
            return matcher.grammar_from_regex(body)
        if '"format"' in body:
            body = json.dumps(without_other_formats(json.loads(body)))
        return matcher.grammar_from_json_schema(body, BLANKS)

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to the text; special tokens are spelled by their names."""
        spelled = self._tokenizer.decode_bytes([token])
        return HIDDEN.sub(b"", spelled) if self._tokenizer.is_special_token(token) else spelled

    def tokens_of(self, text: bytes) -> list[int]:
        """Tokens that spell a text."""
        return list(self._tokenizer.tokenize_bytes(text))

    @cached_property
    def line_breaks(self) -> tuple[int, ...]:
        """Tokens that are one or two line breaks."""
        return tuple(t for t in range(self._tokenizer.vocab_size) if self.bytes_of(t) in (b"\n", b"\n\n"))


def _first_line(error: object) -> str:
    return " ".join(str(error).split())[:160]
