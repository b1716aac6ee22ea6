"""The notebooks in a Jupyter kernel: they run, and what they show there is HTML and pictures."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[3] / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_in_its_kernel(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    NotebookClient(book, timeout=600, kernel_name="python3").execute()
    kinds = {kind for c in book.cells for o in c.get("outputs", ()) for kind in o.get("data", {})}
    assert "image/png" in kinds or "text/html" in kinds
