"""Docstrings of ours name parameters and fields in prose ("slots: sequences decoded together. eos: ..."): here they become lists.

`listed` is the change of a text; the class at the end is what mkdocstrings applies it by (mkdocs.yml).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any


def listed(text: str, names: Collection[str]) -> str:
    """The text with an item for every name of `names` that it explains; other paragraphs stay as they are."""
    return "\n\n".join(_paragraph(one, names) for one in re.split(r"\n\s*\n", text))


def _paragraph(text: str, names: Collection[str]) -> str:
    flat = " ".join(text.split())
    word = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    if not word or text.lstrip().startswith((">>>", "-", "|", "```")):
        return text
    starts = list(re.finditer(rf"(?:^|(?<=[.;)]\s))((?:{word})(?:(?:, | and )(?:{word}))*): ", flat))
    if not starts:
        return text
    ends = [found.start() for found in starts[1:]] + [len(flat)]
    items = [
        f"- {', '.join(f'`{n}`' for n in re.split(', | and ', found[1]))}: {flat[found.end() : end].strip()}"
        for found, end in zip(starts, ends, strict=True)
    ]
    before = flat[: starts[0].start()].strip()
    return "\n".join([*([before, ""] if before else []), *items])


try:
    import griffe
except ImportError:  # the tests of `listed` need none
    pass
else:

    class Names(griffe.Extension):
        """Applies `listed` to the docstrings of classes and functions."""

        def on_object(self, *, obj: Any, **_: Any) -> None:
            if obj.docstring is None or not (obj.is_class or obj.is_function):
                return
            names = {p.name for p in obj.parameters} if obj.is_function else set(obj.members)
            if obj.is_class and "__init__" in obj.members:
                names |= {p.name for p in obj.members["__init__"].parameters}
            obj.docstring.value = listed(obj.docstring.value, names - {"self", "cls"})
