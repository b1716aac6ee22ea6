"""Result files of `peers.py run`, `gguf_files.py` and `gguf_rows.py` as one Markdown page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import gguf_arms, rows
from .arms import claims
from .stats import Speeds, arm_row, claim_row, describe_machine, ratio, speeds, table

HEAD = """# Beside other engines

Written by `python benchmarks/peers.py table`; `benchmarks/README.md` says how it is measured. Speeds are new tokens
per second of all sequences together, in a time that includes the prompt. A ratio is the median over rounds of the ratio
within one round, with its 95% bootstrap interval. Where several settings compete, the setting for a round is chosen on
the other rounds.
"""


AFTER = "## What these tables say"
"""New sections go before the one that begins so."""


def write_report(files: Sequence[Path], out: Path | None) -> None:
    """Print the page, or put its sections into `out`: in place of those with the same title, and new ones behind the others."""
    made = sections([json.loads(file.read_text()) for file in files])
    if out is None:
        print("\n".join([HEAD, *made]))
    else:
        out.write_text(merged(out.read_text() if out.exists() else HEAD, made))


def sections(results: Sequence[dict[str, Any]]) -> list[str]:
    """A section a result; one for all that have rows of GGUF files."""
    timed = {result["name"]: result for result in results if result.get("kind") == "rows"}
    made = [section(result) for result in results if "kind" not in result]
    made += [gguf_arms.section(r, timed.get(r["name"])) for r in results if r.get("kind") == "gguf"]
    return made + ([rows.section(list(timed.values()))] if timed else [])


def merged(page: str, made: Sequence[str]) -> str:
    """The page with these sections. What is on it under other titles stays."""
    head, *old = re.split(r"(?m)^(?=## )", page)
    title = lambda text: text.partition("\n")[0]  # noqa: E731
    new = {title(text): text.rstrip() + "\n\n" for text in made}
    kept = [new.pop(title(text), text) for text in old]
    at = next((i for i, text in enumerate(kept) if text.startswith(AFTER)), len(kept))
    return "".join([head.rstrip() + "\n\n", *kept[:at], *new.values(), *kept[at:]]).rstrip() + "\n"


def section(result: dict[str, Any]) -> str:
    """One result file: what ran where, the ratios, the speeds."""
    pair, measured = result["pair"], result["pair"]["measured"]
    workload = result["workload"]
    parts = [
        f"## {pair['name']}, {result['dtype']}\n",
        f"Target {pair['parameters']['target'] / 1e6:.0f}M parameters, draft {pair['parameters']['draft'] / 1e6:.0f}M; "
        f"acceptance {measured['acceptance']:.2f} at temperature 1, {measured['agreement']:.2f} greedy; entropy "
        f"{measured['entropy']:.2f} nats. Prompts of {workload['prompt']} tokens, {workload['tokens']} new tokens, "
        f"{result['rounds']} rounds, {result['date']}.\n",
        f"    {result['command']}\n",
        f"Machine: {describe_machine(result['machine'])}. Versions: {_versions(result)}.\n",
        *_missing(result),
        table(["ratio", "scenario", "median", "95% interval", "goal", "reached", "settings"], _claims(result)) + "\n",
    ]
    head = ["arm", "tokens/s", "10% to 90%", "tokens per target call", "rounds"]
    for scenario, arms in result["samples"].items():
        rows = [arm_row(name, samples) for name, samples in arms.items() if any(samples)]
        if rows:
            parts.append(f"### {scenario}\n\n{table(head, rows)}\n")
    return "\n".join(parts)


def _claims(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for claim in claims(result["dtype"], result["pair"]["recipe"]["acceptance"]):
        for scenario, about in result["scenarios"].items():
            if about["batch"] == claim.batch:
                found = ratio(_of(result, scenario, claim.ours), _of(result, scenario, claim.theirs))
                goal = claim.goal if about["temperature"] == 1 else None
                if found is None and goal is None:
                    continue
                rows.append(claim_row(claim.text, scenario, goal, found))
    return rows


def _of(result: dict[str, Any], scenario: str, kinds: Sequence[tuple[str, str]]) -> Speeds:
    """Speeds of the arms of these (engine, kind) that have at least one sample."""
    return {
        name: speeds(samples)
        for name, samples in result["samples"][scenario].items()
        if tuple(result["arms"][name]) in kinds and any(samples)
    }


def _missing(result: dict[str, Any]) -> list[str]:
    lines = [f"Absent: {worker} ({reason}).\n" for worker, reason in result["absent"].items()]
    return lines + [f"Failed: {worker} ({reason}).\n" for worker, reason in result["failed"].items()]


def _versions(result: dict[str, Any]) -> str:
    found = {name: version for worker in result["workers"].values() for name, version in worker["versions"].items()}
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
