"""The files that a repository has beside its code agree with the code: tests, targets, options and versions they name are there."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from outrider.cli.main import app

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_every_test_that_the_page_on_security_names_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 40
    for path, name in named:
        assert (ROOT / path).is_file(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"
    known = {o for p in serve().params for o in (*p.opts, *p.secondary_opts)}
    for option in re.findall(r"`(--[a-z-]+)", text):
        assert option in known, option


def serve() -> Any:
    return typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert (str(cited["version"]), cited["license"]) == (PROJECT["version"], PROJECT["license"])


def test_hooks_are_the_parts_of_make_check() -> None:
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    assert recipe is not None
    parts = {Path(shlex.split(line)[0]).name for line in recipe.group(1).replace("$(BIN)/", "").splitlines()}
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {Path(shlex.split(hook["entry"])[0]).name for hook in hooks} == parts


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_run_the_developers_own_commands(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] > 0
        for target in job.get("strategy", {}).get("matrix", {}).get("target", ()):
            assert target in TARGETS
    runs = [step["run"] for step in steps(path) if "run" in step]
    assert all(re.match(r"\.ci/run|make |python -m |echo ", run) for run in runs)
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False


def test_changes_are_tested_by_the_command_of_a_developer_on_all_machines() -> None:
    path = ROOT / ".github" / "workflows" / "test.yml"
    assert steps(path)[-1] == {"run": ".ci/run"} and "make test" in (ROOT / ".ci" / "run").read_text()
    machines = yaml.safe_load(path.read_text())["jobs"]["test"]["strategy"]["matrix"]["include"]
    kinds = {row["os"].split("-")[0] + ("-arm" if row["os"].endswith("-arm") else "") for row in machines}
    assert kinds == {"ubuntu", "ubuntu-arm", "macos"}
    first = PROJECT["requires-python"].removeprefix(">=")
    assert first in {row["python"] for row in machines}


def test_options_of_the_service_and_of_the_image_are_options_of_serve() -> None:
    unit = (ROOT / "deploy" / "outrider.service").read_text()
    image = (ROOT / "Dockerfile").read_text()
    known = {o for p in serve().params for o in p.opts}
    start = re.search(r"^ExecStart=.*/outrider serve (.*)$", unit, flags=re.MULTILINE)
    command = re.search(r"^CMD \[(.*)\]$", image, flags=re.MULTILINE)
    assert start is not None and command is not None
    words = start.group(1).split() + re.findall(r"--[a-z-]+", command.group(1) + unit)
    assert {w for w in words if w.startswith("--")} <= known
    extras = set(re.findall(r"\[([a-z,]+)\]\"", image)) | set(re.findall(r"outrider\[([a-z,]+)\]", unit))
    assert extras and {e for each in extras for e in each.split(",")} <= set(PROJECT["optional-dependencies"])


def test_the_image_copies_what_is_there_and_what_its_context_admits() -> None:
    admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert len(copied) > 2
    for line in copied:
        for name in line.split()[:-1]:
            assert (ROOT / name).exists() and name in admitted, name


def test_no_two_files_of_tests_have_one_name() -> None:
    """They are modules without packages: one run over all of them, as `make test-latest` is, could not import the second."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py") if "outside" not in path.parts]
    assert sorted(names) == sorted(set(names))
