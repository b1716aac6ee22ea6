"""The figures: their curves agree with each other, their page is complete, and the files are real pictures."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

import numpy as np
import pytest

from outrider.theory import figures
from outrider.theory.figures import Figure
from tests.theory.instances import Z

NAMES = ["2a", "2b", "2c", "3-left", "3-right", "4a", "4b", "4c", "5"]


@pytest.fixture(scope="module")
def made() -> list[Figure]:
    return figures.all_figures(runs=1000)


def test_every_figure_of_the_paper_is_there(made: list[Figure]) -> None:
    assert [f.name for f in made] == [f"figure-{n}" for n in NAMES]
    for figure in made:
        assert figure.caption and figure.reproduced and figure.differs
        kinds = {c.kind for panel in figure.panels for c in panel.curves}
        assert kinds >= {"exact", "simulated", "paper"} or figure.name in ("figure-3-left", "figure-4a")


def test_simulated_points_are_on_the_exact_curves(made: list[Figure]) -> None:
    """Points carry three standard errors (one of them estimated from the sample, hence the slack of two draws)."""
    compared = 0
    for figure in made:
        for panel in figure.panels:
            for seen in (c for c in panel.curves if c.kind == "simulated"):
                line = next(c for c in panel.curves if c.kind == "exact" and c.series == seen.series)
                if seen.error is None or figure.name == "figure-4b":
                    continue
                errors = seen.error if len(seen.x) > 30 else seen.error / 3
                expected = np.interp(seen.x, line.x, line.y)
                if panel.log_x:  # between the computed numbers of drafts a curve is not straight
                    known = np.isin(seen.x, line.x)
                    expected, errors, y = expected[known], errors[known], seen.y[known]
                else:
                    y = seen.y
                assert (abs(y - expected) <= Z * errors + 3 / 1000).all(), (figure.name, seen.label)
                compared += len(y)
    assert compared > 800


def test_the_front_is_a_line(made: list[Figure]) -> None:
    front = next(f for f in made if f.name == "figure-4b").panels[0].curves[0]
    np.testing.assert_allclose(front.x + front.y, front.y[0], atol=1e-14)
    assert front.x[0] == 0.0 and front.y[-1] == pytest.approx(0.0, abs=1e-14)


def test_the_page_has_a_row_and_a_picture_for_each(made: list[Figure]) -> None:
    page = figures.index(made)
    for figure in made:
        assert f"| [{figure.name}](#{figure.name}) |" in page
        assert f"![{figure.name}]({figure.name}.png)" in page
    rows = [line for line in page.splitlines() if line.startswith("| [figure-")]
    assert len(rows) == len(made)
    assert all(line.replace("\\|", "").count("|") == 4 for line in rows)
    assert "Errata" in page


def test_files_are_written_twice_the_same(made: list[Figure], tmp_path: Path) -> None:
    chosen = [f for f in made if f.name in ("figure-3-left", "figure-4a", "figure-2b")]
    files = figures.write(chosen, tmp_path / "one")
    assert [f.name for f in files][-1] == "index.md"
    again = figures.write(chosen, tmp_path / "two")
    for first, second in zip(files, again, strict=True):
        assert first.read_bytes() == second.read_bytes()
        if first.suffix == ".png":
            assert first.read_bytes().startswith(b"\x89PNG") and first.stat().st_size > 10_000
        if first.suffix == ".svg":
            assert "<svg" in first.read_text(encoding="utf-8")[:2000]


def test_numbers_need_no_matplotlib(made: list[Figure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest, **more)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "outrider.theory.figures.draw", raising=False)
    monkeypatch.delattr("outrider.theory.figures.draw", raising=False)
    with pytest.raises(ImportError, match="matplotlib"):
        figures.write(made, tmp_path)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="runs must be at least 200"):
        figures.all_figures(runs=100)
