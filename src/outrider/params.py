"""The sampling parameters of one request: a frozen, checked value."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, no_type_check

from outrider.errors import ConfigError, RequestError, unknown_name

_INT64 = 1 << 63
_FLOATS = {
    # field: (lowest, highest); temperature may also be 0
    "temperature": (1e-6, 100.0),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "tv_budget": (0.0, 1e9),
}
_INTS = {
    "top_k": (0, 2**31 - 1),
    "n": (1, 64),
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "seed": (-_INT64, _INT64 - 1),
    "logprobs": (0, 20),
    "draft_length": (0, 2**31 - 1),
}
_OPTIONAL = ("seed", "logprobs", "tv_budget", "draft_length")
_MAX_BIASES, _MAX_BIAS = 1024, 100.0
_MAX_STOPS, _MAX_STOP_CHARS = 16, 256
_MAX_STOP_IDS, _MAX_PREDICTION = 256, 65_536
_MAX_GRAMMAR = 1 << 18
_MAX_DRAFTERS = 64
_MAX_SALT = 4096


@no_type_check  # its own checks give the messages for users; a type checker in tests must not raise first
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one request. Every field is checked on construction; a bad one raises RequestError.

    temperature:        0 (the point mass at the most likely token) or 1e-6 .. 100; divides the logits.
    top_k:              keep the tokens whose logit is at least the k-th largest (ties with it stay); 0 = off.
    top_p:              keep the smallest set of most likely tokens whose mass is >= top_p; 1 = off; > 0.
    min_p:              keep tokens at least min_p times as likely as the most likely one; 0 = off; 0 .. 1.
    repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and output; 1 = off;
                        0.01 .. 100.
    presence_penalty:   subtracted from the logits of tokens of the output; -2 .. 2.
    frequency_penalty:  subtracted once per occurrence in the output; -2 .. 2.
    logit_bias:         token -> number of -100 .. 100 added to its logit; at most 1024; stored as sorted pairs.
    seed:               64-bit integer, or None: the engine chooses one.
    n:                  independent samples of this request, 1 .. 64.
    max_tokens:         most output tokens, >= 1. min_tokens: no end-of-sequence and no stop before; <= max_tokens.
    ignore_eos:         the end-of-sequence token does not end the output.
    stop:               at most 16 non-empty strings of <= 256 characters that end the output and are cut from it.
    stop_token_ids:     at most 256 tokens that end the output.
    logprobs:           None, or how many of the most likely tokens (0 .. 20) are reported beside the chosen one.
    grammar:            None, or what the output must be: "regex:PATTERN", "json:SCHEMA", "lark:RULES" (llguidance's Lark) or the
                        text of `automata.Stages`, at most 256 KiB; without min_tokens.
    allowed_token_ids:  the only tokens that may be sampled, at most 1024; empty = all.
    bad_words:          at most 256 token sequences, each at most 64 long, that the output may not contain.
    skip_special_tokens: the text leaves out special tokens. keep_special: at most 64 of them that it shows nevertheless.
    tv_budget:          most total variation a lossy rule may spend on each output, >= 0; None = the rule's limit. A lossless
                        rule spends nothing.
    prediction:         a predicted continuation (token ids) that drafters may propose; it never changes the distribution.
    draft_length:       most tokens drafted in a step of this request, >= 0; None = as the engine's controller decides. It never
                        changes the distribution; 0 is plain decoding.
    drafters:           numbers of the members of a combined drafter that may propose for this request, if the engine lets requests
                        choose (`selectable`); None = all of them.
    cache_salt:         None, or a text of at most 4096 characters: the request shares computed beginnings only with requests of the
                        same salt. It never changes the text.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    n: int = 1
    max_tokens: int = 128
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    tv_budget: float | None = None
    grammar: str | None = None
    prediction: tuple[int, ...] = ()
    draft_length: int | None = None
    drafters: tuple[int, ...] | None = None
    skip_special_tokens: bool = True
    keep_special: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for name, (low, high) in _FLOATS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                put(name, _real(name, value, low, high, zero=name == "temperature"))
        for name, (low, high) in _INTS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                put(name, _integer(name, value, low, high))
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens must be <= max_tokens ({self.max_tokens}), got {self.min_tokens}")
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {getattr(self, name)!r}")
        put("grammar", _grammar(self.grammar, self.min_tokens))
        put("logit_bias", _biases(self.logit_bias))
        put("stop", _strings(self.stop))
        put("stop_token_ids", _tokens("stop_token_ids", self.stop_token_ids, _MAX_STOP_IDS))
        put("prediction", _tokens("prediction", self.prediction, _MAX_PREDICTION))
        put("allowed_token_ids", _tokens("allowed_token_ids", self.allowed_token_ids, _MAX_BIASES))
        words = list(islice(_items("bad_words", self.bad_words), _MAX_STOP_IDS + 1))
        if len(words) > _MAX_STOP_IDS or not all(words):
            raise RequestError(f"bad_words must be at most {_MAX_STOP_IDS} sequences, none of them empty")
        put("bad_words", tuple(_tokens("bad_words", word, _MAX_DRAFTERS) for word in words))
        put("keep_special", _tokens("keep_special", self.keep_special, _MAX_DRAFTERS))
        if self.cache_salt is not None and not (isinstance(self.cache_salt, str) and len(self.cache_salt) <= _MAX_SALT):
            raise RequestError(f"cache_salt must be a text of at most {_MAX_SALT} characters")
        if self.drafters is not None:
            put("drafters", _tokens("drafters", self.drafters, _MAX_DRAFTERS))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> SamplingParams:
        """From a configuration or JSON object. ConfigError for an unknown key; RequestError for a bad value.

        `stop` may be one string; the keys of `logit_bias` may be strings of digits, as JSON needs.
        """
        known = [f.name for f in fields(SamplingParams)]
        for name in values:
            if name not in known:
                raise ConfigError(unknown_name("sampling parameter", str(name), known))
        return SamplingParams(**values)

    @property
    def greedy(self) -> bool:
        """Whether the distribution is a point mass."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether the logits depend on the tokens of the sequence."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def needs_history(self) -> bool:
        """Whether the distribution depends on more than the logits: on tokens (penalties, `bad_words`) or their number."""
        return self.min_tokens > 0 or self.penalised or bool(self.bad_words)

    @property
    def edits(self) -> bool:
        """Whether logits change before temperature (bias, penalties, `min_tokens`), which may change the most likely token."""
        return bool(self.logit_bias or self.allowed_token_ids) or self.needs_history or self.grammar is not None

    @property
    def filters(self) -> bool:
        """Whether tokens are cut from the distribution (min-p, top-k, top-p)."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def bias(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as sorted (token, bias) pairs."""
        return tuple(self.logit_bias.items()) if isinstance(self.logit_bias, Mapping) else self.logit_bias

    def check_vocab(self, vocab_size: int) -> None:
        """Raise RequestError if a token named by the request is not one of `vocab_size` tokens."""
        biased = tuple(token for token, _ in self.bias)
        for name, tokens in (
            ("logit_bias", biased),
            ("stop_token_ids", self.stop_token_ids),
            ("prediction", self.prediction),
            ("keep_special", self.keep_special),
            ("allowed_token_ids", self.allowed_token_ids),
            ("bad_words", tuple(token for word in self.bad_words for token in word)),
        ):
            wrong = max(tokens, default=0)
            if wrong >= vocab_size:
                raise RequestError(f"{name} names token {wrong}, but the model has tokens 0 to {vocab_size - 1}")


def _real(name: str, value: object, low: float, high: float, zero: bool) -> float:
    allowed = f"{'0 or ' if zero else ''}a number from {low:g} to {high:g}"
    if isinstance(value, bool | str):
        raise RequestError(f"{name} must be {allowed}, got {_short(value)}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"{name} must be {allowed}, got {_short(value)}") from None
    if not (low <= number <= high or (zero and number == 0.0)):  # NaN fails every comparison
        raise RequestError(f"{name} must be {allowed}, got {_short(value)}")
    return number + 0.0  # -0.0 becomes 0.0, so equal parameters are equal bits


def _integer(name: str, value: object, low: int, high: int) -> int:
    allowed = f"a whole number from {low} to {high}"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(f"{name} must be {allowed}, got {_short(value)}") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise RequestError(f"{name} must be {allowed}, got {_short(value)}")
    return number


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    pairs = list(value.items() if isinstance(value, Mapping) else _items("logit_bias", value))
    if len(pairs) > _MAX_BIASES:
        raise RequestError(f"logit_bias must have at most {_MAX_BIASES} entries, got {len(pairs)}")
    out: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise RequestError(f"logit_bias must map tokens to numbers, got the entry {_short(pair)}")
        token, bias = pair
        if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= 12:
            token = int(token)
        token = _integer("each token of logit_bias", token, 0, 2**31 - 1)
        if token in out:
            raise RequestError(f"logit_bias must name a token once, got token {token} twice")
        out[token] = _real(f"logit_bias of token {token}", bias, -_MAX_BIAS, _MAX_BIAS, zero=False)
    return tuple(sorted(out.items()))


def _grammar(value: object, min_tokens: int) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= _MAX_GRAMMAR:
        raise RequestError(f"grammar must be a text of 1 to {_MAX_GRAMMAR} characters, got {_short(value)}")
    if min_tokens:
        raise RequestError("grammar and min_tokens exclude each other: put the least length into the grammar")
    return value


def _strings(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else () if value is None else tuple(_items("stop", value))
    if len(strings) > _MAX_STOPS:
        raise RequestError(f"stop must have at most {_MAX_STOPS} strings, got {len(strings)}")
    for s in strings:
        if not isinstance(s, str) or not 1 <= len(s) <= _MAX_STOP_CHARS:
            raise RequestError(f"each stop must be a string of 1 to {_MAX_STOP_CHARS} characters, got {_short(s)}")
    return strings


def _tokens(name: str, value: object, most: int) -> tuple[int, ...]:
    tokens = () if value is None else tuple(islice(_items(name, value), most + 1))
    if len(tokens) > most:
        got = len(value) if isinstance(value, Sized) else f"more than {most}"
        raise RequestError(f"{name} must have at most {most} tokens, got {got}")
    if tokens and set(map(type, tokens)) == {int} and min(tokens) >= 0 and max(tokens) < 2**31:
        return tokens  # the usual case, at a hundredth of the time
    return tuple(_integer(f"each token of {name}", t, 0, 2**31 - 1) for t in tokens)


def _items(name: str, value: object) -> Iterable[Any]:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise RequestError(f"{name} must be a list, got {_short(value)}")
    return value
