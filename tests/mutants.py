"""Mistakes planted in the code for the length of a test: by value (`Around` a function) or in its syntax tree (`Edit`).

Both name a function, never a line: formatting, comments and the names of local variables are free. A function that is gone,
or a piece of code that stands in it no more, or twice, is an AssertionError: a mutant cannot be lost in silence.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

IGNORED = ("ctx", "kind", "type_comment")
"""Fields of a syntax tree that say nothing about what is written."""


@dataclass(frozen=True)
class Place:
    """A function: its module, and its name there (`History.follow` for a method)."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def owner(self) -> Any:
        """The module or class that the function stands in."""
        found: Any = importlib.import_module(self.module)
        for part in self.name.split(".")[:-1]:
            found = getattr(found, part, None)
        if found is None or self.name.split(".")[-1] not in vars(found):
            raise AssertionError(f"there is no {self} any more: update the table of mutants")
        return found

    def function(self) -> FunctionType:
        """The function itself, out of its property, staticmethod or decorators."""
        found: Any = vars(self.owner())[self.name.split(".")[-1]]
        if isinstance(found, property | functools.cached_property):
            found = found.fget if isinstance(found, property) else found.func
        found = inspect.unwrap(found.__func__ if isinstance(found, staticmethod | classmethod) else found)
        if not isinstance(found, FunctionType):
            raise AssertionError(f"{self} is no function: update the table of mutants")
        return found


@dataclass(frozen=True)
class Around:
    """A mistake by value: `wrong(right, *arguments)` is called in the place of a function or method, whoever imported it."""

    place: Place
    wrong: Callable[..., Any]

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        owner, last = self.place.owner(), self.place.name.split(".")[-1]
        self.place.function()
        right = getattr(owner, last)
        wrong = functools.wraps(right)(functools.partial(self.wrong, right))
        if isinstance(owner, type):  # a partial is no method: a function hands `self` over
            static = isinstance(vars(owner)[last], staticmethod)
            method = lambda *arguments, **named: wrong(*arguments, **named)  # noqa: E731
            monkeypatch.setattr(owner, last, staticmethod(method) if static else method)
            return
        for module in [m for name, m in sys.modules.items() if name.split(".")[0] == self.place.module.split(".")[0]]:
            for alias in [a for a, value in vars(module).items() if value is right]:
                monkeypatch.setattr(module, alias, wrong)


@dataclass(frozen=True)
class Edit:
    """A mistake in the syntax tree: in one function, the only piece of code like `old` becomes `new`.

    old, new: an expression, or statements that follow one another. A single capital letter stands for any expression, the same
    wherever it is repeated, and may be used in `new`; `...` at the end of a call's arguments, or of a block, stands for all that
    follows. `new` may be `pass` where `old` is a statement.
    """

    place: Place
    old: str
    new: str

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self.place.function(), "__code__", self.code())

    def code(self) -> CodeType:
        """The code of the function with the mistake."""
        function = self.place.function()
        path = Path(function.__code__.co_filename)
        tree = ast.parse(path.read_text())
        rewrite(_find(tree, self.place), self.old, self.new, str(self.place))
        found = [c for c in _codes(compile(tree, str(path), "exec")) if c.co_qualname == function.__qualname__]
        if len(found) != 1:
            raise AssertionError(f"{len(found)} functions are called {self.place}: update the table of mutants")
        return found[0]


Mutant = Around | Edit


def rewrite(function: ast.AST, old: str, new: str, where: str = "the function") -> None:
    """Edit `function` in place: the one piece of code like `old` (see `Edit`) becomes `new`."""
    pattern, replacement = ast.parse(old).body, ast.parse(new).body
    if len(pattern) == 1 and isinstance(pattern[0], ast.Expr) and isinstance(replacement[0], ast.Expr):
        spots = list(_expressions(function, pattern[0].value))
    else:
        spots = list(_statements(function, pattern))
    if len(spots) != 1:
        raise AssertionError(f"{where} holds {len(spots)} times code like {old!r}: update the mutant")
    put, names = spots[0]
    put([_Fill(names).visit(copy.deepcopy(node)) for node in replacement])
    ast.fix_missing_locations(function)


# ------------------------------------------------------------------------------------------------------ finding code
Names = dict[str, Any]
Spot = tuple[Callable[[list[Any]], None], Names]


def _find(tree: ast.Module, place: Place) -> ast.AST:
    found: list[Any] = [tree]
    for part in place.name.split("."):
        found = [n for one in found for n in one.body if getattr(n, "name", None) == part]
    if len(found) != 1:
        raise AssertionError(f"{place} stands {len(found)} times in its source: update the table of mutants")
    return found[0]


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _expressions(function: ast.AST, pattern: ast.expr) -> Iterator[Spot]:
    """Every expression like the pattern, and how to put another into its place."""
    for node in ast.walk(function):
        for field, value in ast.iter_fields(node):
            if isinstance(value, ast.expr) and (names := _match(value, pattern)) is not None:
                yield lambda new, node=node, field=field: setattr(node, field, new[0].value), names
            for i, part in enumerate(value if isinstance(value, list) else []):
                if isinstance(part, ast.expr) and (names := _match(part, pattern)) is not None:
                    yield lambda new, value=value, i=i: value.__setitem__(i, new[0].value), names


def _statements(function: ast.AST, pattern: list[ast.stmt]) -> Iterator[Spot]:
    """Every run of statements like the pattern, and how to put others into its place."""
    for node in ast.walk(function):
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            for i in range(len(block) - len(pattern) + 1 if isinstance(block, list) else 0):
                cut = slice(i, i + len(pattern))
                if (names := _match(block[cut], pattern)) is not None:
                    yield lambda new, block=block, cut=cut: block.__setitem__(cut, new), names


def _match(node: Any, pattern: Any, names: Names | None = None) -> Names | None:
    """What the capitals of the pattern stand for if `node` is like it, or None."""
    names = {} if names is None else names
    if isinstance(pattern, ast.Name) and _is_capital(pattern.id):
        if pattern.id in names:
            return _match(node, names[pattern.id], names)
        return {**names, pattern.id: node} if isinstance(node, ast.expr) else None
    if isinstance(pattern, list):
        if pattern and _is_rest(pattern[-1]) and isinstance(node, list):
            fixed = len(pattern) - 1
            found = _match(node[:fixed], pattern[:-1], names)
            return None if found is None else {**found, "...": node[fixed:]}
        if not isinstance(node, list) or len(node) != len(pattern):
            return None
        for mine, its in zip(node, pattern, strict=True):
            if (names := _match(mine, its, names)) is None:
                return None
        return names
    if not isinstance(pattern, ast.AST):
        return names if node == pattern and type(node) is type(pattern) else None
    if type(node) is not type(pattern):
        return None
    rest = isinstance(pattern, ast.Call) and bool(pattern.args) and _is_rest(pattern.args[-1])
    for field in pattern._fields:
        if field in IGNORED or (rest and field == "keywords"):
            continue
        if (names := _match(getattr(node, field, None), getattr(pattern, field, None), names)) is None:
            return None
    return {**names, "keywords": node.keywords} if rest else names


def _is_capital(name: str) -> bool:
    return len(name) == 1 and name.isupper()


def _is_rest(node: Any) -> bool:
    node = node.value if isinstance(node, ast.Expr) else node
    return isinstance(node, ast.Constant) and node.value is ...


class _Fill(ast.NodeTransformer):
    """Put what was found for them in the place of a replacement's capitals and `...`."""

    def __init__(self, names: Names) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not _is_capital(node.id):
            return node
        found = copy.deepcopy(self.names[node.id])
        if hasattr(found, "ctx"):  # what is read in one place may be assigned in another
            found.ctx = node.ctx
        return found

    def visit_Expr(self, node: ast.Expr) -> ast.AST | list[ast.AST]:
        return copy.deepcopy(self.names["..."]) if _is_rest(node) else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        rest = bool(node.args) and _is_rest(node.args[-1])
        node.args = node.args[:-1] if rest else node.args
        self.generic_visit(node)
        if rest:
            node.args += copy.deepcopy(self.names["..."])
            node.keywords += copy.deepcopy(self.names["keywords"])
        return node
