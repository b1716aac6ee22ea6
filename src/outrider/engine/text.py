"""Streams tokens as text: never half a character, never the start of a stop string that may still complete.

A tokenizer decodes a whole token list, and the text of a token may depend on the tokens to its left (a leading space is
dropped, bytes of one character are joined). So every push decodes a window of the latest tokens again, and the part of the
text not shown before is new: the windowed decode of TGI and vLLM (`prefix_offset`, `read_offset`), here with a window that
moves every few tokens, so a push costs one short decode and a stream takes linear time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_MAX_MISSING_BYTES = 3  # a started UTF-8 character lacks at most 3 bytes, and shows as at most 3 broken characters
STRIDE = 4  # tokens by which the window moves; it holds at most twice as many
PATIENCE = 16  # tokens for which a run of broken characters may still become whole


@runtime_checkable
class Decoder(Protocol):
    """The part of a tokenizer that a stream needs: `tokenizers.Tokenizer` and Hugging Face's tokenizers both have it."""

    def decode(self, ids: list[int], /, skip_special_tokens: bool = True) -> str: ...


def special_tokens(tokenizer: object) -> dict[int, str]:
    """The special tokens of a tokenizer, which decoded text leaves out, with their spelling."""
    core = getattr(tokenizer, "_core", None) or getattr(tokenizer, "backend_tokenizer", None) or tokenizer
    ask = getattr(core, "get_added_tokens_decoder", None)
    added = ask() if ask is not None else getattr(tokenizer, "added_tokens_decoder", {})
    return {int(i): str(t.content) for i, t in added.items() if t.special and t.content}


class StopMatcher:
    """Watches text for stop strings, character by character (Knuth, Morris, Pratt 1977): O(1) amortised per string."""

    def __init__(self, stop: str | Sequence[str]) -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self._borders = tuple(_borders(s) for s in self._stop)
        self._matched = [0] * len(self._stop)  # characters of each stop string that the text ends with

    @property
    def held(self) -> int:
        """Characters at the end of the text that may be the start of a stop string."""
        return max(self._matched, default=0)

    def save(self) -> list[int]:
        return list(self._matched)

    def restore(self, matched: list[int]) -> None:
        self._matched = list(matched)

    def feed(self, char: str) -> str | None:
        """The stop string that ends with `char`: the longest if several do."""
        complete: str | None = None
        for i, (stop, border) in enumerate(zip(self._stop, self._borders, strict=True)):
            n = self._matched[i]
            while n and stop[n] != char:
                n = border[n]
            n += stop[n] == char
            if n == len(stop):
                n = border[n]
                if complete is None or len(stop) > len(complete):
                    complete = stop
            self._matched[i] = n
        return complete


def _borders(s: str) -> list[int]:
    """For each n, the longest proper prefix of s[:n] that is also its suffix."""
    out = [0, 0]
    n = 0
    for char in s[1:]:
        while n and s[n] != char:
            n = out[n]
        n += s[n] == char
        out.append(n)
    return out


class TextStream:
    """The text of one output. All pieces that `push` and `finish` return, joined, are the decoded output up to its stop.

    The text stops at the stop string that completes first, regardless of token borders; the stop string is not part of the text. Of
    several that complete with the same character the longest counts. A stop string may contain special tokens, although the text
    leaves them out: they are matched at their positions.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stop: str | Sequence[str] = (),
        *,
        context: Sequence[int] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        special: Mapping[int, str] | None = None,
        shown: Sequence[int] = (),
    ) -> None:
        """stop: non-empty strings that end the text. context: the last tokens of the prompt (8 or so are plenty), for
        tokenizers whose first word has no space. min_tokens: a stop string completed by these first tokens is only text.
        special: tokens that the text leaves out, and how stop strings spell them (`special_tokens`). shown: those of them that it
        shows nevertheless.
        """
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._left_out = frozenset(special or ()) - set(shown) if shown and skip_special_tokens else None
        self._ids = list(context)
        for first in range(1, _MAX_MISSING_BYTES + 1):  # the context may have been cut inside a character
            if self._ids and self._decode(0).startswith(UNKNOWN):
                self._ids = list(context[first:])
        self._start = len(self._ids)
        self._min_tokens = min_tokens
        self._matcher = StopMatcher(stop) if stop else None
        spelled = {t: s for t, s in special.items() if t not in shown} if special and skip_special_tokens else {}
        named = [s for s in stop if any(name in s or s in name for name in spelled.values())]
        self._special = spelled if named else {}
        self._full = StopMatcher(named) if named else None  # reads the text with its special tokens
        self._hidden: list[
            int
        ] = []  # for each held character of special tokens, the number of buffer characters before it
        self._window = 0  # first token of the window
        self._border = self._start  # a later token where characters begin: the next window starts there
        # Characters of the window's text already taken; a character the prompt only began belongs to the output.
        self._shown = len(self._decode(0).rstrip(UNKNOWN)) if self._ids else 0
        self._waiting = 0  # pushes since the text last ended with a whole character
        self._buffer = ""  # characters taken but held back: they may be the start of a stop string
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has completed: no more text follows."""
        return self.stop_string is not None

    @property
    def tokens(self) -> int:
        """Tokens pushed; after a stop, those up to the one that completed the stop string."""
        return len(self._ids) - self._start

    def push(self, token: int) -> str:
        """Append a token and return the text that is final now. Empty after a stop."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._take()
        return text + self._pass(self._special[token]) if token in self._special and not self.stopped else text

    def extend(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Append the tokens of one step; returns the text that is final now, and how many of the tokens were used.

        Equivalent to pushing them one by one until a stop, with one decode unless there is a stop.
        """
        if self.stopped or not tokens:
            return "", 0
        if any(token in self._special for token in tokens):
            return self._one_by_one(tokens)
        before = (self._window, self._border, self._shown, self._waiting, self._buffer)
        size, matched = len(self._ids), self._matcher.save() if self._matcher else []
        full, hidden = self._full.save() if self._full else [], list(self._hidden)
        self._ids += tokens
        text = self._take()
        if self._waiting == 0 and not self.stopped:
            return text, len(tokens)
        # To find the token that completed the stop string, or began the broken character, restore the state and push singly.
        del self._ids[size:]
        self._window, self._border, self._shown, self._waiting, self._buffer = before
        self.stop_string = None
        self._hidden = hidden
        if self._matcher:
            self._matcher.restore(matched)
        if self._full:
            self._full.restore(full)
        return self._one_by_one(tokens)

    def _one_by_one(self, tokens: Sequence[int]) -> tuple[str, int]:
        size, pieces = len(self._ids), list[str]()
        for token in tokens:
            pieces.append(self.push(token))
            if self.stopped:
                break
        return "".join(pieces), len(self._ids) - size

    def finish(self) -> str:
        """The output has ended: return the text held back so far, including broken characters."""
        if self.stopped:
            return ""
        text = self._decode(self._window)
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        shown = self._scan(new)
        rest, self._buffer, self._hidden = self._buffer, "", []
        return shown + rest

    def _take(self) -> str:
        """Decode the window and return what is new and final."""
        text = self._decode(self._window)
        broken = len(text) - len(text.rstrip(UNKNOWN))
        self._waiting = self._waiting + 1 if broken else 0
        # Decoders of byte tokens show a whole run of them as broken, including characters shown before, until its last
        # character is complete. A run that does not complete within PATIENCE tokens is truly broken, except its last bytes.
        certain = len(text) - (broken if self._waiting <= PATIENCE else min(broken, _MAX_MISSING_BYTES))
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        self._move_window()
        return self._scan(new)

    def _decode(self, first: int) -> str:
        if self._left_out is not None:
            ids = [t for t in self._ids[first:] if t not in self._left_out]
            return self._tokenizer.decode(ids, skip_special_tokens=False)
        return self._tokenizer.decode(self._ids[first:], skip_special_tokens=self._skip_special)

    def _move_window(self) -> None:
        """Start the window at the last border, if that leaves text to the left of future tokens."""
        if len(self._ids) - self._border < (2 * PATIENCE if self._waiting else STRIDE):
            return
        text = self._decode(self._border)
        if text:
            held = min(_MAX_MISSING_BYTES, len(text) - len(text.rstrip(UNKNOWN)))
            self._window, self._border, self._shown = self._border, len(self._ids), len(text) - held

    def _scan(self, new: str) -> str:
        """Match new characters against the stop strings; return those that cannot be part of one."""
        if self._matcher is None:
            return new
        text = self._buffer + new
        for i, char in enumerate(new, start=len(self._buffer) + 1):
            stop, full = self._matcher.feed(char), self._full.feed(char) if self._full else None
            if not self._early and (stop is not None or full is not None):
                at = min(i - len(stop) if stop else i, self._begin(i, len(full))[0] if full else i)
                return self._stop_at(text[:at], max(stop or "", full or "", key=len))
        return self._release(text)

    @property
    def _early(self) -> bool:
        return self.tokens <= self._min_tokens

    def _pass(self, name: str) -> str:
        """Match a special token, spelled `name`, which the text leaves out; returns the text that is final now."""
        assert self._full is not None
        size = len(self._buffer)
        for char in name:
            stop = self._full.feed(char)
            self._hidden.append(size)
            if stop is not None and not self._early:
                return self._stop_at(self._buffer[: self._begin(size, len(stop))[0]], stop)
        return self._release(self._buffer)

    def _begin(self, end: int, length: int) -> tuple[int, int]:
        """Where the last `length` characters before `end` begin, counting those of special tokens: the number of buffer characters
        before that point, and of hidden ones."""
        hidden = len(self._hidden)
        while length and (end or hidden):
            if hidden and self._hidden[hidden - 1] >= end:
                hidden -= 1
            else:
                end -= 1
            length -= 1
        return end, hidden

    def _stop_at(self, text: str, stop: str) -> str:
        self.stop_string, self._buffer, self._hidden = stop, "", []
        return text

    def _release(self, text: str) -> str:
        """Hold back what may still become a stop string; return the rest."""
        assert self._matcher is not None
        keep = len(text) - self._matcher.held
        if self._full:
            begin, hidden = self._begin(len(text), self._full.held)
            keep = min(keep, begin)
            self._hidden = [at - keep for at in self._hidden[hidden:]]
        self._buffer = text[keep:]
        return text[:keep]
