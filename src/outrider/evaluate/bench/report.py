"""The page of a bench run: speed-ups with intervals, where the time goes, acceptance, latency and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outrider.evaluate.html import bars, escaped, intervals, page, table, write_page
from outrider.evaluate.records import Record
from outrider.evaluate.workloads import told
from outrider.telemetry.ledger import spent, standing

NUMBERS = (
    "arm", "tokens", "tokens/s", "tokens per step", "rejections predicted", "observed", "the ledger", "failed", "loops",
)  # fmt: skip


def write_html(path: Path, document: dict[str, Any], records: Sequence[Record], figures: Sequence[str] = ()) -> None:
    """The report of a bench run. figures: SVG elements that lead it. Raises ConfigError when the file cannot be written."""
    arms, repeats, groups = document["arms"], document["repeats"], len({r.group for r in records})
    per_token = [(a["name"], {p: s / max(1, a["tokens"]) * 1e3 for p, s in a["phases"].items()}) for a in arms]
    ratios = [(a["name"], *(a["speedup"][k] for k in ("value", "low", "high"))) for a in arms if a["speedup"]]
    body = [
        *warning(document),
        f"<p>{escaped(document['drafter'])} / {escaped(document['rule'])}, {escaped(document['dtype'])}, "
        f"temperature {document['temperature']:g}, "
        f"batch {document['batch']}, {repeats} repeat{'s' * (repeats != 1)}, {groups} prompt group{'s' * (groups != 1)}. "
        f"<code>{escaped(document['command'])}</code></p>",
        *([f"<p>Prompts: {escaped(told(document['data']))}.</p>"] if "data" in document else []),
        *unfinished(records),
        *(f"<figure style='margin:1em 0'>{svg}</figure>" for svg in figures),
        "<h2>Speed-up over plain decoding</h2><p>Ratio of total times on the same prompts; 95% interval over prompts.</p>",
        intervals("speed-up", ratios, "speed-up, 1 = plain decoding", 1.0),
        *over_others(arms),
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
    write_page(path, page("Benchmark", body))


def over_others(arms: Sequence[dict[str, Any]]) -> list[str]:
    """Every arm over other arms than the base, a plot for each of those."""
    out = []
    for other in dict.fromkeys(name for a in arms for name in a.get("against", {})):
        found = [(a["name"], a["against"][other]) for a in arms if other in a.get("against", {})]
        ratios = [(name, *(r[k] for k in ("value", "low", "high"))) for name, r in found]
        out += [
            f"<h2>Speed over {escaped(other)}</h2><p>The same ratio with this arm as the base.</p>",
            intervals(f"speed over {other}", ratios, f"speed, 1 = {other}", 1.0),
        ]
    return out


def unfinished(records: Sequence[Record]) -> list[str]:
    """How many conversations were not asked to their end, if there are any."""
    count = sum(r.shortened for r in records)
    return (
        [f"<p>Conversations that ended before their last turn, which did not fit or was refused: {count}.</p>"]
        if count
        else []
    )


def warning(document: dict[str, Any]) -> list[str]:
    """The arms whose texts are not distributed as the target's, if there are any: the first thing that a report says."""
    lossy = {a["name"]: a for a in document["arms"] if a["counts"]["bias"] or not a.get("lossless", True)}
    if not lossy and document.get("lossless", True):
        return []
    said = "; ".join(f"{name}: {spent(a['counts']['bias'], a['tokens'])}" for name, a in lossy.items())
    return [f"<p><strong>LOSSY rule: this text is not distributed as the target's. {escaped(said)}</strong></p>"]


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
