"""Detects tokenizer expressions that may take more than quadratic time, or write far more than they read, from their form.

A backtracking matcher takes exponential time where a repetition or a choice is itself repeated, and polynomial time in the text's
length where several repetitions precede something that must follow. What cannot be analysed (look behind, back references) counts
as risky. That errs on the safe side: texts of such a tokenizer are read in a separate process (`prep`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

READING, WRITING = ("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)
_TOKEN = re.compile(
    r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|\(\?[:=!>]|\(\?[a-z-]+:|\(\?<?|\(|\)|[*+?]|\{\d*,?\d*\}|\||.", re.DOTALL
)
GROWTH = 64
"""Most characters that one character may become, since a replacement by a longer text can follow another."""
FEW = 8
"""Up to this many repetitions count as bounded, and up to this many optional pieces in a row are allowed."""


def wild(core: str) -> tuple[bool, bool]:
    """Whether a tokenizer.json has risky expressions: in the parts that read text, and in those that write it."""
    document = json.loads(core)
    return tuple(  # type: ignore[return-value]
        any(map(risky, _patterns(document, parts))) or growth(document, parts) > GROWTH for parts in (READING, WRITING)
    )


def growth(document: dict[str, Any], parts: tuple[str, ...]) -> float:
    """Most characters that one character may become if all replacements apply one after another: the product of their sizes."""
    out = 1.0
    for held in _objects(document, parts):
        if held.get("type") == "Replace" and isinstance(held.get("content"), str):
            out *= max(1, len(held["content"]))
    return out


def _patterns(document: dict[str, Any], parts: tuple[str, ...]) -> Iterator[str]:
    """Every expression in these parts of a tokenizer."""
    return (held["Regex"] for held in _objects(document, parts) if isinstance(held.get("Regex"), str))


def _objects(document: dict[str, Any], parts: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Every object in these parts of a tokenizer."""
    stack: list[Any] = [document.get(part) for part in parts]
    while stack:
        held = stack.pop()
        if isinstance(held, dict):
            yield held
            stack += held.values()
        elif isinstance(held, list):
            stack += held


def risky(pattern: str) -> bool:
    """Whether an expression may take more than quadratic time, or cannot be analysed."""
    if re.search(r"\\[1-9gk]|\(\?<", pattern):
        return True
    try:
        node = _Reader(_TOKEN.findall(pattern)).choice()
    except RecursionError:
        return True
    return node.nested or node.degree > 1 or node.ways > FEW


@dataclass(slots=True)
class _Node:
    """repeats: most unbounded repetitions in a row. degree: those before something that must follow. ways: optional pieces and
    choices. nested: whether it has a repetition of such a piece or of a repetition. branches: alternatives."""

    repeats: int = 0
    degree: int = 0
    ways: int = 0
    nested: bool = False
    branches: int = 1


class _Reader:
    """Reads the pieces of an expression from the left."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._at = tokens, 0

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def choice(self) -> _Node:
        """Alternatives, to the end or to the closing bracket."""
        out = self._sequence()
        while self._next() == "|":
            self._at += 1
            more = self._sequence()
            out = _Node(
                max(out.repeats, more.repeats),
                max(out.degree, more.degree),
                max(out.ways, more.ways),
                out.nested or more.nested,
                out.branches + 1,
            )
        return out

    def _sequence(self) -> _Node:
        out = _Node()
        while self._next() not in ("", "|", ")"):
            part = self._atom()
            optional, times = self._quantifier()
            many, loose = times > FEW, part.repeats + part.ways + part.branches > 1
            out.nested = out.nested or part.nested or (times > 1 and loose)
            out.ways += part.ways + int(optional or part.branches > 1)
            out.degree = max(out.degree, part.degree + (0 if optional else out.repeats))
            out.repeats += max(part.repeats, int(many))
        return out

    def _atom(self) -> _Node:
        token = self._next()
        self._at += 1
        if not token.startswith("("):
            return _Node()
        inside = self.choice()
        self._at += 1
        return inside

    def _quantifier(self) -> tuple[bool, float]:
        """Whether the piece may be missing, and how often it may occur."""
        optional, times = False, 1.0
        while (token := self._next()) and (token in "*+?" or re.fullmatch(r"\{\d*,?\d*\}", token)):
            self._at += 1
            low, comma, high = token.strip("{}").partition(",")
            optional = optional or token in "*?" or (token[0] == "{" and low in ("", "0"))
            if token in "*+" or (comma and not high):
                times = float("inf")
            elif token[0] == "{":
                times *= float(high or low or 0)
        return optional, times
