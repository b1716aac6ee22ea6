"""Self-contained HTML pages with plots drawn as SVG by hand: no scripts, no fonts, nothing loaded from anywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError
from outrider.evaluate.experiments.experiment import Experiment, State
from outrider.evaluate.measure import Record
from outrider.telemetry.ledger import spent, standing

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, one colour an arm."""
METRIC = {"speed": "speed over base", "acceptance": "tokens per target call over base"}
PHASE_COLOURS = {"target": "#0072b2", "rule": "#e69f00", "draft": "#009e73", "host": "#999999"}
NUMBERS = (
    "arm", "tokens", "tokens/s", "tokens per step", "rejections predicted", "observed", "the ledger", "failed", "loops",
)  # fmt: skip
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}svg{max-width:100%}h2{margin-top:2em}code{background:#f4f4f4;padding:.1em .3em}"
)


def page(title: str, body: Sequence[str]) -> str:
    """One HTML document."""
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{_e(title)}</title>"
    body = [f"<h1>{_e(title)}</h1>", *body]
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>"
    )


def _e(x: object) -> str:
    return html.escape(str(x))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of text."""
    head = "".join(f"<th>{_e(c)}</th>" for c in columns)
    return (
        f"<table><tr>{head}</tr>"
        + "".join("<tr>" + "".join(f"<td>{_e(c)}</td>" for c in r) + "</tr>" for r in rows)
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
        out.append(f"<text x='160' y='{y + 4}' text-anchor='end' font-size='13'>{_e(name)}</text>")
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
    out.append(f"<text x='410' y='{tall + 26}' font-size='12' text-anchor='middle'>{_e(unit)}</text>")
    return f"<svg viewBox='0 0 720 {tall + 34}' role='img' aria-label='{_e(title)}'>{''.join(out)}</svg>"


def bars(title: str, rows: Sequence[tuple[str, dict[str, float]]], unit: str) -> str:
    """Stacked bars of seconds by phase."""
    most = max((sum(parts.values()) for _, parts in rows), default=0.0) or 1.0
    out = []
    for i, (name, parts) in enumerate(rows):
        y, at = 10 + 26 * i, 170.0
        out.append(f"<text x='160' y='{y + 14}' text-anchor='end' font-size='13'>{_e(name)}</text>")
        for phase, value in parts.items():
            wide = 480 * value / most
            out.append(
                f"<rect x='{at:.1f}' y='{y}' width='{wide:.1f}' height='18' fill='{PHASE_COLOURS.get(phase, '#ccc')}'>"
                f"<title>{_e(phase)} {value:.4g}</title></rect>"
            )
            at += wide
        out.append(f"<text x='{at + 6:.1f}' y='{y + 14}' font-size='12'>{sum(parts.values()):.3g}</text>")
    y = 20 + 26 * len(rows)
    for i, (phase, colour) in enumerate(PHASE_COLOURS.items()):
        out.append(
            f"<rect x='{170 + 90 * i}' y='{y}' width='12' height='12' fill='{colour}'/>"
            f"<text x='{187 + 90 * i}' y='{y + 11}' font-size='12'>{phase}</text>"
        )
    return f"<svg viewBox='0 0 720 {y + 24}' role='img' aria-label='{_e(title)} in {_e(unit)}'>{''.join(out)}</svg>"


def lines(
    title: str, series: dict[str, list[tuple[float, float, float, float]]], unit: str, marks: Sequence[float]
) -> str:
    """Bands over a count: per series (x, value, low, high)."""
    points = [p for s in series.values() for p in s if all(map(math.isfinite, p))]
    if not points:
        return "<p>Too few prompts for an interval.</p>"
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min([p[2] for p in points] + list(marks)), max([p[3] for p in points] + list(marks))
    x = lambda v: 60 + 600 * (v - left) / ((right - left) or 1)  # noqa: E731
    y = lambda v: 270 - 240 * (v - low) / ((high - low) or 1)  # noqa: E731
    out = [
        f"<line x1='60' x2='660' y1='{y(m):.1f}' y2='{y(m):.1f}' stroke='#888' stroke-dasharray='4'/>" for m in marks
    ]
    for i, (name, found) in enumerate(series.items()):
        s, colour = [p for p in found if all(map(math.isfinite, p))], COLOURS[i % len(COLOURS)]
        if not s:
            continue
        edge = [f"{x(p[0]):.1f},{y(p[3]):.1f}" for p in s] + [f"{x(p[0]):.1f},{y(p[2]):.1f}" for p in reversed(s)]
        out.append(f"<polygon points='{' '.join(edge)}' fill='{colour}' opacity='.18'/>")
        out.append(
            f"<polyline points='{' '.join(f'{x(p[0]):.1f},{y(p[1]):.1f}' for p in s)}' fill='none' "
            f"stroke='{colour}' stroke-width='2'/>"
        )
        out.append(f"<text x='{665}' y='{y(s[-1][1]) + 4:.1f}' font-size='12' fill='{colour}'>{_e(name)}</text>")
    for v in (low, (low + high) / 2, high):
        out.append(f"<text x='54' y='{y(v) + 4:.1f}' font-size='11' text-anchor='end' fill='#666'>{v:.3g}</text>")
    out += [
        f"<text x='{x(v):.1f}' y='288' font-size='11' text-anchor='middle' fill='#666'>{v:g}</text>"
        for v in (left, right)
    ]
    out.append(f"<text x='360' y='304' font-size='12' text-anchor='middle'>{_e(unit)}</text>")
    return f"<svg viewBox='0 0 760 312' role='img' aria-label='{_e(title)}'>{''.join(out)}</svg>"


def write_html(path: Path, document: dict[str, Any], records: Sequence[Record], figures: Sequence[str] = ()) -> None:
    """The report of a bench run. figures: SVG elements that lead it. Raises ConfigError when the file cannot be written."""
    arms = document["arms"]
    per_token = [(a["name"], {p: s / max(1, a["tokens"]) * 1e3 for p, s in a["phases"].items()}) for a in arms]
    ratios = [(a["name"], *(a["speedup"][k] for k in ("value", "low", "high"))) for a in arms if a["speedup"]]
    body = [
        *warning(document),
        f"<p>{_e(document['drafter'])} / {_e(document['rule'])}, {_e(document['dtype'])}, temperature {document['temperature']:g}, "
        f"batch {document['batch']}, {document['repeats']} repeats, {len({r.group for r in records})} prompt groups. "
        f"<code>{_e(document['command'])}</code></p>",
        *(f"<figure style='margin:1em 0'>{svg}</figure>" for svg in figures),
        "<h2>Speed-up over plain decoding</h2><p>Ratio of total times on the same prompts; 95% interval over prompts.</p>",
        intervals("speed-up", ratios, "speed-up, 1 = plain decoding", 1.0),
        "<h2>Tokens per second</h2><p>Median over records, and the range of the middle 80%.</p>",
        intervals("tokens per second", [(a["name"], a["median"], a["low"], a["high"]) for a in arms], "tokens per second"),
        "<h2>Where the time goes</h2><p>Milliseconds per emitted token.</p>",
        bars("time per token", per_token, "milliseconds per token"),
        "<h2>Numbers</h2>",
        table(NUMBERS, [_row(a) for a in arms]),
        "<h2>Latency</h2><p>Milliseconds; a percentile is given only where there are enough requests for it.</p>",
        latency_table(arms),
        "<h2>Machine</h2>",
        table(["", ""], [(k, v) for k, v in document["machine"].items()]),
    ]  # fmt: skip
    _write(path, page("Benchmark", body))


def warning(document: dict[str, Any]) -> list[str]:
    """The arms whose texts are not distributed as the target's, if there are any: the first thing that a report says."""
    lossy = {a["name"]: a for a in document["arms"] if a["counts"]["bias"] or not a.get("lossless", True)}
    if not lossy and document.get("lossless", True):
        return []
    said = "; ".join(f"{name}: {spent(a['counts']['bias'], a['tokens'])}" for name, a in lossy.items())
    return [f"<p><strong>LOSSY rule: this text is not distributed as the target's. {_e(said)}</strong></p>"]


def _row(a: dict[str, Any]) -> list[object]:
    length = a["acceptance_length"]
    book = a["ledger"]
    per_step = "" if length is None else f"{length:.2f}"
    word = standing(book["agrees"], a["counts"]["bias"], a["tokens"], lossless=a.get("lossless", True))
    rejections = (f"{book['predicted']:.1f}", book["observed"], word)
    return [a["name"], a["tokens"], f"{a['tokens_per_second']:.1f}", per_step, *rejections, a["failed"], a["loops"]]


def latency_table(arms: Sequence[dict[str, Any]]) -> str:
    """Percentiles of all arms."""
    rows = []
    for a in arms:
        for kind in ("first_token", "per_token", "end_to_end"):
            found = a["latency"].get(kind, {})
            cells = (f"{1e3 * found[p]:.2f}" if p in found else "" for p in ("p50", "p90", "p95", "p99"))
            rows.append([f"{a['name']}: {kind.replace('_', ' ')}", *cells])
    return table(["", "p50", "p90", "p95", "p99"], rows)


def write_experiment(path: Path, document: dict[str, Any], states: Sequence[State], e: Experiment) -> None:
    """The report of an experiment: every look, and the decisions."""
    series = {
        arm: [(float(s.groups), *next(c for c in s.comparisons if c.arm == arm).ratio) for s in states if s.comparisons]
        for arm in e.others
    }
    unit, lossy = METRIC[e.metric], e.lossy
    rows = [
        (
            mark_lossy(c["arm"], lossy),
            c["decision"],
            *(_number(c["speedup"][k]) for k in ("value", "low", "high")),
            "; ".join(c["vetoes"]),
        )
        for c in document["comparisons"]
    ]
    body = [
        f"<p>{document['groups']} of {document['total']} prompt groups; base arm {_e(e.base)}; intervals hold at all looks "
        f"together with probability {1 - e.level:.0%}; smallest effect that matters {e.min_effect:.0%}.</p>",
        table(["arm", "decision", unit, "low", "high", "vetoes"], rows),
        *replay_table(document["comparisons"]),
        f"<h2>As it went</h2><p>The {unit} with its interval after every prompt group. Dashed: no difference, and the "
        "smallest effects that matter.</p>",
        lines(unit, series, "prompt groups", (1.0, 1 / (1 + e.min_effect), 1 + e.min_effect)),
        "<h2>Arms</h2>",
        table(["arm", "options", "exact"], [(n, o, "LOSSY" if n in lossy else "yes") for n, o in e.arms.items()]),
    ]
    _write(path, page(f"Experiment {e.name}", body))


def mark_lossy(arm: str, lossy: Sequence[str]) -> str:
    """The name of an arm, and that its rule is lossy where it is."""
    return f"{arm} (LOSSY)" if arm in lossy else arm


def replay_table(comparisons: Sequence[dict[str, Any]]) -> list[str]:
    """The intervals without the replayed continuations, and what those have saved; nothing where there are none."""
    rows = [
        (c["arm"], *(_number(r["without"][k]) for k in ("value", "low", "high")), _number(r["factor"]), _number(r["gap"]["mean"]))
        for c in comparisons
        if (r := c["reduction"])
    ]  # fmt: skip
    head = ["arm", "without", "low", "high", "groups saved (factor)", "calls per token beyond replay's"]
    title = "<h2>What the common continuations have saved</h2>"
    return [title, table(head, rows)] if rows else []


def _number(x: float | None) -> str:
    return "open" if x is None else f"{x:.3f}"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
