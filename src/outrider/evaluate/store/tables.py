"""A run as a table: one row per record, nested names joined by dots, lists as JSON text. Written as Parquet, CSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError
from outrider.evaluate.store.store import Store

FORMATS = ("jsonl", "csv", "parquet")
KEYS = ("run", "kind", "name", "task", "item", "sample")
Cell = str | int | float | bool | None


def table(store: Store, run: str) -> list[dict[str, Cell]]:
    """[records] rows of a run in the order of their keys; all rows have the same columns, KEYS first, None where one has no value.

    Columns behind KEYS are the fields of the record: `counts.accepted` is `data["counts"]["accepted"]`.
    """
    with store.db.snapshot():
        found = store.run(run)
        records = store.records(found.id)
    rows: list[dict[str, Cell]] = []
    for key, data in records.items():
        head = dict(zip(KEYS, (found.id, found.kind, found.name, *key), strict=True))
        rows.append({**head, **flat(data)})
    columns = [*KEYS, *sorted({c for row in rows for c in row} - set(KEYS))]
    return [{c: row.get(c) for c in columns} for row in rows]


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Cell]:
    """One level of names for nested objects; lists become JSON text."""
    out: dict[str, Cell] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            out[prefix + name] = json.dumps(value, separators=(",", ":"))
        else:
            out[prefix + name] = value
    return out


def format_of(path: Path | None, wanted: str | None) -> str:
    """The format asked for, or the one the file's name says; JSON lines if nothing does. Raises ConfigError."""
    name = wanted or (path.suffix.lstrip(".").lower() if path is not None and path.suffix else "jsonl")
    if name not in FORMATS:
        raise ConfigError(f"runs are exported as {', '.join(FORMATS)}, not {name!r}: say --format")
    return name


def as_csv(rows: Sequence[Mapping[str, Cell]]) -> bytes:
    """RFC 4180 with a header; empty for None."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else list(KEYS))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: Sequence[Mapping[str, Cell]]) -> bytes:
    """One row group, zstd. Raises ConfigError without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'outrider[parquet]'") from None
    names = list(rows[0]) if rows else list(KEYS)
    columns = {n: [row[n] for row in rows] for n in names}
    mixed = {n for n, v in columns.items() if {type(x) for x in v if x is not None} == {int, float}}
    for n in mixed:  # 0 and 0.5 in one column
        columns[n] = [None if x is None else float(x) for x in columns[n]]  # type: ignore[arg-type]
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, compression="zstd")
    return out.getvalue()
