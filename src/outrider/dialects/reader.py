"""Reads a model's reply while it is written: its thinking, its text, and its calls.

The pieces of a reply do not depend on how its text is cut into feeds, except where they are cut; joined, they are always the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outrider.dialects.formats import Format
from outrider.dialects.pieces import Piece, joined, overlap
from outrider.dialects.values import Extent, python_calls, said

LOST = 4096
"""Characters after which a region of calls that has no call in it counts as text."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a model marks its thinking. opened: the prompt has opened it already."""

    open: str
    close: str
    opened: bool = False


class Reader:
    """The pieces of one reply.

    form: the notation of its calls, None: it can make none. thinking: None: it has none. schemas: the parameters of each tool by
    name, for notations that write arguments as raw text.
    """

    def __init__(
        self, form: Format | None, thinking: Thinking | None, schemas: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self._form, self._thinking, self._schemas = form, thinking, schemas or {}
        self._buffer, self._calls, self._extent, self._name = "", 0, Extent(), ""
        self._bare = False  # whether the region of calls began without its mark
        self._thought = self._thinks = False  # whether thinking is over, and whether some of it has been shown
        self._gap = ""  # white space that is shown only if text follows it
        self._state = "reasoning" if thinking and thinking.opened else "start" if thinking or form else "text"

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain now."""
        self._buffer += text
        return joined(self._run(False))

    def finish(self) -> list[Piece]:
        """The rest of the pieces: the text has ended."""
        out = self._run(True)
        if self._state in ("head", "body") and self._form is not None:
            if self._state == "head" or self._form.many:
                out += self._text(("" if self._bare else self._form.open) + self._buffer)
        elif self._state == "reasoning":
            out.append(Piece("reasoning", self._buffer))
        elif self._state in ("start", "text"):
            out += self._text(self._buffer)
        if self._gap and not self._calls:
            out.append(Piece("content", self._gap))
        self._buffer, self._state, self._gap = "", "text", ""
        return joined(out)

    def _run(self, last: bool) -> list[Piece]:
        out: list[Piece] = []
        while True:
            before = self._state, len(self._buffer)
            out += getattr(self, f"_in_{self._state}")(last)
            if (self._state, len(self._buffer)) == before:
                return out

    # ------------------------------------------------------------------ text and thinking
    def _in_start(self, last: bool) -> list[Piece]:
        """The very beginning, or the beginning behind the thinking: thinking or a bare call may begin here."""
        text = self._buffer.lstrip()
        if not text:
            return []
        if self._thinking is not None and not self._thought:
            mark = self._thinking.open
            if text.startswith(mark):
                self._buffer, self._state = text[len(mark) :], "reasoning"
                return []
            if not last and mark.startswith(text):
                return []
        if self._thought:
            self._buffer = text  # the empty lines behind the thinking belong to its marks
        if self._form is not None and self._form.bare and text.startswith("{"):
            self._buffer, self._state, self._bare = text, "head", True
            return []
        self._state = "text"
        return []

    def _in_reasoning(self, last: bool) -> list[Piece]:
        assert self._thinking is not None
        mark = self._thinking.close
        if not self._thinks:
            self._buffer = self._buffer.lstrip("\n")
        at = self._buffer.find(mark)
        if at >= 0:
            shown, self._buffer = self._buffer[:at].rstrip("\n"), self._buffer[at + len(mark) :]
            self._state, self._thought = "start", True
            return [Piece("reasoning", shown)]
        held = overlap(self._buffer, mark) if not last else 0
        keep = len(self._buffer) - held
        keep = len(self._buffer[:keep].rstrip("\n")) if not last else keep
        shown, self._buffer = self._buffer[:keep], self._buffer[keep:]
        self._thinks = self._thinks or bool(shown)
        return [Piece("reasoning", shown)] if shown else []

    def _in_text(self, last: bool) -> list[Piece]:
        form = self._form
        if form is None:
            shown, self._buffer = self._buffer, ""
            return self._text(shown)
        at = self._buffer.find(form.open)
        if at >= 0:
            before = self._text(self._buffer[:at])
            self._buffer, self._state, self._gap, self._bare = self._buffer[at + len(form.open) :], "head", "", False
            return before
        keep = len(self._buffer) - (0 if last else overlap(self._buffer, form.open))
        shown, self._buffer = self._buffer[:keep], self._buffer[keep:]
        return self._text(shown)

    def _text(self, text: str) -> list[Piece]:
        """Text of the reply. If there may be calls, white space at its end waits, since none is shown beside calls."""
        text = self._gap + text
        shown = text if self._form is None else text.rstrip()
        self._gap = text[len(shown) :]
        return [Piece("content", shown)] if shown else []

    # ------------------------------------------------------------------ calls
    def _in_head(self, last: bool) -> list[Piece]:
        form = self._form
        assert form is not None
        if form.many:
            self._state = "body"
            return []
        found = form.head.match(self._buffer)
        if found and (found.end() < len(self._buffer) or last):
            self._name = _unescaped(found["name"].strip())
            groups = found.groupdict()
            self._buffer, self._extent = self._buffer[found.end() :], Extent()
            self._state = "arguments" if form.until is None else "body"
            call = Piece("call", self._name, self._calls, (groups.get("id") or "").strip() or None)
            self._calls += 1
            return [call]
        end = self._buffer.find(form.close) if form.close else -1
        if end >= 0 or len(self._buffer) > LOST or (last and self._buffer):
            return self._no_call(end)
        return []

    def _no_call(self, end: int) -> list[Piece]:
        """A region in which no call begins: one in another order of its keys, or text."""
        assert self._form is not None
        size = len(self._buffer) if end < 0 else end
        inside, after = self._buffer[:size], self._buffer[size + (len(self._form.close) if end >= 0 else 0) :]
        self._buffer, self._state = after, "text"
        try:
            found = said(inside)
            name, arguments = found["name"], found.get("arguments", found.get("parameters", {}))
            if isinstance(name, str) and isinstance(arguments, dict):
                return self._whole_call(name, arguments)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        opened = "" if self._bare else self._form.open
        return self._text(opened + inside + (self._form.close if end >= 0 else ""))

    def _whole_call(self, name: str, arguments: dict[str, Any]) -> list[Piece]:
        number, self._calls = self._calls, self._calls + 1
        return [Piece("call", name, number), Piece("arguments", json.dumps(arguments, ensure_ascii=False), number)]

    def _in_arguments(self, last: bool) -> list[Piece]:
        size = self._extent.feed(self._buffer)
        shown, self._buffer = self._buffer[:size], self._buffer[size:]
        if self._extent.done:
            self._state = "after"
        return [Piece("arguments", shown, self._calls - 1)] if shown else []

    def _in_body(self, last: bool) -> list[Piece]:
        form = self._form
        assert form is not None and form.until is not None
        end = self._buffer.find(form.until)
        if end < 0 and not (last and form.many):
            return []
        raw = self._buffer if end < 0 else self._buffer[:end]
        after = "" if end < 0 else self._buffer[end + len(form.until) :]
        if form.many:
            return self._list(raw, after, end >= 0)
        try:
            arguments = form.body(raw, self._properties()) if form.body else {}
        except (ValueError, RecursionError):
            arguments = {}
        self._buffer, self._state = after, "after"
        return [Piece("arguments", json.dumps(arguments, ensure_ascii=False), self._calls - 1)]

    def _list(self, raw: str, after: str, ended: bool) -> list[Piece]:
        assert self._form is not None
        self._buffer, self._state = after, "text"
        try:
            return [piece for name, arguments in python_calls(raw) for piece in self._whole_call(name, arguments)]
        except ValueError:
            return self._text(self._form.open + raw + (self._form.close if ended else ""))

    def _properties(self) -> Mapping[str, Any]:
        found = self._schemas.get(self._name, {}).get("properties")
        return found if isinstance(found, dict) else {}

    def _in_after(self, last: bool) -> list[Piece]:
        form = self._form
        assert form is not None
        found = form.after.match(self._buffer)
        if found and (
            form.after.pattern == "" or found.end() < len(self._buffer) or last or _closed(form, found.group())
        ):
            self._buffer = self._buffer[found.end() :]
            self._state = "head" if found.groupdict().get("more") is not None else "text"
        elif last or len(self._buffer) > LOST:
            self._state = "text"
        return []


def _closed(form: Format, text: str) -> bool:
    return bool(form.close) and text.endswith(form.close)


def _unescaped(name: str) -> str:
    if "\\" not in name:
        return name
    try:
        return str(said(f'"{name}"'))
    except ValueError:
        return name
