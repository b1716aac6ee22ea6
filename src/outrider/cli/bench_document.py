"""The JSON document of `outrider bench`: its arms with raw counts, its charts, and other harnesses' numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from outrider.cli import terminal


def to_document(
    summaries: list[Any], engine: Any, params: Any, batch: int, repeats: int, price: float | None = None
) -> dict[str, Any]:
    """One JSON document: the arms with raw counts, ratios, ledger and the speed-up that counts and clock predict.

    price: per hour; cost per million emitted tokens is price / 3600 / (tokens per second) * 1e6.
    """
    import sys

    from outrider.display import kind_of
    from outrider.evaluate.measure import energy_absent, machine, peak_memory
    from outrider.evaluate.records import as_json
    from outrider.telemetry.ledger import predicted_speedup, summary

    base = summaries[0]
    arms = []
    for s in summaries:
        predicted = predicted_speedup(s.counts, s.phases, base.counts, base.phases) if s.phases else None
        cost = None if price is None or not s.tokens_per_second else price / 3600 / s.tokens_per_second * 1e6
        energy = None if s.joules is None or not s.tokens else s.joules / s.tokens
        more = {"predicted_speedup": predicted, "cost_per_million_tokens": cost, "joules_per_token": energy}
        arms.append({**as_json(s), **summary(s.counts), **more})
    return {
        "command": "outrider " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "drafter": engine.parts.drafter.name,
        "rule": engine.parts.rule.name,
        "lossless": engine.parts.rule.lossless,
        "dtype": kind_of(engine.parts.target),
        "temperature": params.temperature,
        "max_tokens": params.max_tokens,
        "top_p": params.top_p,
        "batch": batch,
        "repeats": repeats,
        "price_per_hour": price,
        "peak_memory_bytes": peak_memory(),
        "energy_absent": energy_absent(),
        "arms": arms,
    }


def name_parts(document: dict[str, Any], arms: list[Any]) -> None:
    """Rows in the order of the arms, each with its drafter and rule."""
    parts = {a.name: a.engine.parts for a in arms}
    document["arms"].sort(key=lambda row: list(parts).index(row["name"]))
    for row in document["arms"]:
        mine = parts[row["name"]]
        row |= {
            "drafter": mine.drafter.name,
            "rule": mine.rule.name,
            "lossless": mine.rule.lossless or not mine.drafter.max_nodes,
        }


def draw_charts(
    document: dict[str, Any],
    records: list[Any],
    engine: Any,
    arms: list[Any],
    specs: Any,
    machine: Any,
    folder: Path,
) -> list[Path]:
    """The measured and the predicted chart of a preset, as files and in the document."""
    from outrider.evaluate.bench import chart

    rows = chart.measured(specs, records)
    bars = chart.predicted(specs, records, chart.shares_of(engine, arms, specs), machine)
    files = chart.save(rows, bars, document, machine, folder)
    document["chart"] = {**chart.to_json(rows, bars, machine), "files": [str(f) for f in files]}
    return files


def spec_bench(
    records: list[Any], engine: Any, rows: list[Any], folder: Path | None
) -> dict[str, list[dict[str, Any]]]:
    """Spec-Bench's numbers for every arm but plain decoding, and its answer files if a folder is given. rows: of the prompts."""
    import json
    from dataclasses import asdict

    from outrider.evaluate.bench import spec_bench as sb
    from outrider.evaluate.workloads import questions_of
    from outrider.files import write_whole

    questions = questions_of(rows)
    decode = lambda ids: engine.tokenizer.decode(list(ids))  # noqa: E731
    if folder is not None:
        for arm in dict.fromkeys(r.arm for r in records):
            rows = sb.answers([r for r in records if r.arm == arm], questions, decode, arm)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_whole(folder / f"{arm.replace(' ', '-')}.jsonl", text.encode())
    found = sb.report(records, "plain", questions, decode, lambda text: len(engine.encode(text)))
    return {arm: [asdict(s) for s in rows] for arm, rows in found.items()}


def write_document(path: Path, document: dict[str, Any], records: list[Any]) -> None:
    """The document with one raw record per (group, arm, repeat)."""
    import json
    from dataclasses import asdict

    raw = [{**asdict(r), "outputs": [], "asked": []} for r in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(terminal.clean({**document, "records": raw}), indent=1), encoding="utf-8")
