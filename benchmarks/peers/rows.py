"""Results of `gguf_rows.py` as Markdown, and the speed with drafts that these times predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .stats import Ratio, describe_machine, ratio, table

ROWS = (1, 2, 3, 4, 5, 6, 7, 8)
PARTS = ("target", "draft")
PEERS = ("llama.cpp", "llama.cpp, as stored")


def goals(kind: str) -> tuple[float, float, float, float]:
    """The most that one and four rows may take of llama.cpp's time, and v(4) and v(8) with VNNI."""
    v = (1.15, 1.25) if kind == "q8_0" else (1.3, 2.1)
    return (0.85 if kind[:2] in ("q5", "q6") else 1.0), (0.75 if kind[:2] == "q4" else 0.6), *v


def section(results: Sequence[dict[str, Any]]) -> str:
    """One table for all files of a run."""
    first = results[0]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(first["versions"].items()))
    parts = [
        "## Rows of GGUF files\n",
        "The time of a forward of 1 to 8 rows behind 64 cached tokens, ours over llama.cpp's (the better of weights rearranged at "
        "load and as stored, chosen on the other rounds), and v(R), ours: the time of R rows over that of one. Medians over "
        f"rounds, with 95% intervals; {first['threads']} threads, {first['date']}.\n",
        *dict.fromkeys(f"    {r['command']}\n" for r in results),
        f"Machine: {describe_machine(first['machine'])}. Versions: {versions}.\n",
    ]
    head = [
        "file",
        "one row, ms",
        "draft's, ms",
        "of llama.cpp's, 1 row",
        "goal",
        "4 rows",
        "goal",
        "v(4)",
        "goal",
        "v(8)",
        "goal",
    ]
    rows = []
    for r in results:
        one, four, v4, v8 = goals(r["name"].rpartition("-")[2])
        found = [_over_peers(r, 1), _over_peers(r, 4), _growth(r, "ours", 4), _growth(r, "ours", 8)]
        answers = [text for got, most in zip(found, (one, four, v4, v8), strict=True) for text in _within(got, most)]
        rows.append([r["name"], f"{_ms(r, 'ours target 1'):.2f}", f"{_ms(r, 'ours draft 1'):.2f}", *answers])
    parts.append(table(head, rows) + "\n")
    head = ["file", "engine", *(f"v({n})" for n in ROWS[1:]), "rounds"]
    rows = [
        [
            r["name"],
            engine,
            *(f"{_growth(r, engine, n).value:.2f}" for n in ROWS[1:]),
            str(len(_seconds(r, "ours target 1"))),
        ]
        for r in results
        for engine in ("ours", *PEERS)
    ]
    return "\n".join([*parts, table(head, rows) + "\n"])


def predicted(rows: dict[str, Any], length: int, tokens: float) -> float:
    """Speed with drafts of this length over plain decoding: tokens of a step times the time of one row, over the time of
    length + 1 rows and of `length` forwards of the draft."""
    one, more, draft = (_ms(rows, f"ours {key}") for key in ("target 1", f"target {length + 1}", "draft 1"))
    return tokens * one / (more + length * draft)


def flat(rows: dict[str, Any]) -> bool:
    """Whether drafts are expected to pay most beside the peer: v(4) at most 1.2 for us, at least 2 for it."""
    return _growth(rows, "ours", 4).value <= 1.2 and min(_growth(rows, name, 4).value for name in PEERS) >= 2


def _seconds(result: dict[str, Any], key: str) -> np.ndarray:
    return np.array(result["samples"][key], dtype=float)


def _ms(result: dict[str, Any], key: str) -> float:
    return 1e3 * float(np.median(_seconds(result, key)))


def _over_peers(result: dict[str, Any], rows: int) -> Ratio:
    """Our time over theirs."""
    theirs = {name: 1 / _seconds(result, f"{name} target {rows}") for name in PEERS}
    found = ratio(theirs, {"ours": 1 / _seconds(result, f"ours target {rows}")})
    assert found is not None
    return found


def _growth(result: dict[str, Any], engine: str, rows: int) -> Ratio:
    found = ratio(
        {"one": 1 / _seconds(result, f"{engine} target 1")}, {"more": 1 / _seconds(result, f"{engine} target {rows}")}
    )
    assert found is not None
    return found


def _within(found: Ratio, most: float) -> tuple[str, str]:
    """The ratio with its interval; the goal, and whether it is kept: yes or no if the whole interval says so, of several rounds."""
    sure = found.rounds > 1
    answer = "yes" if sure and found.high <= most else "no" if sure and found.low > most else "open"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})", f"{most:g}: {answer}"
