"""Self-contained HTML pages with plots drawn as SVG by hand: no scripts, no fonts, nothing loaded from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from outrider import markup
from outrider.errors import ConfigError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, one colour an arm."""
PHASE_COLOURS = {"target": "#0072b2", "rule": "#e69f00", "draft": "#009e73", "host": "#999999"}
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}svg{max-width:100%}h2{margin-top:2em}code{background:#f4f4f4;padding:.1em .3em}"
)


def page(title: str, body: Sequence[str]) -> str:
    """One HTML document."""
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escaped(title)}</title>"
    body = [f"<h1>{escaped(title)}</h1>", *body]
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>"
    )


def escaped(x: object) -> str:
    """Any text as HTML, whole."""
    return markup.escaped(x, None)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of text."""
    head = "".join(f"<th>{escaped(c)}</th>" for c in columns)
    return (
        f"<table><tr>{head}</tr>"
        + "".join("<tr>" + "".join(f"<td>{escaped(c)}</td>" for c in r) + "</tr>" for r in rows)
        + "</table>"
    )


def intervals(title: str, rows: Sequence[tuple[str, float, float, float]], unit: str, mark: float | None = None) -> str:
    """Horizontal intervals, one a row: name, value, low, high. mark: a vertical line (no difference)."""
    values = [x for _, *v in rows for x in v if math.isfinite(x)] + ([mark] if mark is not None else [])
    if not values:
        return ""
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    x = lambda v: 170 + 480 * (min(max(v, low - pad), high + pad) - low + pad) / (high - low + 2 * pad)  # noqa: E731
    out = []
    for i, (name, value, a, b) in enumerate(rows):
        y, colour = 30 + 28 * i, COLOURS[i % len(COLOURS)]
        out.append(f"<text x='160' y='{y + 4}' text-anchor='end' font-size='13'>{escaped(name)}</text>")
        if math.isfinite(a) and math.isfinite(b):
            out.append(f"<line x1='{x(a):.1f}' x2='{x(b):.1f}' y1='{y}' y2='{y}' stroke='{colour}' stroke-width='3'/>")
        out.append(f"<circle cx='{x(value):.1f}' cy='{y}' r='5' fill='{colour}'/>")
        out.append(f"<text x='660' y='{y + 4}' font-size='12'>{value:.3g}</text>")
    tall = 30 + 28 * len(rows)
    if mark is not None:
        out.append(
            f"<line x1='{x(mark):.1f}' x2='{x(mark):.1f}' y1='12' y2='{tall - 12}' stroke='#888' stroke-dasharray='4'/>"
        )
    for v in (low, (low + high) / 2, high):
        out.append(
            f"<text x='{x(v):.1f}' y='{tall + 8}' font-size='11' text-anchor='middle' fill='#666'>{v:.3g}</text>"
        )
    out.append(f"<text x='410' y='{tall + 26}' font-size='12' text-anchor='middle'>{escaped(unit)}</text>")
    return f"<svg viewBox='0 0 720 {tall + 34}' role='img' aria-label='{escaped(title)}'>{''.join(out)}</svg>"


def bars(title: str, rows: Sequence[tuple[str, dict[str, float]]], unit: str) -> str:
    """Stacked bars of seconds by phase."""
    most = max((sum(parts.values()) for _, parts in rows), default=0.0) or 1.0
    out = []
    for i, (name, parts) in enumerate(rows):
        y, at = 10 + 26 * i, 170.0
        out.append(f"<text x='160' y='{y + 14}' text-anchor='end' font-size='13'>{escaped(name)}</text>")
        for phase, value in parts.items():
            wide = 480 * value / most
            out.append(
                f"<rect x='{at:.1f}' y='{y}' width='{wide:.1f}' height='18' fill='{PHASE_COLOURS.get(phase, '#ccc')}'>"
                f"<title>{escaped(phase)} {value:.4g}</title></rect>"
            )
            at += wide
        out.append(f"<text x='{at + 6:.1f}' y='{y + 14}' font-size='12'>{sum(parts.values()):.3g}</text>")
    y = 20 + 26 * len(rows)
    for i, (phase, colour) in enumerate(PHASE_COLOURS.items()):
        out.append(
            f"<rect x='{170 + 90 * i}' y='{y}' width='12' height='12' fill='{colour}'/>"
            f"<text x='{187 + 90 * i}' y='{y + 11}' font-size='12'>{phase}</text>"
        )
    return f"<svg viewBox='0 0 720 {y + 24}' role='img' aria-label='{escaped(title)} in {escaped(unit)}'>{''.join(out)}</svg>"


def lines(
    title: str, series: dict[str, list[tuple[float, float, float, float]]], unit: str, marks: Sequence[float]
) -> str:
    """Bands over a count: per series (x, value, low, high). The axis has room for twice the last intervals: the first ones may be a
    thousand times as wide, and are cut."""
    shown = {name: [p for p in s if all(map(math.isfinite, p))] for name, s in series.items()}
    points = [p for s in shown.values() for p in s]
    if not points:
        return "<p>Too few prompts for an interval.</p>"
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    heights = [*marks, *(p[1] for p in points), *(2 * v - s[-1][1] for s in shown.values() if s for v in s[-1][2:])]
    low, high = min(heights), max(heights)
    x = lambda v: 60 + 600 * (v - left) / ((right - left) or 1)  # noqa: E731
    y = lambda v: 270 - 240 * (min(max(v, low), high) - low) / ((high - low) or 1)  # noqa: E731
    out = [
        f"<line x1='60' x2='660' y1='{y(m):.1f}' y2='{y(m):.1f}' stroke='#888' stroke-dasharray='4'/>" for m in marks
    ]
    for i, (name, s) in enumerate(shown.items()):
        colour = COLOURS[i % len(COLOURS)]
        if not s:
            continue
        edge = [f"{x(p[0]):.1f},{y(p[3]):.1f}" for p in s] + [f"{x(p[0]):.1f},{y(p[2]):.1f}" for p in reversed(s)]
        out.append(f"<polygon points='{' '.join(edge)}' fill='{colour}' opacity='.18'/>")
        out.append(
            f"<polyline points='{' '.join(f'{x(p[0]):.1f},{y(p[1]):.1f}' for p in s)}' fill='none' "
            f"stroke='{colour}' stroke-width='2'/>"
        )
        out.append(f"<text x='{665}' y='{y(s[-1][1]) + 4:.1f}' font-size='12' fill='{colour}'>{escaped(name)}</text>")
    for v in (low, (low + high) / 2, high):
        out.append(f"<text x='54' y='{y(v) + 4:.1f}' font-size='11' text-anchor='end' fill='#666'>{v:.3g}</text>")
    out += [
        f"<text x='{x(v):.1f}' y='288' font-size='11' text-anchor='middle' fill='#666'>{v:g}</text>"
        for v in (left, right)
    ]
    out.append(f"<text x='360' y='304' font-size='12' text-anchor='middle'>{escaped(unit)}</text>")
    return f"<svg viewBox='0 0 760 312' role='img' aria-label='{escaped(title)}'>{''.join(out)}</svg>"


def write_page(path: Path, text: str) -> None:
    """A page as a file, its folder made if need be. Raises ConfigError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
