"""The notations of tool calls: one row each, by which a reader finds the calls in a text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from outrider.dialects.values import Bare, typed

Arguments = dict[str, Any]
Body = Callable[[str, Mapping[str, Any]], Arguments]
"""The arguments of a call from its raw text and the schemas of its parameters."""
_NAME = r'"name"\s*:\s*"(?P<name>(?:[^"\\]|\\.)+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*'


@dataclass(frozen=True, slots=True)
class Format:
    """A notation of calls.

    open: what begins a region of calls. head: from there (or from the last call of the region) to a call's arguments. after: from
    the arguments' end to the region's end; its group `more` tells that another call follows. close: what ends the region, if it
    ends with a fixed text. until: None if arguments are a JSON value, otherwise what ends their raw text, which `body` reads.
    many: the body is a whole list of calls (`python_calls`). bare: a call may also begin the text without `open`. final: nothing
    follows the calls of a reply. parallel: the family's templates can show several calls of one turn. marks: other texts of
    the notation that may be tokens of their own. nine: ids have nine letters or digits.
    """

    name: str
    open: str
    head: re.Pattern[str]
    after: re.Pattern[str]
    close: str = ""
    until: str | None = None
    body: Body | None = None
    many: bool = False
    bare: bool = False
    final: bool = False
    parallel: bool = True
    marks: tuple[str, ...] = ()
    nine: bool = False


def _tagged(pattern: str) -> Body:
    """Arguments written as tagged raw texts, typed by their schemas."""
    find = re.compile(pattern, re.DOTALL)

    def body(text: str, schemas: Mapping[str, Any]) -> Arguments:
        return {m["key"].strip(): typed(m["value"], schemas.get(m["key"].strip())) for m in find.finditer(text)}

    return body


def _bare(quote: str) -> Body:
    return lambda text, schemas: Bare(text, quote).read()


def _json_list(name: str, open_: str, close: str = "", **more: Any) -> Format:
    head = re.compile(r"\s*\[?\s*\{\s*" + _NAME)
    end = r"\s*" + re.escape(close) if close else ""
    after = re.compile(r'(?:\s*,\s*"id"\s*:\s*"[^"]*")?\s*\}\s*(?:(?P<more>,)|\]' + end + ")")
    return Format(name, open_, head, after, close, final=not close, **more)


def _python(name: str, open_: str, close: str) -> Format:
    return Format(name, open_, re.compile(""), re.compile(""), close, until=close, many=True)


_CALLS, _CALL = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_SEP = "<｜tool▁sep｜>"
_SECTION = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_KIMI = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")

FORMATS: dict[str, Format] = {f.name: f for f in (
    Format("hermes", "<tool_call>", re.compile(r"\s*\{\s*" + _NAME), re.compile(r"\s*\}?\s*</tool_call>"), "</tool_call>"),
    Format(
        "qwen3_coder", "<tool_call>", re.compile(r"\s*<function=(?P<name>[^>\n]+)>"), re.compile(r"\s*</tool_call>"),
        "</tool_call>", until="</function>",
        body=_tagged(r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"),
    ),
    Format(
        "glm", "<tool_call>", re.compile(r"\s*(?P<name>[^\s<{][^\n<{]*)(?:\n\s*)?(?=<arg_key>|</tool_call>)"), re.compile(""),
        "</tool_call>", until="</tool_call>",
        body=_tagged(r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"),
        marks=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    Format(
        "llama3", "<|python_tag|>", re.compile(r"\s*\{\s*(?:\"type\"\s*:\s*\"function\"\s*,\s*)?" + _NAME),
        re.compile(r"\s*\}(?P<more>\s*;\s*(?=\{))?"), bare=True, final=True, parallel=False,
    ),
    Format(
        "mistral", "[TOOL_CALLS]",
        re.compile(r"\s*(?P<name>[^\[{\s]+)(?:\[CALL_ID\](?P<id>[^\[{\s]+))?(?:\[ARGS\])?\s*(?=\{)"), re.compile(""),
        marks=("[CALL_ID]", "[ARGS]"), nine=True,
    ),
    _json_list("mistral_list", "[TOOL_CALLS]", nine=True),
    _json_list("granite", "<|tool_call|>"),
    _json_list("phi4", "<|tool_call|>", "<|/tool_call|>"),
    _json_list("phi4_text", "functools"),
    Format(
        "gemma4", "<|tool_call>", re.compile(r"\s*call:(?P<name>[^{]+)(?=\{)"), re.compile(""), "<tool_call|>",
        until="<tool_call|>", body=_bare('<|"|>'), marks=('<|"|>',),
    ),
    Format(
        "functiongemma", "<start_function_call>", re.compile(r"\s*call:(?P<name>[^{]+)(?=\{)"), re.compile(""),
        "<end_function_call>", until="<end_function_call>", body=_bare("<escape>"), marks=("<escape>",),
    ),
    Format(
        "deepseek_v3", _CALLS[0], re.compile(rf"\s*{_CALL[0]}function{_SEP}(?P<name>[^\n]+)\n```json\n"),
        re.compile(rf"\s*(?:```)?\s*{_CALL[1]}\s*(?:(?P<more>(?={_CALL[0]}))|{_CALLS[1]})"), _CALLS[1],
        marks=(*_CALL, _SEP), final=True,
    ),
    Format(
        "deepseek_v31", _CALLS[0], re.compile(rf"\s*{_CALL[0]}(?P<name>[^<\n]+){_SEP}"),
        re.compile(rf"\s*{_CALL[1]}\s*(?:(?P<more>(?={_CALL[0]}))|{_CALLS[1]})"), _CALLS[1],
        marks=(*_CALL, _SEP), final=True,
    ),
    Format(
        "kimi", _SECTION[0],
        re.compile(rf"\s*{re.escape(_KIMI[0])}\s*(?P<id>functions\.(?P<name>[^:<]+):\d+)\s*{re.escape(_KIMI[1])}\s*"),
        re.compile(rf"\s*{re.escape(_KIMI[2])}\s*(?:(?P<more>(?={re.escape(_KIMI[0])}))|{re.escape(_SECTION[1])})"),
        _SECTION[1], marks=_KIMI, final=True,
    ),
    _python("lfm2", "<|tool_call_start|>", "<|tool_call_end|>"),
    _python("llama4", "<|python_start|>", "<|python_end|>"),
    _python("olmo3", "<function_calls>", "</function_calls>"),
    Format(
        "minimax", "<minimax:tool_call>", re.compile(r'\s*<invoke name="(?P<name>[^"]+)">'),
        re.compile(r"\s*(?:(?P<more>(?=<invoke))|</minimax:tool_call>)"), "</minimax:tool_call>", until="</invoke>",
        body=_tagged(r'<parameter name="(?P<key>[^"]+)">\n?(?P<value>.*?)\n?</parameter>'),
    ),
    Format(
        "gpt_oss", "<|channel|>", re.compile(""), re.compile(""), "<|call|>", final=True, parallel=False,
        marks=("<|start|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"),
    ),
)}  # fmt: skip
"""Every notation by its name. `gpt_oss` has a reader of its own (`harmony`)."""
