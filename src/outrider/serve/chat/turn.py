"""What a conversation means: the messages that the template gets, the calls that may be made, the grammar, and the reader."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from outrider.automata import Mark, Stages
from outrider.dialects.detect import Dialect
from outrider.dialects.formats import FORMATS, Format
from outrider.dialects.harmony import HarmonyReader
from outrider.dialects.lark import Tool, automatic, required
from outrider.dialects.reader import Reader, Thinking
from outrider.dialects.values import arguments
from outrider.serve.chat.fields import AllowedChoice, ChatRequest, Message, NamedChoice
from outrider.serve.parsing import BadField

KNOWN = ("enable_thinking", "thinking", "reasoning_effort", "preserve_thinking", "clear_thinking")
"""Arguments of templates that are accepted by models whose templates do not read them."""
RESERVED = frozenset({
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "processor_kwargs", "bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token",
    "mask_token", "additional_special_tokens", "self", "load_audio_from_video", "video_load_backend",
})  # fmt: skip
"""Arguments that the server gives."""


@dataclass(frozen=True, slots=True)
class Speech:
    """What the served model can say. dialect: of its template. marks: its added tokens by their text. special: those of them that
    text leaves out. ends: ids that end a text. template: its source."""

    dialect: Dialect
    marks: Mapping[str, int] = field(default_factory=dict)
    special: frozenset[int] = frozenset()
    ends: frozenset[int] = frozenset()
    template: str = ""

    @property
    def form(self) -> Format | None:
        """The notation of its calls."""
        return FORMATS.get(self.dialect.form or "")

    def mark(self, text: str) -> Mark:
        """A mark in its texts."""
        return Mark(text, self.marks.get(text.strip()) if text.strip() == text else None)


@dataclass(frozen=True, slots=True)
class Turn:
    """The turn that a request asks for. tools: those that may be called; empty: none. mode: auto, required or named."""

    speech: Speech
    tools: tuple[Tool, ...]
    mode: str
    parallel: bool
    shown: list[dict[str, Any]] | None  # the tools as the template gets them
    thinking: Thinking | None = None  # known once the prompt is rendered

    @property
    def keep(self) -> tuple[int, ...]:
        """Special tokens that the text must show, for the reader."""
        form, marks = self.speech.form, []
        if form is not None and (self.tools or form.name == "gpt_oss"):
            marks += [form.open, form.close, *form.marks]
        if self.speech.dialect.thinking:
            marks += [m.strip() for m in self.speech.dialect.thinking]
            marks += ["<|channel>"] if "<|channel>" in self.speech.marks else []
        ids = (self.speech.marks.get(m) for m in marks)
        return tuple(dict.fromkeys(t for t in ids if t in self.speech.special and t not in self.speech.ends))

    def at(self, tail: str) -> Turn:
        """The turn behind a prompt that ends with `tail`."""
        return replace(self, thinking=self.speech.dialect.thinks(tail))

    def reader(self) -> Reader | HarmonyReader:
        """A reader for one reply."""
        if self.speech.dialect.form == "gpt_oss":
            return HarmonyReader()
        schemas = {tool.name: tool.schema for tool in self.tools}
        return Reader(self.speech.form if self.tools else None, self.thinking, schemas)

    def grammar(self, wanted: str | None) -> str | None:
        """The grammar of the reply. wanted: of a response format; it holds behind the thinking."""
        if self.tools and wanted is None:
            return self._calls()
        if wanted is None:
            return None
        if self.tools:
            raise BadField("response_format goes with tools only if tool_choice is none", "response_format")
        if self.speech.dialect.form == "gpt_oss":
            final = self.speech.mark("<|message|>")
            return Stages(wanted, replace(final, text="final<|message|>", token=None), final=True).text
        return wanted if self._thoughts() is None else Stages(wanted, None, self._thoughts(), self._opened).text

    @property
    def _opened(self) -> bool:
        return self.thinking is not None and self.thinking.opened

    def _thoughts(self) -> tuple[Mark, Mark] | None:
        if self.thinking is None:
            return None
        marks = self.speech.mark(self.thinking.open), self.speech.mark(self.thinking.close)
        return marks if self._opened or marks[0].token is not None else None

    def _calls(self) -> str:
        form = self.speech.form
        assert form is not None
        mark, thoughts = self.speech.marks.get, self._thoughts()
        if self.mode != "auto":
            rules = required(form, self.tools, mark, self.parallel and self.mode == "required")
            prefix = f"lark:{rules}"
            if form.name == "gpt_oss":
                return Stages(prefix, None, None, final=True).text
            return prefix if thoughts is None else Stages(prefix, None, thoughts, self._opened).text
        rules = automatic(form, self.tools, mark, self.parallel)
        trigger = self.speech.mark(form.open)
        if form.bare:
            trigger = Mark("{", None, start=True)
        if form.name == "gpt_oss":
            trigger = Mark("to=functions.")
        return Stages(f"lark:{rules}", trigger, thoughts, self._opened, form.final or not self.parallel).text


def turn_of(request: ChatRequest, speech: Speech) -> Turn:
    """The turn of a request. Raises BadField for a choice that its tools, or the model, do not have."""
    tools, choice = request.tools or [], request.tool_choice
    names = [tool.function.name for tool in tools]
    if len(set(names)) != len(names):
        raise BadField("two tools have the same name: give each its own", "tools")
    if not tools and choice not in (None, "none", "auto"):
        raise BadField("tool_choice needs tools: send them, or leave it out", "tool_choice")
    mode, allowed = "auto", set(names)
    if isinstance(choice, NamedChoice):
        mode, allowed = "named", {choice.function.name}
    elif isinstance(choice, AllowedChoice):
        mode, allowed = choice.allowed_tools.mode, {tool.function.name for tool in choice.allowed_tools.tools}
    elif choice is not None:
        mode = choice
    unknown = allowed - set(names)
    if unknown:
        raise BadField(f"tool_choice names {min(unknown)!r}, which is not among the tools", "tool_choice")
    if mode == "none" or not tools:
        return Turn(speech, (), "none", False, None)
    if speech.form is None:
        why = speech.dialect.why or "it has no chat template"
        message = f"this model takes no tools: {why}. Leave tools out, or start the server with --tool-format NAME"
        raise BadField(message, "tools")
    made = tuple(Tool(t.function.name, t.function.parameters or {}) for t in tools if t.function.name in allowed)
    for tool in made:
        if tool.parameters.get("type", "object") != "object":
            raise BadField(f"the parameters of {tool.name!r} must be a schema of an object", "tools")
    shown = [{"type": "function", "function": _described(t.function.model_dump(exclude_none=True))} for t in tools]
    parallel = request.parallel_tool_calls is not False and speech.dialect.parallel
    return Turn(speech, made, mode, parallel, shown)


def _described(function: dict[str, Any]) -> dict[str, Any]:
    """A function as templates expect it: with a description and parameters, which some read without asking."""
    function.pop("strict", None)
    function.setdefault("description", "")
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return function


def template_kwargs(request: ChatRequest, speech: Speech) -> dict[str, Any]:
    """The arguments of the template: the client's, and what `reasoning_effort` means. Raises BadField for others' names."""
    given = request.chat_template_kwargs or {}
    for name in given:
        if name in RESERVED or not name.isidentifier() or name.startswith("_"):
            raise BadField(f"chat_template_kwargs may not set {name[:64]!r}: the server does", "chat_template_kwargs")
        if name not in KNOWN and name not in speech.template:
            raise BadField(
                f"the model's chat template does not read {name[:64]!r}: leave it out", "chat_template_kwargs"
            )
    if request.reasoning_effort is None:
        return dict(given)
    thinks = request.reasoning_effort != "none"
    effort = {"reasoning_effort": request.reasoning_effort} if thinks else {}
    return {**effort, "enable_thinking": thinks, "thinking": thinks, **given}


def messages_of(messages: list[Message], speech: Speech) -> list[dict[str, Any]]:
    """The messages as the model's template takes them."""
    dialect = speech.dialect
    calls = any(m.tool_calls for m in messages)
    if calls and dialect.form is None and speech.template:
        raise BadField(f"this model cannot be shown calls: {dialect.why}. Leave them out of messages", "messages")
    out: list[dict[str, Any]] = []
    leading = list(_leading(messages))
    role = "developer" if all(m.role == "developer" for m in leading) and "'developer'" in speech.template else "system"
    if leading:
        out.append({"role": role, "content": "\n\n".join(m.text for m in leading)})
    for message in messages[len(leading) :]:
        out.append(_message(message, dialect))
    return out if dialect.parallel else list(_apart(out))


def _leading(messages: list[Message]) -> Iterator[Message]:
    """The instructions at the beginning: templates take one such message."""
    for message in messages:
        if message.role not in ("system", "developer"):
            return
        yield message


def _message(message: Message, dialect: Dialect) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    out: dict[str, Any] = {"role": role, "content": message.parts}
    if message.name is not None:
        out["name"] = message.name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.thought:
        out |= {"reasoning_content": message.thought, "reasoning": message.thought, "thinking": message.thought}
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call.id or f"call{i:05d}",
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, dialect.texts),
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    return out


def _arguments(text: str | None, as_text: bool) -> Any:
    """The arguments of an earlier call; what is no object becomes an empty one, since an error would end the conversation."""
    found = arguments(text)
    return json.dumps(found, ensure_ascii=False) if as_text else found


def _apart(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Turns of several calls as turns of one call each, every one before its result: for templates that show one call a turn."""
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            yield message
            continue
        results: list[dict[str, Any]] = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(messages[at])
            at += 1
        for i, call in enumerate(calls):
            first = message if i == 0 else {"role": "assistant", "content": ""}
            yield {**first, "tool_calls": [call]}
            yield from (r for r in results if r.get("tool_call_id") == call["id"])
        yield from (r for r in results if all(r.get("tool_call_id") != call["id"] for call in calls))
