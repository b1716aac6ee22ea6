"""Prompt sets: the shipped pair's held-out prompts, JSON lines, or plain text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from outrider.assets import shipped_prompts
from outrider.errors import ConfigError

MAX_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Question:
    """What an answer file says of its question."""

    number: int
    category: str


def load_prompts(path: Path | None, count: int) -> list[str]:
    """The first `count` prompts of a set. Raises ConfigError with file and line for a bad row.

    JSONL rows carry `prompt`, or `turns` (Spec-Bench; the first turn), or `question`, or `messages` (the first user message).
    """
    prompts = shipped_prompts() if path is None else _read(path)
    if not prompts:
        raise ConfigError(f"{path}: no prompts found")
    return prompts[:count]


def load_questions(path: Path | None, count: int) -> list[Question]:
    """Number and category of the first `count` rows of a set in Spec-Bench's format; another set is one category, "overall"."""
    lines = (
        [] if path is None or path.suffix not in (".jsonl", ".json") else path.read_text(encoding="utf-8").splitlines()
    )
    rows = [json.loads(line) for line in lines if line.strip()][:count]
    known = [Question(r.get("question_id", i), str(r.get("category", "overall"))) for i, r in enumerate(rows)]
    return known or [Question(i, "overall") for i in range(count)]


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a JSONL or text file of prompts")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES >> 20} MiB; split it")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if path.suffix not in (".jsonl", ".json"):
        return [line for line in lines if line.strip()]
    return [_prompt(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]


def _prompt(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object with a `prompt`")
    turns = row.get("turns")
    messages = row.get("messages")
    user = (
        [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
        if isinstance(messages, list)
        else []
    )
    found = [row.get("prompt"), turns[0] if isinstance(turns, list) and turns else None, row.get("question"), *user]
    prompt = next((x for x in found if isinstance(x, str) and x), None)
    if prompt is None:
        raise ConfigError(f"{where}: no `prompt`, `turns`, `question` or `messages` with text")
    return prompt
