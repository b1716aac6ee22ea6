"""No ring of imports, not even of types or within functions: whoever reads a module and what it imports comes to an end."""

from __future__ import annotations

from collections.abc import Mapping, Set

import pytest

grimp = pytest.importorskip("grimp")  # comes with import-linter


def rings(imports: Mapping[str, Set[str]]) -> list[set[str]]:
    """Modules that import each other, by however long a way: what is left when those that import nothing left are taken away."""
    left = {name: set(found) for name, found in imports.items()}
    while leaves := [name for name, found in left.items() if not found & left.keys()]:
        for name in leaves:
            del left[name]
    needed = set().union(*left.values()) if left else set()
    inner = {name for name in left if name in needed}
    return [{name, *(left[name] & inner)} for name in sorted(inner)]


def test_there_is_none() -> None:
    graph = grimp.build_graph("outrider")
    assert rings({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}) == []


def test_the_control_rings_are_found() -> None:
    assert rings({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert rings({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) != []
