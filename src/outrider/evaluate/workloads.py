"""Prompt sets: the shipped ones, JSON lines, or plain text; and how a target takes them, by its chat template if it has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from outrider.assets import chat_prompts_file, shipped_prompts
from outrider.conversations import Conversation, conversation_in, has_template, prompt_ids
from outrider.errors import ConfigError
from outrider.files import json_rows, parse_json, read_text

MAX_BYTES = 1 << 28
Written = str | Conversation
"""A prompt as it stands in a file."""


@dataclass(frozen=True, slots=True)
class Question:
    """What an answer file says of its question."""

    number: int
    category: str


class Ready(NamedTuple):
    """Prompts as a target takes them: token ids. data: what a report says of them."""

    ids: list[list[int]]
    data: dict[str, Any]


def load_rows(path: Path | None, count: int) -> list[tuple[Written, dict[str, Any]]]:
    """The first `count` prompts of a set, each with its row (empty for plain text). Raises ConfigError with file and line.

    JSONL rows, or the objects of a JSON list, carry `prompt`, or `turns` (Spec-Bench; the first one), or `question`, or a
    conversation: `messages`, ShareGPT's `conversations`, or the `body` of OpenAI's batch files, up to the last message that an
    answer follows.
    """
    found: list[tuple[Written, dict[str, Any]]] = (
        _read(path) if path is not None else [(prompt, {}) for prompt in shipped_prompts()]
    )
    if not found:
        raise ConfigError(f"{path}: no prompts found")
    return found[:count]


def load_prompts(path: Path | None, count: int) -> list[Written]:
    """The prompts of `load_rows` alone."""
    return [prompt for prompt, _ in load_rows(path, count)]


def load_questions(path: Path | None, count: int) -> list[Question]:
    """Number and category of the first `count` rows of a set in Spec-Bench's format; another set is one category, "overall"."""
    rows = [] if path is None else [row for _, row in load_rows(path, count)]
    known = [Question(r.get("question_id", i), str(r.get("category", "overall"))) for i, r in enumerate(rows)]
    return known or [Question(i, "overall") for i in range(count)]


def plain_texts(prompts: Sequence[Written]) -> list[str]:
    """Prompts for a server that takes texts alone: of conversations the contents, one per line."""
    return [p if isinstance(p, str) else p.text for p in prompts]


def ready(engine: Any, path: Path | None, prompts: Sequence[Written], template: bool = True) -> Ready:
    """Prompts for an engine's target: by its chat template, where it has one and `template` says so, else as texts.

    With a template a text is a user's message, and where no file was named (`path` None) the shipped questions take the place of
    the shipped code. Raises ConfigError for a prompt that the template refuses.
    """
    tokenizer = engine.tokenizer
    spoken = template and has_template(tokenizer)
    name = "the shipped code" if path is None else str(path)
    if spoken and path is None:
        name, prompts = "the shipped questions", load_prompts(chat_prompts_file(), len(prompts))
    ids = [_ids(engine, p, spoken, f"{name}, prompt {i}") for i, p in enumerate(prompts, 1)]
    return Ready(ids, {"prompts": name, "chat_template": spoken})


def _ids(engine: Any, prompt: Written, spoken: bool, where: str) -> list[int]:
    if not spoken:
        return engine.encode(prompt if isinstance(prompt, str) else prompt.text)
    said = prompt.messages if isinstance(prompt, Conversation) else ({"role": "user", "content": prompt},)
    return prompt_ids(engine.tokenizer, said, where)


def told(data: dict[str, Any]) -> str:
    """What a report says of its prompts, in a clause."""
    return f"{data['prompts']}, {'by the chat template' if data['chat_template'] else 'as they stand'}"


def _read(path: Path) -> list[tuple[Written, dict[str, Any]]]:
    text = read_text(path, MAX_BYTES)
    if path.suffix not in (".jsonl", ".json"):
        return [(line, {}) for line in text.splitlines() if line.strip()]
    if path.suffix == ".json" and text.lstrip()[:1] == "[":
        found = parse_json(text, path)
        rows = [(f"{path}: number {i}", row) for i, row in enumerate(found, 1)]
    else:
        rows = list(json_rows(text, path))
    return [(_prompt(row, where), row) for where, row in rows]


def _prompt(row: Any, where: str) -> Written:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object with a `prompt`")
    turns, body = row.get("turns"), row.get("body")
    found = [row.get("prompt"), turns[0] if isinstance(turns, list) and turns else None, row.get("question")]
    found += [body.get("prompt")] if isinstance(body, dict) else []
    prompt = next((x for x in found if isinstance(x, str) and x), None)
    if prompt is not None:
        return prompt
    try:
        talk = conversation_in(row)
        if talk is not None:
            return talk.asked
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    raise ConfigError(f"{where}: no `prompt`, `turns`, `question`, `messages` or `conversations` with text")
