"""The vocabulary of a GGUF file, checked: tokens, kinds, scores, merges, special tokens. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.config_keys import flag, whole
from outrider.errors import ConfigError
from outrider.models.gguf.parts import first_part
from outrider.models.gguf.reader import Header, Strings, read_header

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
TEMPLATE_BYTES = 1 << 20
PIECE = 1024
"""Most characters of a token of SentencePiece, of which every way to cut it in two is tried: far above any real one."""
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens."""
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_FLOATS, _WHOLES = (6,), (4, 5)
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
"""Name of a special token -> its part of the key."""
ENDS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<EOT>", "<|EOT|>",
    "<|return|>", "<｜end▁of▁sentence｜>",
})  # fmt: skip
"""Control tokens that end a turn in every model that has them."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens: by id. kinds: of each token. scores: of SentencePiece, else None. merges: of byte-level BPE, else None.

    special: name ("bos", "eos", ...) -> id. begins, ends: whether the begin and the end of text are added to one; None: not said.
    """

    path: Path
    model: str
    cut: str | None
    tokens: list[str]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: list[tuple[str, str]] | None
    special: dict[str, int]
    begins: bool | None
    ends: bool | None
    space_prefix: bool
    template: str | None

    def text_of(self, name: str) -> str | None:
        """The special token of that name, as it is written."""
        return self.tokens[self.special[name]] if name in self.special else None


def has_vocabulary(path: Path) -> bool:
    """Whether a file (the first of its set) holds a vocabulary."""
    return read_header(first_part(path)).values.get(PREFIX + "model") not in (None, "none", "no_vocab")


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a model's file. Raises ConfigError for one that is damaged, or of a kind that is not read."""
    header = read_header(first_part(path))
    values, path = header.values, header.path
    model = values.get(PREFIX + "model")
    if model not in ("llama", "gpt2"):
        raise ConfigError(
            f"{path} has a tokenizer of the kind {str(model)[:40]!r}, read are 'llama' and 'gpt2': put the model's "
            "tokenizer.json beside the file"
        )
    tokens = _tokens(header)
    kinds = _array(header, "token_type", _WHOLES, len(tokens)) or (NORMAL,) * len(tokens)
    scores = _array(header, "scores", _FLOATS, len(tokens))
    if model == "llama" and scores is None:
        raise _damaged(path, "its vocabulary has no scores")
    if any(not 0 <= kind <= BYTE for kind in kinds) or not all(map(math.isfinite, scores or ())):
        raise _damaged(path, "a token has a kind that does not exist, or a score that is no number")
    if model == "llama":
        _check_pieces(path, tokens, kinds)
    known = _special(values, path, model, len(tokens))
    template = values.get(TEMPLATE)
    if template is not None and not (isinstance(template, str) and len(template) <= TEMPLATE_BYTES):
        raise _damaged(path, f"its chat template is no text of up to {TEMPLATE_BYTES >> 20} MiB")
    said = lambda name: flag(values, PREFIX + name, path) if PREFIX + name in values else None  # noqa: E731
    cut = values.get(PREFIX + "pre")
    return Vocabulary(
        path, model, cut if isinstance(cut, str) else None, tokens, kinds, scores, _merges(header, model, tokens), known,
        said("add_bos_token"), said("add_eos_token"), said("add_space_prefix") is not False, template,
    )  # fmt: skip


def stops(path: Path) -> tuple[int, ...]:
    """Tokens that end a text: those that the file names, and control tokens that end a turn in every model."""
    header = read_header(first_part(path))
    if not has_vocabulary(path):
        return ()
    tokens = _tokens(header)
    kinds = _array(header, "token_type", _WHOLES, len(tokens)) or ()
    special = _special(header.values, header.path, str(header.values.get(PREFIX + "model")), len(tokens))
    found = [special[name] for name in ("eos", "eot", "eom") if name in special]
    named = [i for i, kind in enumerate(kinds) if kind == CONTROL and tokens[i] in ENDS]
    return tuple(dict.fromkeys([*found, *named]))


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path} is damaged ({what}): download the file again")


def _tokens(header: Header) -> list[str]:
    """The tokens, each once; llama.cpp gives empty ones names of their own, and so do we."""
    stored = header.values.get(PREFIX + "tokens")
    if not isinstance(stored, Strings) or not len(stored):
        raise _damaged(header.path, "it has no list of tokens")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(stored.decoded(PREFIX + "tokens", header.path))]
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise _damaged(header.path, f"the token {twice[:40]!r} occurs twice")
    return tokens


def _array(header: Header, name: str, types: tuple[int, ...], count: int) -> tuple[Any, ...] | None:
    """An array with an element for each token, of one of these types."""
    found = header.values.get(PREFIX + name)
    if found is None:
        return None
    if not isinstance(found, tuple) or header.element_types.get(PREFIX + name) not in types or len(found) != count:
        raise _damaged(header.path, f"{PREFIX}{name} is no list of a number for each of the {count} tokens")
    return found


def _check_pieces(path: Path, tokens: list[str], kinds: tuple[int, ...]) -> None:
    longest = max(map(len, tokens))
    if longest > PIECE:
        raise _damaged(path, f"a token has {longest} characters, where at most {PIECE} are possible")
    spelled = [token for token, kind in zip(tokens, kinds, strict=True) if kind == BYTE]
    if not all(_BYTE.fullmatch(token) for token in spelled):
        wrong = next(token for token in spelled if not _BYTE.fullmatch(token))
        raise _damaged(path, f"the byte token {wrong[:40]!r} is not written <0xNN>")


def _special(values: Mapping[str, Any], path: Path, model: str, count: int) -> dict[str, int]:
    """The special tokens that the file names, and the defaults of SentencePiece."""
    standard = {"bos": 1, "eos": 2, "unk": 0} if model == "llama" else {}
    out = {}
    for name, part in SPECIAL.items():
        key = f"{PREFIX}{part}_token_id"
        if values.get(key, 0) in (-1, (1 << 32) - 1):  # how converters say that there is none
            continue
        if key in values:
            out[name] = whole(values, key, path, least=0, most=count - 1)
        elif name in standard:
            if standard[name] >= count:
                raise _damaged(path, f"its vocabulary of {count} tokens has no token {standard[name]} for {name}")
            out[name] = standard[name]
    return out


def _merges(header: Header, model: str, tokens: list[str]) -> list[tuple[str, str]] | None:
    if model != "gpt2":
        return None
    stored = header.values.get(PREFIX + "merges")
    if not isinstance(stored, Strings):
        raise _damaged(header.path, "its vocabulary has no merges")
    known, out = set(tokens), []
    for merge in stored.decoded(PREFIX + "merges", header.path):
        at = merge.find(" ", 1)
        first, second = merge[:at], merge[at + 1 :]
        if at < 0 or first not in known or second not in known or first + second not in known:
            raise _damaged(header.path, f"the merge {merge[:40]!r} is not of two tokens to a third")
        out.append((first, second))
    return out
