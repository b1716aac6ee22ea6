"""What is shipped is whole: the files of every model and drafter are those that its manifest names."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider import assets
from outrider.train.checkpoint import verify

FOLDERS = sorted(path.parent for path in Path(assets.__file__).parent.rglob("manifest.json"))


def test_every_shipped_part_has_a_manifest() -> None:
    parts = {(folder.parent.name, folder.name) for folder in FOLDERS}
    text = {("pycode", part) for part in ("target", "draft", "medusa", "eagle", "dflash")}
    assert parts == text | {("digits", part) for part in ("target", "draft", "counts", "eagle")}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_shipped_folder_is_what_its_manifest_says(folder: Path) -> None:
    verify(folder)
