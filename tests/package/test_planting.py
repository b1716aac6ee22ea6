"""How mistakes are planted: edits of the syntax tree read no formatting, both kinds end with the test, and none is ever lost."""

from __future__ import annotations

import ast

import pytest

from outrider.drafters import ngram
from outrider.engine.scheduler import Scheduler
from outrider.noise import LANES, Noise
from tests.mutants import Around, Edit, Place, rewrite

UNIFORM = Place("outrider.noise", "Noise.uniform")


def rewritten(source: str, old: str, new: str) -> str:
    tree = ast.parse(source)
    rewrite(tree, old, new)
    return ast.unparse(tree)


@pytest.mark.parametrize(
    ("source", "old", "new", "wanted"),
    [
        ("y = (a\n  + b) * 2", "a + b", "a - b", "y = (a - b) * 2"),
        ("if x < limit: y = f(x)", "A < L", "A <= L", "if x <= limit:\n    y = f(x)"),
        ("f(i, i + 1); f(i, j)", "f(I, I + 1)", "f(I, I)", "f(i, i)\nf(i, j)"),
        ("f(0, a, b, key=c)", "f(0, ...)", "f(1, ...)", "f(1, a, b, key=c)"),
        ("y = [f(x) for x in z]", "[f(X) for X in Z]", "[X for X in Z]", "y = [x for x in z]"),
        ("for x in y: f(x)", "for X in Y: ...", "for X in reversed(Y): ...", "for x in reversed(y):\n    f(x)"),
        ("for x in y:\n  a(x)  # why\n\n  b = x", "a(X)\nb = X", "b = X\na(X)", "for x in y:\n    b = x\n    a(x)"),
        ("if x:\n  stop()\nelse:\n  go()", "go()", "pass", "if x:\n    stop()\nelse:\n    pass"),
        ("k = {'a': 1, 'b': 2}", "{'a': A, 'b': B}", "{'a': A, 'b': A}", "k = {'a': 1, 'b': 1}"),
    ],
)
def test_code_is_found_by_what_it_says(source: str, old: str, new: str, wanted: str) -> None:
    assert rewritten(source, old, new) == wanted


@pytest.mark.parametrize("source", ["y = a - b", "y = a + b + (a + b)"], ids=["gone", "twice"])
def test_code_that_is_gone_or_stands_twice_is_told(source: str) -> None:
    with pytest.raises(AssertionError, match=r"holds [02] times code like 'a \+ b'"):
        rewritten(source, "a + b", "a - b")


@pytest.mark.parametrize("name", ["gone", "Gone.uniform", "Noise.gone", "LANES"])
def test_a_function_that_is_gone_is_told(name: str) -> None:
    for mistake in (Edit(Place("outrider.noise", name), "A", "A"), Around(Place("outrider.noise", name), print)):
        with pytest.raises(AssertionError, match="update the table of mutants"), pytest.MonkeyPatch.context() as patch:
            mistake.plant(patch)


def test_a_mistake_is_made_and_ends_with_its_test() -> None:
    before = Noise((1,), (2,)).uniform(0, 1, "draft", 3)
    mistakes = [
        (
            Edit(UNIFORM, "F(S, L, P, depth, index)", "F(S, L, P, depth, 0)"),
            Noise((1,), (2,)).uniform(0, 1, "draft", 0),
        ),
        (Around(UNIFORM, lambda uniform, *arguments: 1.0 - uniform(*arguments)), 1.0 - before),
    ]
    for mistake, wanted in mistakes:
        with pytest.MonkeyPatch.context() as patch:
            mistake.plant(patch)
            assert Noise((1,), (2,)).uniform(0, 1, "draft", 3) == wanted
        assert Noise((1,), (2,)).uniform(0, 1, "draft", 3) == before
    assert LANES["draft"] == 3


def test_properties_and_imported_functions_are_reached() -> None:
    with pytest.MonkeyPatch.context() as patch:
        Edit(Place("outrider.engine.scheduler", "Scheduler.free"), "len(F)", "len(F) + 1").plant(patch)
        assert Scheduler(3).free == 4
        Around(Place("outrider.drafters.tree.forest", "chains"), lambda chains, *arguments: "planted").plant(patch)
        assert ngram.chains([[1]]) == "planted"  # where it was imported to
    assert Scheduler(3).free == 3
