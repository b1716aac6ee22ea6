"""How answers are shown to people: tables that fit the terminal without breaking a word, and plain text into a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from outrider.cli.terminal import console, plain

CELL, GAP = 3, 2
"""Columns that a cell of a framed table takes besides its text, and spaces between the columns of a plain one."""


def rate(value: float) -> str:
    """Tokens a second: whole numbers from 100 on, else three digits, so that slow machines' can be divided by each other."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.3g}"


def show(table: Table, to: RichConsole | None = None) -> None:
    """Print a table: framed where every word of it fits the terminal, else one block of lines a row; plain into a pipe."""
    out = console() if to is None else to
    columns = [[as_text(out, c.header), *(as_text(out, cell) for cell in c.cells)] for c in table.columns]
    if table.title:
        out.print(as_text(out, table.title), style="" if plain(out) else "italic")
    rows = list(zip(*columns, strict=True))
    if plain(out):
        for line in aligned(columns, rows):
            out.print(line, markup=False, soft_wrap=True)
        return
    widths = fitted([(longest_word(c), longest_line(c)) for c in columns], out.width - CELL * len(columns) - 1)
    if widths is None:
        for row in rows[1:]:
            for line in block(rows[0], row, out):
                out.print(line)
        return
    table.title = None
    for column, width in zip(table.columns, widths, strict=True):
        column.width, column.overflow = width, "fold"
    out.print(table)


def as_text(out: RichConsole, cell: Any) -> Text:
    """A cell or a title, with its markup."""
    return cell.copy() if isinstance(cell, Text) else out.render_str(str(cell))


def longest_word(cells: Sequence[Text]) -> int:
    return max((Text(word).cell_len for cell in cells for word in cell.plain.split()), default=0)


def longest_line(cells: Sequence[Text]) -> int:
    return max((Text(line).cell_len for cell in cells for line in cell.plain.split("\n")), default=0)


def fitted(sizes: Sequence[tuple[int, int]], room: int) -> list[int] | None:
    """Widths between the longest word and the longest line of every column that fill at most `room`; None if words do not fit."""
    least, widths = [max(1, low) for low, _ in sizes], [max(1, high) for _, high in sizes]
    if sum(least) > room:
        return None
    while sum(widths) > room:
        spare = [w - low for w, low in zip(widths, least, strict=True)]
        widths[spare.index(max(spare))] -= 1
    return widths


def aligned(columns: Sequence[Sequence[Text]], rows: Sequence[Sequence[Text]]) -> list[str]:
    """Plain lines with the columns below one another, two spaces apart."""
    widths = [longest_line(c) for c in columns]
    lines = []
    for row in rows:
        cells = [cell.plain.replace("\n", "; ") for cell in row]
        lines.append((" " * GAP).join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip())
    return lines


def block(header: Sequence[Text], row: Sequence[Text], out: RichConsole) -> list[Text]:
    """A row as lines of name and value, for a terminal too narrow for the table; the first cell is its headline.

    A value that is too long goes on below itself; where not even its words fit beside the names, it begins below its name.
    """
    width = max(h.cell_len for h in header)
    lines = [Text.assemble((row[0].plain, "bold"))]
    for name, cell in zip(header[1:], row[1:], strict=True):
        if not cell.plain.strip():
            continue
        beside = out.width - width - 2 * GAP >= longest_word([cell])
        indent = width + 2 * GAP if beside else 2 * GAP
        parts = cell.wrap(out, max(out.width - indent, 1))
        named = Text.assemble(" " * GAP, (name.plain.ljust(width if beside else 0), "dim"))
        if not beside:
            lines.append(named)
        for i, part in enumerate(parts):
            part.rstrip()
            lines.append(
                Text.assemble(named, " " * GAP, part) if beside and not i else Text.assemble(" " * indent, part)
            )
    return lines
