"""Grammars of calls for llguidance, in its dialect of Lark: what may follow the mark that opens a region of calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.dialects.formats import FORMATS, Format
from outrider.dialects.values import types_of
from outrider.errors import RequestError
from outrider.schemas import without_looking_around

MAX_SCHEMAS = 4_000_000
"""Most characters of JSON schemas in one grammar: notations that write each parameter apart repeat the definitions beside it."""
COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": True}
"""JSON of a call: one line, as models write it. Keywords of schemas that the library does not know are not enforced."""
FREE = "/(?s:.*)/"
Mark = Callable[[str], int | None]
"""The token that a mark is, or None if it is written as ordinary text."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called. parameters: the JSON schema of its arguments (an object)."""

    name: str
    parameters: Mapping[str, Any]

    @property
    def properties(self) -> dict[str, Any]:
        """Its parameters' schemas."""
        found = self.parameters.get("properties")
        return dict(found) if isinstance(found, dict) else {}

    def needs(self, name: str) -> bool:
        """Whether a parameter is required."""
        required = self.parameters.get("required")
        return isinstance(required, list) and name in required

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of its arguments, closed: no parameters beside those that it names, unless it says so."""
        schema = {"type": "object", **self.parameters}
        if schema["type"] is None:
            schema["type"] = "object"
        if "properties" in schema or len(schema) == 1:
            schema.setdefault("additionalProperties", False)
        return schema


@dataclass(slots=True)
class Writer:
    """Collects the rules of one grammar. mark: tells which marks are tokens."""

    mark: Mark
    rules: list[str] = field(default_factory=list)
    _schemas: int = 0

    def rule(self, body: str, lazy: bool = False) -> str:
        """A new rule; returns its name."""
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def text(self, text: str) -> str:
        """A text, as a literal."""
        return json.dumps(text, ensure_ascii=False) if text else ""

    def spelled(self, text: str, marks: Sequence[str]) -> str:
        """A text in which `marks` are tokens if the tokenizer has them."""
        out, rest = [], text
        while rest:
            found = [(rest.find(m), -len(m), m) for m in marks if m in rest and self.mark(m) is not None]
            if not found:
                out.append(self.text(rest))
                break
            at, _, mark = min(found)
            out += [self.text(rest[:at]), f"<[{self.mark(mark)}]>"]
            rest = rest[at + len(mark) :]
        return " ".join(part for part in out if part)

    def until(self, end: str, mark: str) -> str:
        """Any text and then `end`, which begins with `mark` or is ordinary text."""
        if self.mark(mark) is not None and end.startswith(mark):
            return f"{FREE} {self.spelled(end, [mark])}"
        pattern = "".join("\\" + c if c in r"\.^$|?*+()[]{}/" else "\\n" if c == "\n" else c for c in end)
        return self.rule(f"/(?s:.*){pattern}/", lazy=True)

    def json(self, schema: Any, root: Mapping[str, Any] | None = None) -> str:
        """A JSON value of a schema. root: the schema with its definitions. Raises RequestError for more than MAX_SCHEMAS."""
        schema = dict(schema) if isinstance(schema, dict) else {}
        if root and '"$ref"' in json.dumps(schema):
            schema = {key: root[key] for key in ("$defs", "definitions") if key in root} | schema
        text = json.dumps({**without_looking_around(schema), "x-guidance": COMPACT})
        self._schemas += len(text)
        if self._schemas > MAX_SCHEMAS:
            raise RequestError("the schemas of the tools are too long together: send fewer tools, or shorter schemas")
        return f"%json {text}"


def region(form: Format, tools: Sequence[Tool], mark: Mark, many: bool) -> tuple[str, str]:
    """(rules, name of the rule) of what follows the opening mark. many: several calls in one region, if the notation has such."""
    w = Writer(mark)
    body = _REGIONS[form.name](w, form, tools, many)
    name = w.rule(body)
    return "\n".join(w.rules), name


def required(form: Format, tools: Sequence[Tool], mark: Mark, many: bool) -> str:
    """The grammar of a reply that is at least one call."""
    rules, name = region(form, tools, mark, many)
    w = Writer(mark)
    open_ = w.spelled(form.open, [form.open]) if not form.bare else ""
    again = f'( "\\n" {open_} {name} )*' if many and open_ and not form.final and form.parallel else ""
    return f"start: {open_} {name} {again}\n{rules}\n"


def automatic(form: Format, tools: Sequence[Tool], mark: Mark, many: bool) -> str:
    """The grammar of one region, from behind its opening mark to its end (gpt-oss: from the name of the function)."""
    if form.name == "gpt_oss":
        w = Writer(mark)
        name = w.rule(_to_function(w, form, tools))
        return "\n".join([f"start: {name}", *w.rules, ""])
    rules, name = region(form, tools, mark, many)
    return f"start: {name}\n{rules}\n"


def _either(w: Writer, tools: Sequence[Tool], of: Callable[[Tool], str]) -> str:
    return w.rule(" | ".join([w.rule(of(tool)) for tool in tools]))


def _hermes(w: Writer, form: Format, tools: Sequence[Tool], many: bool) -> str:
    one = _either(w, tools, lambda t: f"{w.text(_named(t))} {w.json(t.schema)} {w.text('}')}")
    return f'"\\n" {one} "\\n" {w.spelled(form.close, [form.close])}'


def _named(tool: Tool, key: str = "arguments") -> str:
    return f'{{"name": "{tool.name}", "{key}": '


def _json_list(w: Writer, form: Format, tools: Sequence[Tool], many: bool) -> str:
    one = _either(w, tools, lambda t: f"{w.text(_named(t))} {w.json(t.schema)} {w.text('}')}")
    again = f'( ", " {one} )*' if many else ""
    return f'"[" {one} {again} "]" {w.spelled(form.close, [form.close])}'


def _llama(w: Writer, form: Format, tools: Sequence[Tool], many: bool) -> str:
    return _either(w, tools, lambda t: f"{w.text(_named(t, 'parameters'))} {w.json(t.schema)} {w.text('}')}")


def _mistral(w: Writer, form: Format, tools: Sequence[Tool], many: bool) -> str:
    marks = ["[ARGS]"] if w.mark("[ARGS]") is not None else []
    return _either(w, tools, lambda t: f"{w.spelled(t.name + ''.join(marks), marks)} {w.json(t.schema)}")


def _deepseek(w: Writer, form: Format, tools: Sequence[Tool], many: bool) -> str:
    begin, end, sep = form.marks
    fenced = form.name == "deepseek_v3"

    def one(tool: Tool) -> str:
        head = f"{begin}function{sep}{tool.name}\n```json\n" if fenced else f"{begin}{tool.name}{sep}"
        tail = ("\n```" if fenced else "") + end
        return f"{w.spelled(head, form.marks)} {w.json(tool.schema)} {w.spelled(tail, form.marks)}"

    call, gap = _either(w, tools, one), '"\\n"' if fenced else ""
    again = f"( {gap} {call} )*" if many else ""
    return f"{call} {again} {w.spelled(form.close, [form.close])}"


def _kimi(w: Writer, form: Format, tools: Sequence[Tool], many: bool) -> str:
    begin, middle, end = form.marks

    def one(tool: Tool) -> str:
        head = w.spelled(f"{begin}functions.{tool.name}:", form.marks)
        return (
            f"{head} /[0-9]{{1,2}}/ {w.spelled(middle, form.marks)} {w.json(tool.schema)} {w.spelled(end, form.marks)}"
        )

    call = _either(w, tools, one)
    return f"{call} {f'( {call} )*' if many else ''} {w.spelled(form.close, [form.close])}"


def _tags(w: Writer, form: Format, tools: Sequence[Tool], many: bool) -> str:
    """Parameters between tags, as raw text or, for types that are not texts, as JSON."""
    before, between, behind, head, tail, close = _TAGS[form.name]
    marks = [*form.marks, form.close]

    def parameter(tool: Tool, name: str) -> str:
        opening = w.spelled(before.format(name) + between, marks)
        mark = next((m for m in marks if behind.startswith(m)), "")
        value = _raw(w, tool, tool.properties[name], behind, mark, marks)
        part = f"{opening} {value}"
        return part if tool.needs(name) else f"( {part} )?"

    def one(tool: Tool) -> str:
        parts = " ".join(parameter(tool, name) for name in tool.properties)
        return f"{w.text(head.format(tool.name))} {parts} {w.spelled(tail, marks)}"

    call = _either(w, tools, one)
    more = f"( {call} )*" if many and form.name == "minimax" else ""
    return f"{call} {more} {w.spelled(close, marks)}"


def _raw(w: Writer, tool: Tool, schema: Any, behind: str, mark: str, marks: Sequence[str]) -> str:
    choices = schema.get("enum") if isinstance(schema, dict) else None
    types = types_of(schema)
    if isinstance(choices, list) and choices and all(isinstance(c, str) for c in choices):
        return f"( {' | '.join(w.text(c) for c in choices)} ) {w.spelled(behind, marks)}"
    if (types and "string" not in types) or (not types and isinstance(schema, dict) and ("$ref" in schema or choices)):
        return f"{w.json(schema, tool.parameters)} {w.spelled(behind, marks)}"
    return w.until(behind, mark)


_TAGS = {
    "qwen3_coder": ("<parameter={}>", "\n", "\n</parameter>\n", "\n<function={}>\n", "</function>", "\n</tool_call>"),
    "glm": ("<arg_key>{}</arg_key>\n", "<arg_value>", "</arg_value>\n", "{}\n", "", "</tool_call>"),
    "minimax": ('<parameter name="{}">', "", "</parameter>\n", '\n<invoke name="{}">\n', "</invoke>", "\n</minimax:tool_call>"),
}  # fmt: skip


def _gemma(w: Writer, form: Format, tools: Sequence[Tool], many: bool) -> str:
    quote = form.marks[0]
    text = f"{w.spelled(quote, [quote])} {w.until(quote, quote)}"
    value = _Notation(w, text, "{}:", ("true", "false", "null"), sort=True).value
    one = lambda t: f"{w.text(f'call:{t.name}')} {value({**t.schema, 'type': 'object'}, t.schema, 0)}"  # noqa: E731
    return f"{_either(w, tools, one)} {w.spelled(form.close, [form.close])}"


def _python(w: Writer, form: Format, tools: Sequence[Tool], many: bool) -> str:
    text = w.rule(r"""/"([^"\\\n]|\\["'\\nrt])*"/ | /'([^'\\\n]|\\["'\\nrt])*'/""")
    notation = _Notation(w, text, '"{}": ', ("True", "False", "None"))

    def one(tool: Tool) -> str:
        parts = [
            (f"{w.text(name + '=')} {notation.value(schema, tool.parameters, 0)}", tool.needs(name))
            for name, schema in tool.properties.items()
        ]
        return f"{w.text(tool.name + '(')} {_listed(w, parts, ', ')} {w.text(')')}"

    call = _either(w, tools, one)
    again = f'( ", " {call} )*' if many else ""
    return f'"[" {call} {again} "]" {w.spelled(form.close, [form.close])}'


@dataclass(slots=True)
class _Notation:
    """Values in a notation that is not JSON. text: the rule of a text. key: of an object. words: true, false and nothing."""

    w: Writer
    text: str
    key: str
    words: tuple[str, str, str]
    sort: bool = False
    _any: str | None = None

    def value(self, schema: Any, root: Mapping[str, Any], depth: int) -> str:
        """A value of a schema; of types, enumerations, properties and items, and else any value."""
        w, schema = self.w, schema if isinstance(schema, dict) else {}
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(choices, list) and choices and all(isinstance(c, str) for c in choices):
            quote = self.text.split(" ")[0] if self.sort else '"\\""'
            return "( " + " | ".join(f"{quote} {w.text(c)} {quote}" for c in choices) + " )"
        types = types_of(schema)
        if not types or depth > 8:
            return self.any()
        return w.rule(" | ".join(self._typed(name, schema, root, depth) for name in types))

    def _typed(self, name: str, schema: dict[str, Any], root: Mapping[str, Any], depth: int) -> str:
        w = self.w
        if name == "object" and isinstance(schema.get("properties"), dict):
            needed = schema.get("required") if isinstance(schema.get("required"), list) else []
            names = sorted(schema["properties"], key=str.lower) if self.sort else list(schema["properties"])
            parts = [
                (f"{w.text(self.key.format(n))} {self.value(schema['properties'][n], root, depth + 1)}", n in needed)
                for n in names
            ]
            return f'"{{" {_listed(w, parts, "," if self.sort else ", ")} "}}"'
        if name == "array":
            item = self.value(schema.get("items"), root, depth + 1)
            return f'"[" ( {item} ( /, ?/ {item} )* )? "]"'
        if name == "object":
            key = '/[A-Za-z_][A-Za-z0-9_]*/ ":"' if self.sort else f"{self.text} /: ?/"
            return f'"{{" ( {key} {self.any()} ( /, ?/ {key} {self.any()} )* )? "}}"'
        if name == "string":
            return self.text
        if name == "boolean":
            return f'"{self.words[0]}" | "{self.words[1]}"'
        if name == "null":
            return f'"{self.words[2]}"'
        return "/-?(0|[1-9][0-9]{0,15})/" if name == "integer" else r"/-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?/"

    def any(self) -> str:
        """Any value."""
        if self._any is None:
            self._any = self.w.rule("PLACE")
            at = len(self.w.rules) - 1
            kinds = ("string", "number", "boolean", "null", "array", "object")
            self.w.rules[at] = f"{self._any}: " + " | ".join(self._typed(k, {}, {}, 9) for k in kinds)
        return self._any


def _listed(w: Writer, parts: Sequence[tuple[str, bool]], comma: str) -> str:
    """Parts in their order, with commas between; those that are not needed may be missing."""
    after = ""
    starts: list[str] = []
    for part, needed in reversed(parts):
        name = w.rule(part)
        if needed:
            starts = []
        starts.insert(0, f"{name} {after}")
        more = f"{w.text(comma)} {name}"
        after = f"{more} {after}" if needed else f"( {more} )? {after}"
    if not starts:
        return ""
    return f"( {' | '.join(starts)} )" + ("" if any(needed for _, needed in parts) else "?")


def _harmony(w: Writer, form: Format, tools: Sequence[Tool], many: bool) -> str:
    _, message, constrain = form.marks[:3]

    def one(tool: Tool) -> str:
        head = f"commentary to=functions.{tool.name} {constrain}json{message}"
        return f"{w.spelled(head, form.marks)} {w.json(tool.schema)}"

    return _either(w, tools, one)


def _to_function(w: Writer, form: Format, tools: Sequence[Tool]) -> str:
    """gpt-oss's call from the function's name on: the channel may stand before or behind it."""
    _, message, constrain = form.marks[:3]
    heads = [
        f" {constrain}json{message}",
        f"{form.open}commentary json{message}",
        f"{form.open}commentary{message}",
        message,
    ]
    middle = " | ".join(w.spelled(head, [form.open, *form.marks]) for head in heads)
    return _either(w, tools, lambda t: f"{w.text(t.name)} ( {middle} ) {w.json(t.schema)}")


_REGIONS: dict[str, Callable[[Writer, Format, Sequence[Tool], bool], str]] = {
    "hermes": _hermes, "qwen3_coder": _tags, "glm": _tags, "minimax": _tags, "llama3": _llama, "mistral": _mistral,
    "mistral_list": _json_list, "granite": _json_list, "phi4": _json_list, "phi4_text": _json_list, "gemma4": _gemma,
    "functiongemma": _gemma, "deepseek_v3": _deepseek, "deepseek_v31": _deepseek, "kimi": _kimi, "lfm2": _python,
    "llama4": _python, "olmo3": _python, "gpt_oss": _harmony,
}  # fmt: skip
assert _REGIONS.keys() == FORMATS.keys()
