"""Spec-Bench's own numbers from our records: its answer files, and what its `evaluation/speed.py` computes from them.

Xia et al., "Unlocking Efficiency in Large Language Model Inference" (2024), repository hemingkx/Spec-Bench. Its speed-up is a ratio
of means over questions (each question weighs the same, however long), the tokens of the method are counted as they come, those of
the baseline by tokenising its text again and taking one off, and there is no interval. Here its numbers stand beside ours, which
are ratios of sums with an interval over prompts. All turns of a question are run, each behind the arm's own replies; writing the
prompt of a turn is no part of its time there, and none here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outrider.errors import ConfigError
from outrider.evaluate.records import Record
from outrider.evaluate.workloads import Question
from outrider.records import Counts

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
TASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag", "overall")


def answers(
    records: Sequence[Record], questions: Sequence[Question], decode: Callable[[Sequence[int]], str], model: str
) -> list[dict[str, Any]]:
    """Rows of an answer file: one per record of one arm with batch 1, in its format. A failed request has no row."""
    rows = []
    for r in sorted(records, key=lambda r: (r.repeat, r.group)):
        if r.failed:
            continue
        if len(r.outputs) != 1 and not r.asked:
            raise ConfigError("Spec-Bench runs one question at a time: use --batch 1")
        q = questions[r.group]
        choice = {
            "index": 0,
            "turns": [decode(text) for text in r.outputs],
            "decoding_steps": [t.steps for t in r.timings] if r.asked else [r.counts.steps],
            "new_tokens": [len(text) for text in r.outputs] if r.asked else [r.tokens],
            "wall_time": [t.end for t in r.timings] if r.asked else [r.seconds],
            "accept_lengths": accept_lengths(r.counts),
        }
        rows.append(
            {
                "question_id": q.number,
                "category": q.category,
                "answer_id": f"{r.arm}-{r.group}-{r.repeat}",
                "model_id": model,
                "choices": [choice],
                "tstamp": 0.0,
            }
        )
    return rows


def accept_lengths(counts: Counts) -> list[int]:
    """Tokens emitted by each step, the bonus included, longest last: the counts say how many steps kept how many drafts."""
    kept = [counts.steps, *counts.accepted_at, 0]
    return [d + 1 for d in range(len(kept) - 1) for _ in range(kept[d] - kept[d + 1])]


@dataclass(frozen=True, slots=True)
class SpecBenchSpeed:
    """One task as Spec-Bench prints it."""

    task: str
    questions: int
    mean_accepted_tokens: float
    tokens_per_second: float
    baseline_tokens_per_second: float
    speedup: float


def speed(
    rows: Sequence[dict[str, Any]],
    base: Sequence[dict[str, Any]],
    count_tokens: Callable[[str], int],
    task: str = "overall",
) -> SpecBenchSpeed | None:
    """What `speed.py` computes for a task; None where no question has it. count_tokens: of a text, special tokens included."""

    def of_task(row: dict[str, Any]) -> bool:
        category = row["category"]
        return task == "overall" or (category in MT_BENCH if task == "mt_bench" else category == task)

    mine, theirs = [r for r in rows if of_task(r)], [r for r in base if of_task(r)]
    if not mine or not theirs:
        return None
    lengths, speeds, base_speeds = [], [], []
    for row in mine:
        choice = row["choices"][0]
        lengths += choice["accept_lengths"]
        speeds.append(sum(choice["new_tokens"]) / sum(choice["wall_time"]))
    for row in theirs:
        choice = row["choices"][0]
        base_speeds.append(sum(count_tokens(text) - 1 for text in choice["turns"]) / sum(choice["wall_time"]))
    now, before = float(np.mean(speeds)), float(np.mean(base_speeds))
    return SpecBenchSpeed(
        task, len(mine), float(np.mean(lengths)), now, before, now / before if before > 0 else float("nan")
    )


def report(
    records: Sequence[Record],
    base: str,
    questions: Sequence[Question],
    decode: Callable[[Sequence[int]], str],
    count_tokens: Callable[[str], int],
) -> dict[str, list[SpecBenchSpeed]]:
    """Per arm but the base, every task that has questions."""
    files = {a: answers([r for r in records if r.arm == a], questions, decode, a) for a in {r.arm for r in records}}
    names = [a for a in dict.fromkeys(r.arm for r in records) if a != base]
    return {a: [s for t in TASKS if (s := speed(files[a], files[base], count_tokens, t))] for a in sorted(names)}
