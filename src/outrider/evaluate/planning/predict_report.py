"""From logs, costs and full distributions to the document of `outrider predict`, and the comparison with a run's own counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outrider.errors import ConfigError
from outrider.evaluate.scoring.costs import Costs
from outrider.evaluate.scoring.score import VERIFICATION, Scored
from outrider.files import parse_json, read_text
from outrider.theory import forecast as fc
from outrider.theory.replay import Drafting, Text, Verification

RUN_BYTES = 1 << 28
"""Largest file of a run that is read."""

BUDGETS = (0.01, 0.02, 0.05, 0.1)
"""Bias budgets, in total variation per token, at which the lossy front is reported."""
DRAFTS = (2, 4)
"""Numbers of independent drafts whose first position is reported."""


def report(texts: Sequence[Text], costs: Costs | None, rows: Scored | None = None) -> dict[str, Any]:
    """Everything the logs say. `costs` None: no speed-ups. `rows`: full distributions, for the questions about several drafts."""
    cost = {} if costs is None else {"draft_cost": costs.draft, "verify_cost": costs.verify}
    lengths = fc.LENGTHS if costs is None else [n for n in fc.LENGTHS if n < len(costs.verify)]
    ways: dict[str, Any] = {"sampled": fc.forecast(texts, lengths=lengths, **cost)}
    if all(t.hit is not None for t in texts):
        ways["greedy"] = fc.forecast(texts, "greedy", lengths=lengths, **cost)
    ways["block"] = fc.forecast(texts, "sampled", "block", lengths=lengths, **cost)
    # a block is judged as a whole: a rejection probability per judged draft is not a number of this rule
    ways["block"] = {**asdict(ways["block"]), "acceptance": None, "rejections": None}
    for row in ways["block"]["lengths"]:
        row["rejections"] = row["rejection"] = None
    base: fc.Forecast = ways["sampled"]
    return {
        "predicted": True,
        "texts": base.texts,
        "prompts": base.prompts,
        "tokens": base.tokens,
        "drafting": {name: f if isinstance(f, dict) else asdict(f) for name, f in ways.items()},
        "block_gain": {
            row.length: _gain(b, row) for row, b in zip(base.lengths, ways["block"]["lengths"], strict=True)
        },
        "domains": {name: asdict(e) for name, e in fc.by_domain(texts).items()},
        "positions": [asdict(e) for e in fc.by_position(texts)],
        "lossy": [lossy(texts, budget) for budget in BUDGETS] if all(t.tv is not None for t in texts) else None,
        "multi_draft": None if rows is None or not len(rows.target_rows) else multi_draft(rows),
        "costs": None if costs is None else asdict(costs),
    }


def _gain(block: dict[str, Any], token: fc.AtLength) -> float:
    """Tokens per call with block verification over token verification, at one length."""
    return block["acceptance_length"]["value"] / token.acceptance_length.value


def lossy(texts: Sequence[Text], budget: float) -> dict[str, Any]:
    """Least rejection probability of any rule with at most `budget` bias per token (Yin et al., NeurIPS 2024, Theorem 5).

    Exact per position: (TV - budget)_+. That the positions are the target's own is an approximation: a lossy rule emits
    text of a slightly different distribution.
    """
    losses = [float(np.maximum(np.asarray(t.tv) - budget, 0.0).sum()) for t in texts]
    return {
        "budget": budget,
        "rejection": asdict(fc.clustered_ratio(losses, [len(t) for t in texts], [t.prompt for t in texts])),
    }


def multi_draft(rows: Scored) -> dict[str, Any]:
    """Acceptance at the first position when several independent drafts compete for it: exact per pair of distributions,
    averaged over positions.

    The interval is over positions taken by chance from all texts (a normal one; positions of one prompt are not independent,
    so it describes this set of texts).
    """
    from outrider.theory import multidraft, transport

    p, q = rows.target_rows, rows.draft_rows
    out: dict[str, Any] = {"laws": len(p), "one_draft": _mean(np.minimum(p, q).sum(1))}
    for k in DRAFTS:
        out[str(k)] = {
            "recursive_rejection": _mean(multidraft.recursive(p, q, k).acceptance),
            "k_seq": _mean(multidraft.kseq(p, q, k).acceptance),
            "optimal_transport": _mean(transport.optimal_iid(p, q, k).acceptance),
        }
    return out


def _mean(values: np.ndarray) -> dict[str, float]:
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    mean = float(values.mean())
    return asdict(fc.Estimate(mean, mean - 1.96 * error, mean + 1.96 * error))


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """What a run's JSON says of one configuration: the numbers a prediction is checked against."""

    name: str
    length: int
    rejected: float
    emitted: float
    steps: float
    prompts: int
    temperature: float | None
    rule: str | None


def read_runs(path: Path, length: int | None = None) -> list[RecordedRun]:
    """The speculative arms in the JSON of `outrider bench --out` (or --json), `demo --json` or `generate --json`.

    length: draft length of a document that does not name it (`generate`). Raises ConfigError for anything else.
    """
    document = parse_json(read_text(path, RUN_BYTES), path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected one JSON object, as bench --out or demo --json write")
    arms = document.get("arms", [document])
    runs = [_run(arm, document, path, length) for arm in arms if _counts(arm, path)["proposed"]]
    if not runs:
        raise ConfigError(f"{path}: no run in it proposed a draft: there is nothing to compare")
    return runs


def _counts(arm: Any, path: Path) -> dict[str, Any]:
    counts = arm.get("counts") if isinstance(arm, dict) else None
    wanted = ("proposed", "rejected", "emitted", "steps")
    if not isinstance(counts, dict) or not all(isinstance(counts.get(k), int | float) for k in wanted):
        raise ConfigError(
            f"{path}: no counts in it; give the file that bench --out, demo --json or generate --json wrote"
        )
    return counts


def _run(arm: dict[str, Any], document: dict[str, Any], path: Path, length: int | None) -> RecordedRun:
    counts, name = _counts(arm, path), str(arm.get("name", "run"))
    word = name.rpartition(" ")[2]
    known = int(word) if name.startswith("length ") and word.isdigit() else document.get("length", length)
    if not isinstance(known, int) or known < 1:
        raise ConfigError(f"{path}: it does not say the draft length: add --length")
    groups = {r.get("group") for r in document.get("records", []) if r.get("arm") == name}
    prompts = len(groups) * int(document.get("batch", 1)) or int(document.get("greedy", {}).get("prompts", 0))
    if not prompts:  # no records: texts of full length, each repeated
        most = document.get("max_tokens") or counts["emitted"]
        prompts = max(1, round(counts["emitted"] / most / int(document.get("repeats", 1))))
    rule, temperature = document.get("rule"), document.get("temperature")
    return RecordedRun(name, known, counts["rejected"], counts["emitted"], counts["steps"], prompts, temperature, rule)


VERIFICATIONS: dict[str | None, Verification] = {None: "token", **VERIFICATION}
"""Rules whose runs can be predicted from logs, and how they judge a draft; None: a document that names no rule."""


def check(
    texts: Sequence[Text],
    runs: Sequence[RecordedRun],
    temperature: float | None,
    drafting: Drafting,
    same_prompts: bool = False,
) -> list[dict[str, Any]]:
    """Predicted beside observed rejections of each run.

    Raises ConfigError when they cannot be compared: another temperature, another rule, logs of a single prompt.
    """
    out = []
    for run in runs:
        if temperature is not None and run.temperature is not None and run.temperature != temperature:
            raise ConfigError(
                f"the run was at temperature {run.temperature:g} and the prediction at {temperature:g}: "
                f"predict with --temperature {run.temperature:g}"
            )
        if run.rule not in VERIFICATIONS:
            raise ConfigError(f"the run used rule {run.rule!r} and the prediction is of speculative_sampling or block")
        try:
            c = fc.compare(
                texts,
                run.length,
                run.rejected,
                run.emitted,
                run.prompts,
                drafting,
                verification=VERIFICATIONS[run.rule],
                same_prompts=same_prompts,
            )
        except ValueError as error:
            raise ConfigError(f"nothing to compare with: {error}") from None
        out.append({"run": run.name, "length": run.length, **asdict(c), "agrees": c.agrees})
    return out
