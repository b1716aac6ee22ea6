"""Notebooks in examples/ run as they are stored, cell by cell in one namespace, and are stored without outputs.

Here their code runs in this process; `make test-partners` runs them in a Jupyter kernel.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
LONG = {"07_compare_drafters", "08_train_a_drafter"}


def cells(path: Path) -> list[dict[str, Any]]:
    found = json.loads(path.read_text())
    assert (found["nbformat"], found["metadata"]["kernelspec"]["name"]) == (4, "python3")
    return found["cells"]


def shown(value: Any) -> str:
    """What a notebook would show of the last value of a cell."""
    for name in ("_repr_html_", "_repr_png_", "__repr__"):
        if hasattr(value, name):
            return str(getattr(value, name)())
    return ""


def run(code: str, space: dict[str, Any], name: str) -> str:
    """A cell; returns what is shown of its last expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), space)
    return "" if last is None else shown(eval(compile(ast.Expression(last.value), name, "eval"), space))


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=pytest.mark.slow if p.stem in LONG else (), id=p.stem) for p in NOTEBOOKS]
)
def test_a_notebook_runs(path: Path) -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    seen = [run("".join(c["source"]), space, path.name) for c in cells(path) if c["cell_type"] == "code"]
    assert any(seen)


def test_notebooks_are_stored_without_outputs_and_explain_themselves() -> None:
    assert len(NOTEBOOKS) >= 4
    for path in NOTEBOOKS:
        found = cells(path)
        assert found[0]["cell_type"] == "markdown" and "".join(found[0]["source"]).startswith("# ")
        assert not any(c.get("outputs") or c.get("execution_count") for c in found), f"{path.name}: clear its outputs"
        assert len({c["id"] for c in found}) == len(found)
