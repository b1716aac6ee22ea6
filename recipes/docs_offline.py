"""A built site loads nothing from elsewhere: no font, script, style or picture. `python recipes/docs_offline.py site` checks it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

LOADED = re.compile(
    r"""<(?:script|img|iframe|source|audio|video|embed)\b[^>]*\bsrc\s*=\s*["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?![^>]*\brel=["']?(?:canonical|next|prev|edit))[^>]*\bhref\s*=\s*["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|url\(\s*["']?((?:https?:)?//[^"')\s]+)|@import\s+["']((?:https?:)?//[^"']+)""",
    re.IGNORECASE,
)


def fetched(text: str) -> list[str]:
    """Addresses elsewhere that a browser loads when it shows this page or style."""
    return [next(filter(None, found)) for found in LOADED.findall(text)]


def offenders(site: Path) -> Iterator[str]:
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css"):
            for address in fetched(path.read_text(encoding="utf-8")):
                yield f"{path.relative_to(site)} loads {address}"


if __name__ == "__main__":
    found = list(offenders(Path(sys.argv[1])))
    sys.exit("\n".join(found) or 0)
