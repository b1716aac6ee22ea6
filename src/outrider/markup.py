"""HTML of notebooks: texts coloured by where their tokens came from, and small tables. Any text is safe in it.

Styles stand in the elements, since notebooks drop style sheets; colours are transparent, so that they suit a dark page too, and
every kind of token also has a line of its own, for those who do not see the colours.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from outrider.errors import printable

MOST_TOKENS = 2000
"""Tokens of a text that are shown."""
MOST_CHARACTERS = 200
"""Characters of one cell, or of one token."""
STYLES = {
    "accepted": "background:rgba(0,158,115,.28)",
    "corrected": "background:rgba(213,94,0,.32);border-bottom:2px solid rgba(213,94,0,1)",
    "bonus": "background:rgba(0,114,178,.26);border-bottom:2px dotted rgba(0,114,178,1)",
    "sampled": "",
}
"""By origin (`engine.sequence.ORIGINS`): drafted and accepted; in place of a rejected one; after a whole draft; without
a draft."""
MEANINGS = {
    "accepted": "drafted and accepted",
    "corrected": "in the place of a rejected draft token",
    "bonus": "after a draft that was accepted whole",
    "sampled": "without a draft",
}


def escaped(value: object, most: int | None = MOST_CHARACTERS) -> str:
    """Any text as HTML: markup, terminal commands and changes of text direction are shown, not followed."""
    text = str(value)
    if most is not None and len(text) > most:
        text = text[:most] + "…"
    return html.escape(printable(text))


def coloured(pieces: Sequence[str], origins: Sequence[str], tokens: Sequence[int]) -> str:
    """A text, token by token. pieces: the text of each; without any (no tokenizer) the numbers of the tokens are shown."""
    ids = not any(pieces)
    out = []
    for piece, origin, token in zip(pieces[:MOST_TOKENS], origins, tokens, strict=False):
        shown = f"{token} " if ids else piece
        if not shown:
            continue
        out.append(
            f"<span style='{STYLES.get(origin, '')}' title='token {token}: {MEANINGS.get(origin, escaped(origin))}'>"
            f"{escaped(shown)}</span>"
        )
    more = len(tokens) - MOST_TOKENS
    if more > 0:
        out.append(f"<i> … and {more} tokens more</i>")
    return f"<div style='font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere'>{''.join(out)}</div>"


def legend(origins: Iterable[str]) -> str:
    """What the colours of these origins mean, with how many tokens have each."""
    counted = list(origins)
    found = [name for name in STYLES if name in counted]
    return note(
        " &nbsp; ".join(
            f"<span style='{STYLES[name]}'>&nbsp;{name}&nbsp;</span> {counted.count(name)}, {MEANINGS[name]}"
            for name in found
        )
    )


def note(inner: str) -> str:
    """A small line of HTML."""
    return f"<div style='font-size:85%;opacity:.8;margin:.3em 0'>{inner}</div>"


def table(rows: Iterable[tuple[object, object]]) -> str:
    """A table of names and values, which are texts."""
    cell = "<td style='text-align:left;padding:.1em .8em .1em 0;vertical-align:top'>"
    lines = (f"<tr>{cell}<b>{escaped(a)}</b></td>{cell}{escaped(b, None)}</td></tr>" for a, b in rows)
    return f"<table style='border-collapse:collapse'>{''.join(lines)}</table>"
