"""The documentation site: its pages are those of docs/, what is generated is up to date, and what it quotes is said by the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import docs_hooks, docs_names, docs_offline, docs_reference
from tests.docs.test_statements import resolve

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def files(nav: Any) -> Iterator[str]:
    """Every file that a navigation names."""
    if isinstance(nav, str):
        yield nav
    for below in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from files(below)


def test_the_navigation_has_every_page_once() -> None:
    named = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    there = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} | set(docs_hooks.BESIDE.values())
    assert sorted(named) == sorted(there), "a page of docs/ belongs into the nav of mkdocs.yml"


def test_links_between_the_site_and_the_pages_beside_it() -> None:
    assert docs_hooks.inside("[a](docs/step.md) [b](SECURITY.md#x)") == "[a](step.md) [b](security.md#x)"
    assert docs_hooks.beside("[b](../SECURITY.md#x) [c](serve.md)", 0) == "[b](security.md#x) [c](serve.md)"
    assert docs_hooks.beside("[b](../../SECURITY.md)", 1) == "[b](../security.md)"
    for name in docs_hooks.BESIDE:
        for link in re.findall(
            r"\]\((?!https?://|#)([^)#]+)", docs_hooks.inside((ROOT / name).read_text(encoding="utf-8"))
        ):
            assert (DOCS / link).exists() or link in docs_hooks.BESIDE.values(), f"{name}: {link}"


@pytest.mark.parametrize("name", docs_reference.PAGES)
def test_a_generated_page_is_up_to_date(name: str) -> None:
    """Its text comes from the parser too, so it is compared where that is the release of constraints.txt."""
    tested = re.search(r"^typer==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert tested is not None
    if version("typer") != tested[1]:
        pytest.skip(f"typer {version('typer')} writes helps in another way than {tested[1]}")
    written = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert docs_reference.PAGES[name]().rstrip() + "\n" == written, "write it anew: make reference"


def test_every_field_of_a_request_is_described() -> None:
    from outrider.serve.app import document

    for name, schema in document()["components"]["schemas"].items():
        for field, one in schema.get("properties", {}).items():
            assert one.get("description", "").endswith("."), f"{name}.{field} has no text below it"


def test_names_of_the_python_reference_are_there() -> None:
    names = re.findall(
        r"^::: (\S+)", (DOCS / "reference" / "python.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert len(names) > 10
    for name in names:
        resolve(name)


def test_parameters_within_prose_become_a_list() -> None:
    said = "Decodes text.\n\nslots: how many (a: b). low, high: bounds.\neos: ids. Raises Error: when none."
    assert docs_names.listed(said, {"slots", "low", "high", "eos", "a"}) == (
        "Decodes text.\n\n- `slots`: how many (a: b).\n- `low`, `high`: bounds.\n- `eos`: ids. Raises Error: when none."
    )
    assert docs_names.listed("No name: here.\n\n>>> slots: x", {"slots"}) == "No name: here.\n\n>>> slots: x"


def test_every_picture_is_made_by_a_command() -> None:
    text = (DOCS / "pictures.md").read_text(encoding="utf-8")
    named = re.findall(
        r"`([\w/.]+)`", "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    )
    for path in (p for p in (DOCS / "figures").rglob("*") if p.suffix in (".png", ".svg")):
        name = str(path.relative_to(DOCS / "figures"))
        assert any(
            name == n or (n.endswith("/") and name.startswith(n)) or n == name.rsplit(".", 1)[0] for n in named
        ), name
    for script in re.findall(r"python ((?:recipes|benchmarks)/\w+\.py)", text):
        assert (ROOT / script).is_file(), script


@cache
def said() -> str:
    """Every piece of text in the source, one after the other."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "src").rglob("*.py")))
    texts = (
        n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )
    return "\0".join(texts)


def fragments(page: str) -> list[str]:
    """What a page says that Outrider says: first cells of its tables. `{}` stands for a name or a number."""
    return re.findall(r"^\| `([^`]+)` \|", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_what_the_page_on_troubles_quotes_is_said_by_the_code() -> None:
    found = fragments("troubleshooting.md")
    assert len(found) > 25
    for text in found:
        for part in text.split("{}"):
            assert part.strip() in said(), text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('<script src="https://a.b/c.js"></script>', ["https://a.b/c.js"]),
        ('<link href="https://fonts.a/x" rel="stylesheet">', ["https://fonts.a/x"]),
        ("<img alt=x src=//a.b/c.png>", ["//a.b/c.png"]),
        ("@font-face{src:url(https://a.b/c.woff2)}", ["https://a.b/c.woff2"]),
        ('<link rel="canonical" href="https://a.b/">', []),
        ('<script src="assets/c.js"></script><a href="https://a.b/">away</a>', []),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(text: str, wanted: list[str]) -> None:
    assert docs_offline.fetched(text) == wanted


def test_the_sites_packages_are_pinned() -> None:
    lines = [line for line in (ROOT / ".ci" / "docs.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 20 and all(re.match(r"[\w.-]+==[\w.]+( |$)", line) for line in lines)
