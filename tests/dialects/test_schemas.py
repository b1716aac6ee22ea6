"""Schemas as libraries write them: notes that a grammar does not know, and patterns that it cannot follow."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from outrider.dialects.formats import FORMATS
from outrider.dialects.lark import Tool, required
from outrider.errors import RequestError
from outrider.schemas import FORMATS as KNOWN
from outrider.schemas import without_looking_around, without_other_formats
from tests.dialects.tokens import END, byte_tokenizer, grammars_for, marks_of

EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def test_formats_that_are_notes_are_left_out_and_nothing_else() -> None:
    schema = {
        "anyOf": [{"type": "string", "format": "path"}, {"type": "string", "format": "date"}],
        "properties": {"format": {"type": "string", "format": "password"}, "pattern": {"const": {"format": "path"}}},
        "default": {"format": "path"}, "enum": [{"format": "path"}],
    }  # fmt: skip
    assert without_other_formats(schema) == {
        "anyOf": [{"type": "string"}, {"type": "string", "format": "date"}],
        "properties": {"format": {"type": "string"}, "pattern": {"const": {"format": "path"}}},
        "default": {"format": "path"}, "enum": [{"format": "path"}],
    }  # fmt: skip
    assert without_looking_around({"pattern": EMAIL, "items": {"pattern": "^a+$"}, "properties": {"pattern": {"pattern": r"(a)\1"}},
                                   "patternProperties": {"^(?=x)": {}, "^y": {"pattern": "(?<!a)b"}}}) == {
        "items": {"pattern": "^a+$"}, "properties": {"pattern": {}}, "patternProperties": {"^y": {}}}  # fmt: skip


KEYWORDS = (
    "type", "enum", "const", "default", "examples", "pattern", "format", "items", "properties", "patternProperties", "required",
    "$defs", "definitions", "dependencies", "anyOf", "not", "if", "$ref", "title", "description",
)  # fmt: skip
"""Words of schemas that may as well be the names of properties."""


@pytest.mark.parametrize(
    "inside", ["properties", "$defs", "definitions", "dependentSchemas", "dependencies", "patternProperties"]
)
@pytest.mark.parametrize("name", KEYWORDS)
def test_a_name_that_is_a_word_of_schemas_is_a_name(name: str, inside: str) -> None:
    """What is called "enum" is read as any other schema, and what is in a real `enum` under that name is data."""
    note = {"format": "path", "pattern": "^(?=x)a", "enum": [{"format": "path", "pattern": "(?=x)"}]}
    assert without_other_formats({inside: {name: note}}) == {inside: {name: {k: note[k] for k in ("pattern", "enum")}}}
    assert without_looking_around({inside: {name: note}}) == {inside: {name: {k: note[k] for k in ("format", "enum")}}}
    deep = {inside: {name: {"properties": {name: note}}}}
    assert without_other_formats(deep)[inside][name]["properties"][name] == {k: note[k] for k in ("pattern", "enum")}
    listed = {
        "dependencies": {name: ["format", "pattern"]},
        "dependentRequired": {name: ["format"]},
        "required": [name],
    }
    assert without_looking_around(without_other_formats(listed)) == listed


def test_properties_with_the_names_of_keywords_are_held_and_typed() -> None:
    """A reply and a call, in every notation: each property has its own schema, whatever it is called."""
    each = {name: {"type": "integer", "format": "int64"} for name in KEYWORDS}
    right, wrong = dict.fromkeys(KEYWORDS, 7), {name: "x" if name == "enum" else 7 for name in KEYWORDS}
    core = byte_tokenizer()
    grammar = "json:" + json.dumps(closed(**each))
    assert accepts(core, grammar, json.dumps(right)) and not accepts(core, grammar, json.dumps(wrong))
    for form in FORMATS.values():
        core = byte_tokenizer(form.marks)
        grammars_for(core).compile(f"lark:{required(form, [Tool('f', closed(**each))], marks_of(core), False)}")
    body = FORMATS["qwen3_coder"].body
    assert body is not None
    raw = "".join(f"<parameter={n}>\n7\n</parameter>\n" for n in KEYWORDS)
    assert body(raw, each) == right
    assert body(raw, {**each, "enum": {"type": "string"}}) == {**right, "enum": "7"}


def accepts(core: Tokenizer, grammar: str, text: str) -> bool:
    """Whether a grammar lets a model write a text, and end there."""
    automaton, out = grammars_for(core).start(grammar), list[int]()
    for token in [*core.encode(text, add_special_tokens=False).ids, core.token_to_id(END)]:
        automaton.keep_up(out, 0)
        if not automaton.allowed([])[token]:
            return False
        out.append(token)
    return True


@pytest.mark.parametrize("name", ["path", "binary", "password", "int64", "uri-reference", "file-path", "color"])
def test_a_format_that_is_not_known_is_no_reason_to_refuse_a_schema(name: str) -> None:
    texts = [{"type": "string", "format": name, "maxLength": 3}, {"type": "null"}]
    grammar = "json:" + json.dumps(closed(a={"anyOf": texts}, b={"format": name, "type": "integer"}))
    core = byte_tokenizer()
    assert accepts(core, grammar, '{"a":"x y","b":7}') and accepts(core, grammar, '{"a":null,"b":-1}')
    assert not accepts(core, grammar, '{"a":"four","b":7}') and not accepts(core, grammar, '{"a":"x","b":"7"}')


@pytest.mark.parametrize(("name", "right"), [
    ("date", "2024-02-28"), ("time", "10:20:30Z"), ("date-time", "2024-02-28T10:20:30Z"), ("duration", "P1DT2H"),
    ("email", "a.b@c.de"), ("hostname", "a.example.org"), ("ipv4", "127.0.0.1"), ("ipv6", "2001:db8::1"),
    ("uuid", "12345678-1234-1234-1234-123456789abc"), ("uri", "https://a.org/b"),
])  # fmt: skip
def test_formats_that_are_known_hold(name: str, right: str) -> None:
    assert name in KNOWN
    core, grammar = byte_tokenizer(), "json:" + json.dumps({"type": "string", "format": name})
    assert accepts(core, grammar, f'"{right}"') and not accepts(core, grammar, '"x y"')


def test_a_tool_whose_pattern_looks_around_can_be_called() -> None:
    marks = ("<tool_call>", "</tool_call>")
    core = byte_tokenizer(marks)
    address, digit = {"type": "string", "format": "email", "pattern": EMAIL}, {"type": "string", "pattern": "^[0-9]$"}
    tool = Tool("send", closed(to=address, n=digit))
    grammar = f"lark:{required(FORMATS['hermes'], [tool], marks_of(core), False)}"
    call = '<tool_call>\n{"name": "send", "arguments": {"to": "%s", "n": "%s"}}\n</tool_call>'
    assert accepts(core, grammar, call % ("a@b.de", "1"))
    assert not accepts(core, grammar, call % ("a@b.de", "x")), "the other pattern holds"
    assert not accepts(core, grammar, call % ("a b", "1")), "and so does the format"
    with pytest.raises(RequestError, match="look-around"):
        # of a reply every pattern is held, or the schema refused
        grammars_for(core).compile("json:" + json.dumps(tool.schema))
