"""What is shipped is whole: the files of every model and drafter are those that its manifest names."""

from __future__ import annotations

import re
import tomllib
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


def test_every_shipped_part_says_its_licence_and_others_licences_are_in_the_wheel() -> None:
    root = Path(__file__).parents[2]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["license-files"]
    shipped = {path for pattern in listed for path in root.glob(pattern)}
    for folder in FOLDERS:
        cards = [parent / "README.md" for parent in (folder, folder.parent) if (parent / "README.md").exists()]
        assert any("Licence" in card.read_text(encoding="utf-8") for card in cards), folder
        for name in {
            name for card in cards for name in re.findall(r"`(LICENSES/[\w.-]+)`", card.read_text(encoding="utf-8"))
        }:
            assert root / name in shipped, name
    assert root / "LICENSES" / "PSF-2.0.txt" in shipped  # of the excerpts in prompts.jsonl
