"""Nobody reads what another package keeps private: not the package's modules, not the tests, recipes, benchmarks and examples.

A private name of ours may be used in the package where it stands, and there only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("src", "tests", "recipes", "benchmarks", "examples")

FOREIGN = {  # private names of others that have no public one
    *("_repr_html_", "_repr_png_"),
    *("_attn_implementation", "_backbone_forward", "_exit", "_expand_kernel_impl", "_fields", "_getframe"),
    *("_model_mapping", "_register_builtin", "_replace"),
    *("_buffers", "_compiled_call_impl", "_modules", "_parameters"),
    *("_forward_hooks", "_forward_pre_hooks", "_version", "_prepare_generation_config"),
}
OWN = ("self", "cls")


IMPORT = re.compile(r"^[ \t]*((?:from|import)[ \t]+outrider\b[^\n(]*(?:\([^)]*\))?)", re.MULTILINE)
"""An import of ours as it is written: parsing these alone takes a tenth of the time of parsing every file."""
READ = re.compile(r"(?<!\bself)(?<!\bcls)\._(?!_)(\w+)")


def sources(*places: str) -> Iterator[tuple[Path, str]]:
    return ((path, path.read_text()) for place in places for path in sorted((ROOT / place).rglob("*.py")))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def package_of(path: Path) -> str:
    """`outrider.verify` for a module in it; the folder's name outside `src`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:-1] if parts[0] == "src" else parts[:1])


def private_imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Private modules and names of ours that are imported from another package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "outrider":
            found = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.split(".")[0] == "outrider"]
        else:
            continue
        for name in found:
            parts = name.split(".")
            at = next((i for i, part in enumerate(parts) if is_private(part)), None)
            if at is not None and ".".join(parts[:at]) != package:
                yield ".".join(parts[: at + 1])


def private_reads(tree: ast.AST) -> Iterator[str]:
    """Private attributes of anything but `self`, of this class's parents and of what this file itself defines."""
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}
    defined |= {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and _owned(n)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not _owned(node) and node.attr not in defined:
            yield node.attr


def _owned(node: ast.Attribute) -> bool:
    of = node.value
    parent = isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "super"
    return parent or (isinstance(of, ast.Name) and of.id in OWN)


def imports_of(text: str) -> ast.AST:
    """The imports of ours in a file, and those that its texts quote; the whole file where prose looks like one."""
    try:
        return ast.parse("\n".join(IMPORT.findall(text)))
    except SyntaxError:
        return ast.parse(text)


def test_no_private_module_is_imported_from_another_package() -> None:
    found: dict[str, set[str]] = {}
    for path, text in sources(*PLACES):
        for name in private_imports(imports_of(text), package_of(path)):
            found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    assert found == {}


def test_no_private_attribute_of_ours_is_read_outside_the_package() -> None:
    found: set[tuple[str, str]] = set()
    for path, text in sources(*PLACES[1:]):
        if any(f"_{attr}" not in FOREIGN for attr in READ.findall(text)):  # else there is nothing to find
            name = str(path.relative_to(ROOT))
            found |= {(name, attr) for attr in private_reads(ast.parse(text)) if attr not in FOREIGN}
    assert found == set()


@pytest.mark.parametrize(
    ("source", "package", "wanted"),
    [
        ("from outrider.verify._tables import draw", "tests", ["outrider.verify._tables"]),
        ("from outrider.verify import _tables as t", "outrider.drafters", ["outrider.verify._tables"]),
        ("from outrider.verify import _tables as t", "outrider.verify", []),
        ("import outrider.theory._tables", "tests", ["outrider.theory._tables"]),
        ("from outrider.verify.numerics import draw", "tests", []),
        ("from outrider import __version__", "outrider.cli", []),
        ("from torch import _C", "tests", []),
    ],
)
def test_the_control_imports(source: str, package: str, wanted: list[str]) -> None:
    assert sorted(set(private_imports(imports_of(f"def f():\n    {source}  # why\n"), package))) == wanted


def test_the_control_imports_over_several_lines() -> None:
    source = "if x:\n    from outrider.verify import (\n        numerics,  # this\n        _tables as t,\n    )\n"
    assert "outrider.verify._tables" in private_imports(imports_of(source), "tests")


def test_the_control_reads() -> None:
    source = "class A:\n  def f(self): self._x = super()._y\none._z = one._x"
    assert "z" in READ.findall(source)
    assert list(private_reads(ast.parse(source))) == ["_z"]
