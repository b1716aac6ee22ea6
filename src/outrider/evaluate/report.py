"""One self-contained HTML page of a measured run: speeds with their spread, ratios with their intervals, where the time went.

No script, no font, nothing fetched: tables and inline SVG, readable in light and dark, and safe to send by mail. Every text that
comes from outside is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, ROW = 720, 34
COLOURS = {"target": "#4878cf", "draft": "#6acc65", "rule": "#c8a038", "host": "#8c8c8c"}
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #8884; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; font: 13px system-ui, sans-serif; }
pre { white-space: pre-wrap; font-size: 13px; }
"""


def write_html(path: Path, document: dict[str, Any], records: Sequence[Any]) -> None:
    """Write the page of a `bench` document and its records to `path`."""
    arms = document["arms"]
    runs: dict[str, list[float]] = {a["name"]: [] for a in arms}
    for r in records:
        if not r.failed and r.seconds > 0:
            runs[r.arm].append(r.tokens / r.seconds)
    parts = [
        f"<h1>{escape(str(document['drafter']))} with rule {escape(str(document['rule']))}</h1>",
        f"<p>{'The text has the target&#39;s law.' if document['lossless'] else '<b>Lossy</b>: the text differs from the law.'} ",
        f"Temperature {document['temperature']:g}, {document['max_tokens']} tokens a prompt, batch {document['batch']}, ",
        f"{document['repeats']} repeats. Ratios are paired by prompt, with 95% intervals.</p>",
        "<h2>Tokens per second</h2><p>Bar: all tokens over all seconds. Dots: one run each.</p>",
        _bars(arms, runs),
        "<h2>Where the time goes</h2>",
        _phases(arms),
        "<h2>Figures</h2>",
        _table(arms),
        "<h2>How it was measured</h2>",
        f"<pre>{escape(str(document['command']))}\n{escape(json.dumps(document['machine'], indent=1))}</pre>",
    ]
    page = f"<!doctype html><meta charset='utf-8'><title>Outrider: a measured run</title><style>{STYLE}</style>{''.join(parts)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _bars(arms: list[dict[str, Any]], runs: dict[str, list[float]]) -> str:
    top = max([a["tokens_per_second"] for a in arms] + [x for v in runs.values() for x in v], default=1.0) or 1.0
    scale = (WIDTH - 260) / top
    out = []
    for i, a in enumerate(arms):
        y, size = i * ROW, a["tokens_per_second"] * scale
        out.append(f"<text x='0' y='{y + 21}'>{escape(a['name'])}</text>")
        out.append(
            f"<rect x='150' y='{y + 6}' width='{size:.1f}' height='20' fill='{COLOURS['target']}' opacity='.75'/>"
        )
        out += [f"<circle cx='{150 + x * scale:.1f}' cy='{y + 16}' r='2.5' opacity='.6'/>" for x in runs[a["name"]]]
        out.append(f"<text x='{WIDTH - 90}' y='{y + 21}'>{a['tokens_per_second']:.0f}</text>")
    return _svg(out, len(arms))


def _phases(arms: list[dict[str, Any]]) -> str:
    out = []
    for i, a in enumerate(arms):
        y, x, total = i * ROW, 150.0, sum(a["phases"].values()) or 1.0
        out.append(f"<text x='0' y='{y + 21}'>{escape(a['name'])}</text>")
        for name, colour in COLOURS.items():
            share = a["phases"].get(name, 0.0) / total * (WIDTH - 170)
            label = f"{name} {100 * a['phases'].get(name, 0.0) / total:.0f}%"
            out.append(
                f"<rect x='{x:.1f}' y='{y + 6}' width='{share:.1f}' height='20' fill='{colour}'><title>{label}</title></rect>"
            )
            x += share
    names = "".join(f"<tspan fill='{c}'> &#9632; </tspan>{n}" for n, c in COLOURS.items())
    out.append(f"<text x='150' y='{len(arms) * ROW + 18}'>{names}</text>")
    return _svg(out, len(arms) + 1)


def _svg(parts: list[str], rows: int) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {rows * ROW}' role='img'>{''.join(parts)}</svg>"


def _table(arms: list[dict[str, Any]]) -> str:
    head = [
        "arm",
        "tokens/s",
        "against the first",
        "predicted",
        "tokens per step",
        "rejections predicted, observed",
        "agree",
    ]
    rows = [f"<tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>"]
    for a in arms:
        ratio, book = a["speedup"], a["ledger"]
        cells = [
            escape(a["name"]),
            f"{a['tokens_per_second']:.1f}",
            f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}), {ratio['verdict']}" if ratio else "",
            f"{a['predicted_speedup']:.2f}" if a["predicted_speedup"] else "",
            f"{a['acceptance_length']:.2f}" if a["acceptance_length"] else "",
            f"{book['predicted']:.1f}, {book['observed']} ({book['low']:.0f} to {book['high']:.0f})",
            "yes" if book["agrees"] else "<b>no</b>",
        ]
        rows.append(f"<tr>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"
