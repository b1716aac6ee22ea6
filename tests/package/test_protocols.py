"""Protocols of ours can be asked of an object: whoever checks types at run time does so wherever one is a parameter."""

from __future__ import annotations

import ast
from pathlib import Path

import outrider

SOURCES = sorted(Path(outrider.__file__).parent.rglob("*.py"))


def unasked(text: str) -> list[str]:
    """Classes whose only base is `Protocol`, without `runtime_checkable`; those built on them inherit it."""
    classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    plain = [c for c in classes if [*map(ast.unparse, c.bases)] == ["Protocol"]]
    return [c.name for c in plain if "runtime_checkable" not in map(ast.unparse, c.decorator_list)]


def test_every_protocol_can_be_asked_of_an_object() -> None:
    assert {path.name: found for path in SOURCES if (found := unasked(path.read_text(encoding="utf-8")))} == {}


def test_one_that_cannot_is_found() -> None:
    assert unasked(
        "class A(Protocol): ...\n@runtime_checkable\nclass B(Protocol): ...\nclass C(B, Protocol): ...\n"
    ) == ["A"]
