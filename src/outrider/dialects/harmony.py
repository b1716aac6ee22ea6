"""Reads gpt-oss's replies: messages of several channels, `<|channel|>analysis<|message|>...<|end|><|start|>assistant...`."""

from __future__ import annotations

import re

from outrider.dialects.pieces import Piece, joined

_MARK = re.compile(r"<\|(?:start|channel|message|end|call|return|constrain)\|>")
_LONGEST = len("<|constrain|>")
_TO = re.compile(r"to=(?:functions\.)?(?P<name>[A-Za-z0-9_.-]+)")


class HarmonyReader:
    """The pieces of one reply of gpt-oss: channel `analysis` is thinking, `final` is text, a message to a function is a call."""

    def __init__(self) -> None:
        self._buffer, self._head, self._calls = "", "", 0
        self._kind: str | None = None  # None: in a message's head

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain now."""
        self._buffer += text
        return joined(self._run(False))

    def finish(self) -> list[Piece]:
        """The rest of the pieces: the text has ended."""
        out = self._run(True)
        if self._kind is None and self._head.strip() and not self._calls and "<|" not in self._head:
            out.append(Piece("content", self._head))  # a model that writes no channels
        self._head = ""
        return joined(out)

    def _run(self, last: bool) -> list[Piece]:
        out: list[Piece] = []
        while found := _MARK.search(self._buffer):
            out += self._part(self._buffer[: found.start()])
            self._buffer = self._buffer[found.end() :]
            out += self._mark(found.group())
        at = -1 if last else self._buffer.rfind("<", max(0, len(self._buffer) - _LONGEST + 1))
        keep = len(self._buffer) if at < 0 else at
        out += self._part(self._buffer[:keep])
        self._buffer = self._buffer[keep:]
        return out

    def _part(self, text: str) -> list[Piece]:
        if self._kind is None:
            self._head += text
            return []
        call = self._calls - 1 if self._kind == "arguments" else -1
        return [Piece(self._kind, text, call)] if text else []  # type: ignore[arg-type]

    def _mark(self, mark: str) -> list[Piece]:
        if mark in ("<|end|>", "<|call|>", "<|return|>", "<|start|>"):
            self._kind, self._head = None, ""
        elif mark != "<|message|>":
            self._head += mark
        elif self._kind is None:
            to = _TO.search(self._head)
            if to is not None:
                self._kind, self._calls = "arguments", self._calls + 1
                return [Piece("call", to["name"], self._calls - 1)]
            self._kind = "reasoning" if "analysis" in self._head else "content"
        return []
