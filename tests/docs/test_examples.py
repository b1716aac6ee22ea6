"""Examples and the README's Python run as they are written, on the shipped pair."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL))
def test_readme_python_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_the_page_on_python_runs() -> None:
    """Its blocks in order, in one namespace, as a reader would type them."""
    space: dict[str, object] = {"__name__": "__main__"}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), flags=re.DOTALL):
        exec(compile(block, "docs/api.md", "exec"), space)


def test_links_in_the_docs_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


# ----------------------------------------------------------------- worked examples of the pages, at small sizes
PAGES = ["first_hour.md", "evaluate.md", "audit.md", "capacity.md"]
SMALL = {
    "--count": "4",
    "--max-tokens": "4",
    "--repeats": "1",
    "--rounds": "2",
    "--lengths": "0,2",
    "--batches": "1,2",
    "--requests": "12",
    "--users": "6",
    "--slots": "2",
}
"""What replaces the sizes that a page's command has."""
ADDED = {
    "bench": ("--max-tokens", "4", "--warmup", "0", "--repeats", "1"),
    "demo": ("--max-tokens", "4", "--prompts", "2", "--repeats", "1"),
    "plan": ("--count", "4", "--max-tokens", "4", "--rounds", "2", "--requests", "100"),
}
"""What is said besides, because a page's command leaves it at a larger default."""
ALLOWED = {"gate": (0, 1, 3), "ab": (0, 1, 3), "plan": (0, 1, 3), "audit": (0, 3)}
"""Exit codes: with texts this short a verdict may be open, and a clock says what it likes."""


def commands(page: str) -> list[str]:
    """The lines of a page's `console` blocks, in order."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def shrunk(line: str) -> list[str]:
    """The command with small sizes."""
    words = shlex.split(line, comments=True)
    for i, word in enumerate(words[:-1]):
        if word in SMALL:
            words[i + 1] = SMALL[word]
    return [*words, *ADDED.get(words[1], ())] if "--max-tokens" not in words else words


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow if p == "evaluate.md" else ()) for p in PAGES])
def test_the_commands_of_a_page_run(
    page: str, short_audits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, in one folder, as a reader would: no wrong usage, no traceback, and the files that are named are there."""
    from outrider.cli.main import main

    monkeypatch.chdir(tmp_path)
    os.mkdir("examples")
    small = re.sub(r"(count|max_tokens): \d+", r"\1: 5", (ROOT / "examples" / "ab.yaml").read_text())
    Path("examples/ab.yaml").write_text(small)
    lines = commands(page)
    assert len(lines) >= 2
    for line in lines:
        argv = shrunk(line)
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as end:
            main()
        shown = "".join(capsys.readouterr())
        assert int(end.value.code or 0) in ALLOWED.get(argv[1], (0,)), f"{line}\n{shown}"
        assert shown.strip() and "Traceback" not in shown
        for flag in ("--out", "--html", "--answers"):
            if flag in argv:
                assert Path(argv[argv.index(flag) + 1]).exists(), f"{line} wrote no {flag}"
