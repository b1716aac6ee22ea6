"""Prompt sets: the shipped ones, JSON lines, or plain text; and how a target takes them, by its chat template if it has one.

A file is read once (`load_rows`), so that it may be a pipe; everything else is made of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from outrider.assets import chat_prompts_file, prompts_file
from outrider.conversations import Conversation, answer_in, conversation_in, has_template, prompt_ids
from outrider.errors import ConfigError
from outrider.files import first_is_object, json_rows, parse_json, read_text

MAX_BYTES = 1 << 28
Written = str | Conversation
"""A prompt as it stands in a file."""


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt as it stands in a file. answer: its completion, if it is given. turns: what the user says next, each when the turn
    before it is answered. fields: of its row; plain text has none."""

    prompt: Written
    answer: str | None = None
    turns: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt for models without a template: of a conversation the contents, one per line."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt.text

    @property
    def talk(self) -> Conversation:
        """The prompt as a conversation: a text is a user's message."""
        return self.prompt if isinstance(self.prompt, Conversation) else Conversation(()).said("user", self.prompt)


@dataclass(frozen=True, slots=True)
class Question:
    """What an answer file says of its question."""

    number: int
    category: str


class Ready(NamedTuple):
    """Prompts as a target takes them: token ids. data: what a report says of them. rows: what they are made of. later: of each,
    what is asked behind its replies; None for one that is asked once."""

    ids: list[list[int]]
    data: dict[str, Any]
    rows: list[Row]
    later: list[Asked | None]


def load_rows(path: Path | None, count: int) -> list[Row]:
    """The first `count` prompts of a set; None: the shipped one. Raises ConfigError with file and line.

    JSONL rows, or the objects of a JSON list, carry `prompt`, or `turns` (Spec-Bench), or `question`, or a conversation:
    `messages`, ShareGPT's `conversations`, a `prompt` of messages, or the `body` of OpenAI's batch files, up to the last message
    that an answer follows; and if you like a `completion`. Where a name has no ending, such as a pipe's, what it holds tells.
    """
    found = _read(prompts_file() if path is None else path)
    if not found:
        raise ConfigError(f"{path}: no prompts found")
    return found[:count]


def load_prompts(path: Path | None, count: int) -> list[Written]:
    """The prompts of `load_rows` alone."""
    return [row.prompt for row in load_rows(path, count)]


def questions_of(rows: Sequence[Row]) -> list[Question]:
    """Number and category of rows in Spec-Bench's format; those of another set are of one category, "overall"."""
    return [
        Question(r.fields.get("question_id", i), str(r.fields.get("category", "overall"))) for i, r in enumerate(rows)
    ]


def ready(engine: Any, path: Path | None, rows: Sequence[Row], template: bool = True, *, whole: bool = False) -> Ready:
    """Prompts for an engine's target: by its chat template, where it has one and `template` says so, else as texts.

    With a template a text is a user's message, and where no file was named (`path` None) the shipped questions take the place of
    the shipped code. whole: all turns of a row are asked, not its first alone. Raises ConfigError for a prompt, or a later turn,
    that the template refuses.
    """
    spoken = template and has_template(engine.tokenizer)
    name = "the shipped code" if path is None else str(path)
    if spoken and path is None:
        name, rows = "the shipped questions", load_rows(chat_prompts_file(), len(rows))
    asked = [Asked(engine, row, spoken, f"{name}, prompt {i}") for i, row in enumerate(rows, 1)]
    data: dict[str, Any] = {"prompts": name, "chat_template": spoken}
    if further := sum(len(row.turns) for row in rows):
        data["later_turns" if whole else "turns_left_out"] = further
    later = [one if whole and one.row.turns else None for one in asked]
    for one in later:
        if one is not None:
            one.check()
    return Ready([one.ids(one.row.talk) for one in asked], data, list(rows), later)


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt of a set for one target, with what is asked behind its replies. spoken: by the chat template. where: it is, for
    messages."""

    engine: Any
    row: Row
    spoken: bool
    where: str

    def ids(self, talk: Conversation) -> list[int]:
        """The tokens of its conversation, so far."""
        if not self.spoken:
            return self.engine.encode(talk.text)
        return prompt_ids(self.engine.tokenizer, talk.messages, self.where)

    def __call__(self, replies: Sequence[Sequence[int]]) -> list[int] | None:
        """The prompt behind the model's own replies (token ids), each up to its first end of text; None behind the last."""
        if len(replies) > len(self.row.turns):
            return None
        ends = [next((i for i, t in enumerate(reply) if t in self.engine.eos), len(reply)) for reply in replies]
        decode = partial(self.engine.tokenizer.decode, skip_special_tokens=True)
        return self._behind([decode(list(reply[:end])) for reply, end in zip(replies, ends, strict=True)])

    def _behind(self, replies: Sequence[str]) -> list[int]:
        talk = self.row.talk
        for reply, turn in zip(replies, self.row.turns, strict=False):
            talk = talk.said("assistant", reply).said("user", turn)
        return self.ids(talk)

    def check(self) -> None:
        """Raise ConfigError for a row whose later turns the template refuses whatever is replied."""
        for turn in range(len(self.row.turns) if self.spoken else 0):
            self._behind(["Yes."] * (turn + 1))


def told(data: Mapping[str, Any]) -> str:
    """What a report says of its prompts, in a clause."""
    said = f"{data['prompts']}, {'by the chat template' if data['chat_template'] else 'as they stand'}"
    if further := data.get("later_turns"):
        said += f", and {further} later {'turn' if further == 1 else 'turns'} behind the model's own replies"
    if left := data.get("turns_left_out"):
        said += f", without {left} later {'turn' if left == 1 else 'turns'}"
    return said


def _read(path: Path) -> list[Row]:
    text = read_text(path, MAX_BYTES)
    whole = None if path.suffix == ".jsonl" else _whole(text)
    if path.suffix not in (".jsonl", ".json") and not (path.suffix == "" and _is_json(text, whole)):
        return [Row(line) for line in text.splitlines() if line.strip()]
    if path.suffix != ".jsonl" and (whole is not None or text.lstrip()[:1] == "["):
        found = parse_json(text, path) if whole is None else whole
        return [
            _row(row, f"{path}: number {i}") for i, row in enumerate([found] if isinstance(found, dict) else found, 1)
        ]
    return [_row(row, where) for where, row in json_rows(text, path)]


def _whole(text: str) -> list[Any] | dict[str, Any] | None:
    """The one list or object that a text is, over however many lines; None for any other text, JSON lines too."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_json(text: str, whole: list[Any] | dict[str, Any] | None) -> bool:
    """Whether a text without a telling name is JSON: it is an object or a list of them, or begins as these or JSON lines do."""
    if whole is not None:
        return isinstance(whole, dict) or not whole or isinstance(whole[0], dict)
    first = next((line.strip() for line in text.split("\n") if line.strip()), "")
    return first == "[" or first.startswith(("[{", "[ {")) or first_is_object(text)


def _row(fields: Any, where: str) -> Row:
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: expected an object with a `prompt`")
    try:
        answer, turns = answer_in(fields), _turns(fields)
        prompt = _prompt(fields, turns)
        row = Row(prompt, answer, turns[1:], fields)
        if row.turns and prompt != turns[0]:
            raise ValueError("its `prompt` is not the first of its `turns`: leave out one of them")
        _check_characters(row)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    return row


def _check_characters(row: Row) -> None:
    """Raise ValueError for half a surrogate pair: a later turn would else be refused in the middle of a run."""
    try:
        "".join((row.text, row.answer or "", *row.turns)).encode()
    except UnicodeEncodeError:
        why = "half a surrogate pair (one of \\ud800 to \\udfff alone), which is no character: leave it out"
        raise ValueError(f"it has {why}") from None


def _turns(fields: dict[str, Any]) -> tuple[str, ...]:
    found = fields.get("turns")
    if not isinstance(found, list) or not found:
        return ()
    if not all(isinstance(turn, str) and turn for turn in found):
        raise ValueError("its `turns` are not all texts, or one is empty")
    return tuple(found)


def _prompt(fields: dict[str, Any], turns: tuple[str, ...]) -> Written:
    body = fields.get("body")
    found = [fields.get("prompt"), *turns[:1], fields.get("question")]
    found += [body.get("prompt")] if isinstance(body, dict) else []
    prompt = next((x for x in found if isinstance(x, str) and x), None)
    if prompt is not None:
        return prompt
    talk = conversation_in(fields)
    if talk is None:
        raise ValueError("no `prompt`, `turns`, `question`, `messages` or `conversations` with text")
    return talk.asked
