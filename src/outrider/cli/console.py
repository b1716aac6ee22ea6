"""Printing what others have named and written: as text, never as markup or as commands to the terminal."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console as RichConsole
from rich.text import Text

from outrider.errors import printable

_TAG = re.compile(r"\[(/?)(dim|bold red|bold|green)\]")
"""The only tags that are read, and only in what this program prints itself: a name in square brackets is a name."""


class Console(RichConsole):
    """rich's console, whose tables hold any text: no tag but our own few is read, none in a cell, and none is an error."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"emoji": False, **options})

    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        """A string as it is shown. rich hands a highlighter along with what is printed, and none with what is in a table."""
        text = printable(text)
        if options.get("highlighter") is None:
            return super().render_str(text, *args, **{**options, "markup": False, "emoji": False})
        out, styles, at = Text(), list[str](), 0
        for tag in _TAG.finditer(text):
            out.append(text[at : tag.start()], " ".join(styles))
            at = tag.end()
            if not tag[1]:
                styles.append(tag[2])
            elif tag[2] in styles:
                styles.remove(tag[2])
        return out.append(text[at:], " ".join(styles))
