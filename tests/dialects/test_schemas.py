"""Schemas as libraries write them: notes that a grammar does not know, and patterns that it cannot follow."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest

from outrider.dialects.formats import FORMATS
from outrider.dialects.lark import Tool, required
from outrider.errors import RequestError
from outrider.schemas import FORMATS as KNOWN
from outrider.schemas import without_looking_around, without_other_formats
from tests.dialects.tokens import byte_tokenizer, grammars_for, marks_of, random_text, text_of

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


@pytest.mark.parametrize("name", ["path", "binary", "password", "int64", "uri-reference", "file-path", "color"])
def test_a_format_that_is_not_known_is_no_reason_to_refuse_a_schema(name: str) -> None:
    core = byte_tokenizer()
    texts = [{"type": "string", "format": name, "maxLength": 3}, {"type": "null"}]
    schema = closed(a={"anyOf": texts}, b={"format": name, "type": "integer"})
    text = text_of(core, random_text(core, grammars_for(core).start("json:" + json.dumps(schema)), 1))
    found = json.loads(text)
    assert list(found) == ["a", "b"] and isinstance(found["b"], int) and (found["a"] is None or len(found["a"]) <= 3)


@pytest.mark.parametrize("name", sorted(KNOWN - {"unknown"}))
def test_known_formats_hold(name: str) -> None:
    core = byte_tokenizer()
    schema = json.dumps({"type": "string", "format": name})
    assert without_other_formats(json.loads(schema)) == json.loads(schema)
    written = json.loads(text_of(core, random_text(core, grammars_for(core).start("json:" + schema), 1)))
    assert jsonschema_rs.is_valid(json.loads(schema), written, validate_formats=True)


def test_a_tool_whose_pattern_looks_around_can_be_called() -> None:
    marks = ("<tool_call>", "</tool_call>")
    core = byte_tokenizer(marks)
    address, digit = {"type": "string", "format": "email", "pattern": EMAIL}, {"type": "string", "pattern": "^[0-9]$"}
    tool, grammars = Tool("send", closed(to=address, n=digit)), grammars_for(core)
    rules = required(FORMATS["hermes"], [tool], marks_of(core), False)
    text = text_of(core, random_text(core, grammars.start(f"lark:{rules}"), 3))
    call = json.loads(text.removeprefix(marks[0]).removesuffix(marks[1]))
    assert call["name"] == "send" and list(call["arguments"]) == ["to", "n"]
    assert "@" in call["arguments"]["to"] and call["arguments"]["n"] in "0123456789"
    with pytest.raises(RequestError, match="look-around"):
        grammars.compile("json:" + json.dumps(tool.schema))  # of a reply every pattern is held, or the schema refused
