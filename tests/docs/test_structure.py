"""docs/structure.md says what is there: the floors of `pyproject.toml`, every package, and files that its three ways pass."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "outrider"
PAGE = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["docs/structure.md", "CONTRIBUTING.md"])
def test_floors_are_those_that_are_checked(page: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    drawn = re.search(r"```\n(cli\n.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert drawn is not None
    assert [re.split(r"\s{3,}", line)[0] for line in drawn[1].strip().split("\n")] == contracts[0]["layers"]


def test_every_package_is_described() -> None:
    table = PAGE.split("| package |")[1].split("\n\n")[0]
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert {name for name in packages if f"`{name}/`" not in table} == set()


def test_the_ways_pass_files_that_are_there() -> None:
    _, *ways = PAGE.split("\n## The way of ")
    assert len(ways) == 3
    for way in ways:
        named = re.findall(r"`([\w/]+\.py)`", way)
        assert 10 < len(set(named)) < 30
        assert [name for name in named if not (SOURCE / name).is_file() and name != "reply.py"] == [], way.split("\n")[
            0
        ]
        assert len(re.findall(r"^\d+\. ", way, re.MULTILINE)) <= 10, "ten lines"
