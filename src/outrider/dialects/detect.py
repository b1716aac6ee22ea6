"""Which notation a chat template uses: told from what it renders for a conversation with a call of two made-up names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from outrider.dialects.formats import FORMATS
from outrider.dialects.reader import Thinking

Render = Callable[..., str]
"""(messages, tools=..., add_generation_prompt=..., **kwargs) -> text; raises anything for messages that it refuses."""
_F, _G, _KEY, _VALUE = "probe_f", "probe_g", "probe_key", "probe_value"
TOOL = {
    "type": "function",
    "function": {
        "name": _F,
        "description": "A function.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}, "n": {"type": "integer"}}},
    },
}
_OTHER = {"type": "function", "function": {**TOOL["function"], "name": _G}}
_USER = {"role": "user", "content": "probe_user"}
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought\n", "<channel|>"),
    ("<seed:think>", "</seed:think>"),
)
"""How families mark thinking."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a template can do.

    form: the name of its notation of calls (`FORMATS`), or None. texts: it takes arguments as JSON text and not as an object.
    parallel: it shows two calls of one turn. thinking: how it marks thinking, or None. why: why there is no form.
    """

    form: str | None
    texts: bool = False
    parallel: bool = True
    thinking: tuple[str, str] | None = None
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)

    @staticmethod
    def from_json(found: dict[str, Any]) -> Dialect:
        """From `as_json`."""
        return Dialect(**{**found, "thinking": tuple(found["thinking"]) if found["thinking"] else None})

    def thinks(self, tail: str) -> Thinking | None:
        """The marks of thinking for a reply to a prompt that ends with `tail`."""
        if self.thinking is None:
            return None
        open_, close = self.thinking
        at = tail.rfind(open_)
        return Thinking(open_, close, at >= 0 and not tail[at + len(open_) :].strip())


def detect(render: Render, template: str) -> Dialect:
    """The dialect of a template. template: its source, in which the marks of thinking are looked for."""
    thinking = next((m for m in MARKS if m[1] in template and (m[0] in template or m[0].strip() in template)), None)
    if "<|channel|>analysis" in template and "<|message|>" in template:
        return Dialect("gpt_oss", thinking=None, parallel=False)
    why = "its chat template shows no calls"
    for texts in (False, True):
        try:
            text = render([_USER, _turn(texts, _F), _result(_F)], tools=[TOOL])
        except Exception as error:
            why = f"its chat template refuses calls ({type(error).__name__})"
            continue
        form = _form_of(text)
        if form is not None:
            return Dialect(form, texts, _parallel(render, texts), thinking)
    return Dialect(None, thinking=thinking, why=why)


def _turn(texts: bool, *names: str) -> dict[str, Any]:
    arguments: Any = {_KEY: _VALUE, "n": 7}
    given = json.dumps(arguments) if texts else arguments
    calls = [
        {"id": f"probe0000{i}"[-9:], "type": "function", "function": {"name": name, "arguments": given}}
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _result(name: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"probe0000{number}"[-9:], "name": name, "content": "probe_result"}


def _parallel(render: Render, texts: bool) -> bool:
    try:
        text = render([_USER, _turn(texts, _F, _G), _result(_F), _result(_G, 1)], tools=[TOOL, _OTHER])
    except Exception:
        return False
    return text.count(_VALUE) >= 2 and _G in text[text.find(_VALUE) :]


def _form_of(text: str) -> str | None:
    """The notation of the call that a rendered conversation shows."""
    value = text.find(_VALUE)
    name = text.rfind(_F, 0, value)
    if value < 0 or name < 0:
        return None
    call = text[max(text.find("probe_user"), 0) : value]
    near = text[name : value + 200]
    has = lambda *marks: all(mark in call + near for mark in marks)  # noqa: E731
    if has("<tool_call>"):
        return "qwen3_coder" if has(f"<function={_F}>") else "glm" if has("<arg_key>") else "hermes"
    if has("[TOOL_CALLS]"):
        return "mistral_list" if has('"name"') else "mistral"
    if has("<｜tool▁calls▁begin｜>"):
        return "deepseek_v3" if has("function<｜tool▁sep｜>") else "deepseek_v31"
    if has("<|tool_call>", "call:"):
        return "gemma4"
    if has("<start_function_call>"):
        return "functiongemma"
    if has("<|tool_calls_section_begin|>"):
        return "kimi"
    if has("<minimax:tool_call>"):
        return "minimax"
    for form in ("lfm2", "llama4", "olmo3"):
        if has(FORMATS[form].open):
            return form
    if has("<|tool_call|>"):
        return "phi4" if has("<|/tool_call|>") else "granite"
    if has("functools["):
        return "phi4_text"
    if has('"name"', '"parameters"') and "<|start_header_id|>" in text:
        return "llama3"
    return None
