"""mkdocs reads this (mkdocs.yml): pages that lie beside docs/ become pages of the site, and links between the two lead there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BESIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""Pages in the top folder, and what they are called in the site."""


def inside(text: str) -> str:
    """A page of the top folder as one of the site: its links name pages of docs/ without the folder."""
    for name, page in BESIDE.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text.replace("](docs/", "](")


def beside(text: str, depth: int) -> str:
    """A page of docs/, `depth` folders down, whose links to the top folder name its page in the site."""
    up = "../" * depth
    for name, page in BESIDE.items():
        text = re.sub(rf"\]\((?:\.\./){{{depth + 1}}}{re.escape(name)}", f"]({up}{page}", text)
    return text


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the top folder."""
    from mkdocs.structure.files import File

    for name, page in BESIDE.items():
        files.append(File.generated(config, page, content=inside((ROOT / name).read_text(encoding="utf-8"))))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links to the top folder."""
    return beside(markdown, page.file.src_uri.count("/"))
