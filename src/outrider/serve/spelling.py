"""The bytes of single tokens, for log-probabilities. A token may be a part of a character, or span several."""

from __future__ import annotations

import codecs
from typing import Any

from outrider.engine.text import UNKNOWN, special_tokens
from outrider.models.translate import byte_alphabet

ALPHABET = byte_alphabet()


class Spelling:
    """How the tokens of one tokenizer are spelled in the middle of a text. tokenizer: None spells every token as `token_id:N`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = {} if tokenizer is None else special_tokens(tokenizer)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; special ones are spelled by their names."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def text(self, token: int) -> str:
        """The token's characters; U+FFFD for bytes that are not characters on their own."""
        return self.bytes_of(token).decode("utf-8", "replace")

    def shown(self, token: int) -> str:
        """The text the token adds: nothing if it is special."""
        return "" if token in self.special else self.text(token)

    def escaped(self, token: int) -> str:
        """The token as OpenAI writes one that is not text on its own: `bytes:` and each byte as \\xNN."""
        return "bytes:" + "".join(f"\\x{b:02x}" for b in self.bytes_of(token))

    def keys(self, tokens: list[int], chosen: int) -> list[str]:
        """Different strings for different tokens: the chosen one as it is shown, the others as text if they are text alone."""
        taken, out = {self.shown(chosen): chosen}, []
        for token in tokens:
            key = self.shown(token) if token == chosen else self.text(token)
            if token != chosen and (UNKNOWN in key or taken.get(key, token) != token):
                key = self.escaped(token) if UNKNOWN in key else f"token_id:{token}"
            if taken.setdefault(key, token) != token:
                key = f"token_id:{token}"
            out.append(key)
        return out

    def _find(self, token: int) -> bytes:
        if self.tokenizer is None:
            return f"token_id:{token}".encode()
        if token in self.special:
            return self.special[token].encode()
        text = self._decode([token])
        if UNKNOWN in text:
            piece = self._piece(token)
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            if piece and all(c in ALPHABET for c in piece):
                return bytes(ALPHABET[c] for c in piece)
            return text.encode()
        twice = self._decode([token, token])  # at the beginning of a text some tokens lose their space
        return (twice[len(text) :] if twice.startswith(text) else text).encode()

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def _piece(self, token: int) -> str:
        """The token as spelled in the vocabulary."""
        core = getattr(self.tokenizer, "_core", None) or getattr(self.tokenizer, "backend_tokenizer", None)
        ask = getattr(core, "id_to_token", None) or getattr(self.tokenizer, "convert_ids_to_tokens", None)
        return ("" if ask is None else ask(token)) or ""


class Offsets:
    """Offsets of tokens in their text, in complete characters before them. Special tokens are not in the text."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling, self._characters = spelling, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int) -> int:
        """The offset of the next token."""
        at = self._characters
        if token not in self._spelling.special:
            self._characters += len(self._decoder.decode(self._spelling.bytes_of(token)))
        return at
