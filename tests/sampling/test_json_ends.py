"""JSON that ends: schemas of the kinds that JSON-Schema's test suite has, written by a model that would rather end, and is unsure.

The model likes the end of the text, of a string, an object or an array most, and white space as much as any letter, with noise
at temperature 1. Every text that it finishes is valid (judged by another library), and 95 of 100 are finished within twice the
bytes of the schema's shortest text. A model that likes white space ends too, but not where white space has no bound (the control).
The texts are fixed by their seeds.
"""

from __future__ import annotations

import json
import math
import random
import sys
from typing import Any

import jsonschema_rs
import pytest

from outrider.automata import BLANKS
from tests.dialects.tokens import END, byte_tokenizer, grammars_for, text_of

OBJECT = {"type": "object", "additionalProperties": False}
TREE = {
    "$defs": {"n": {**OBJECT, "properties": {"v": {"type": "integer"}, "l": {"$ref": "#/$defs/n"}}, "required": ["v"]}},
    "$ref": "#/$defs/n",
}
PERSON = {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}}
SCHEMAS: list[tuple[dict[str, Any], Any]] = [
    ({"type": "null"}, None),
    ({"type": "boolean"}, True),
    ({"type": "integer"}, 1),
    ({"type": "number"}, 1),
    ({"type": "string"}, ""),
    ({"type": "array", "items": {"type": "integer"}}, []),
    (OBJECT, {}),
    ({"type": ["null", "boolean"]}, None),
    ({"const": None}, None),
    ({"const": 'a\n"b" é'}, 'a\n"b" é'),
    ({"const": {"a": [1, {"b": None}]}}, {"a": [1, {"b": None}]}),
    ({"const": "<pad>"}, "<pad>"),
    ({"const": -1.5}, -1.5),
    ({"enum": ["red", 12345, None]}, None),
    ({"enum": ["<|im_end|>", "<|im_start|>"]}, "<|im_end|>"),
    ({"enum": [[], {}]}, []),
    ({"type": "string", "minLength": 3}, "aaa"),
    ({"type": "string", "maxLength": 2}, ""),
    ({"type": "string", "minLength": 5, "maxLength": 9}, "aaaaa"),
    ({"type": "string", "pattern": "^[a-c]{2}-[0-9]+$"}, "aa-1"),
    ({"type": "string", "pattern": "^(yes|no)$"}, "no"),
    ({"type": "string", "format": "date"}, "2020-01-01"),
    ({"type": "string", "format": "uuid"}, "00000000-0000-4000-8000-000000000000"),
    ({"type": "string", "format": "ipv4"}, "1.1.1.1"),
    ({"type": "integer", "minimum": 10}, 10),
    ({"type": "integer", "maximum": -5}, -5),
    ({"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 102}, 100),
    ({"type": "number", "minimum": 0, "maximum": 1}, 0),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, True]),
    ({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 3}, [None]),
    (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 2},
        [1, ""],
    ),
    ({"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1}, "minItems": 1}, [[1]]),
    ({"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 4, "maxItems": 4}, ["a"] * 4),
    ({**OBJECT, "properties": PERSON, "required": ["name", "age"]}, {"name": "", "age": 1}),
    ({**OBJECT, "properties": PERSON}, {}),
    ({**OBJECT, "properties": {"a": PERSON["age"], "b": PERSON["name"]}, "required": ["b"]}, {"b": ""}),
    (
        {**OBJECT, "properties": {"in": {**OBJECT, "properties": PERSON, "required": ["age"]}}, "required": ["in"]},
        {"in": {"age": 1}},
    ),
    (
        {
            **OBJECT,
            "properties": {f"k{i}": {"type": "integer"} for i in range(6)},
            "required": [f"k{i}" for i in range(6)],
        },
        {f"k{i}": 1 for i in range(6)},
    ),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, {}),
    (
        {**OBJECT, "properties": {"t": {"const": "circle"}, "r": {"type": "number"}}, "required": ["t", "r"]},
        {"t": "circle", "r": 1},
    ),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, 1),
    ({"anyOf": [{"const": "a"}, {"type": "array", "items": {"const": 1}}]}, []),
    ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, 1),
    ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]}, 3),
    (
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"additionalProperties": False, "properties": {"a": {}}},
            ]
        },
        {"a": 1},
    ),
    (TREE, {"v": 1}),
    ({"$defs": {"s": {"type": "string", "maxLength": 4}}, "type": "array", "items": {"$ref": "#/$defs/s"}}, []),
    ({**OBJECT, "properties": {"é 漢": {"type": "boolean"}}, "required": ["é 漢"]}, {"é 漢": True}),
    (
        {
            **OBJECT,
            "properties": {
                "list": {
                    "type": "array",
                    "items": {**OBJECT, "properties": PERSON, "required": ["name"]},
                    "minItems": 2,
                }
            },
            "required": ["list"],
        },
        {"list": [{"name": ""}] * 2},
    ),
    (
        {
            **OBJECT,
            "properties": {"a": {"type": ["string", "null"]}, "b": {"type": ["integer", "null"]}},
            "required": ["a", "b"],
        },
        {"a": "", "b": 1},
    ),
]
"""Fifty, each with a shortest text."""
CORE = byte_tokenizer(["<pad>"])
QUOTE, *BRACKETS = CORE.encode('"}]', add_special_tokens=False).ids
COMMON = set(CORE.encode("abcdehilnorst0123456789 \n\t", add_special_tokens=False).ids)
ENDING = CORE.token_to_id(END)
_GRAMMARS = grammars_for(CORE)


def finite(number: str) -> float:
    """A number as a double; one that is too large for any (`1e999` is valid JSON) as the largest, since infinity is no JSON."""
    return max(min(float(number), sys.float_info.max), -sys.float_info.max)


def shortest(text: Any) -> int:
    return len(json.dumps(text, separators=(",", ":"), ensure_ascii=False).encode())


def written(schema: dict[str, Any], seed: int, most: int, blanks: float = 0.0) -> str | None:
    """What the model writes; None if it has not ended after `most` tokens. blanks: how much it likes white space beyond letters."""
    automaton, rng, out = _GRAMMARS.start("json:" + json.dumps(schema)), random.Random(seed), list[int]()
    white = set(CORE.encode(" \n\t", add_special_tokens=False).ids)
    while True:
        automaton.keep_up(out, 0)
        allowed = automaton.allowed([]).nonzero().flatten().tolist()
        inside = out.count(QUOTE) % 2 == 1
        liked = {ENDING: 9.0, QUOTE: 9.0 if inside else 3.0, **dict.fromkeys(() if inside else BRACKETS, 8.0)}
        best = max(
            allowed,
            key=lambda t: liked.get(t, (t in COMMON) + blanks * (t in white)) - math.log(-math.log(rng.random())),
        )
        if best == ENDING:
            return text_of(CORE, out)
        if len(out) == most:
            return None
        out.append(best)


def test_there_are_fifty_and_their_shortest_texts_are_valid() -> None:
    assert len(SCHEMAS) == 50
    for schema, text in SCHEMAS:
        jsonschema_rs.validate(schema, text)


def share_that_ends(seeds: range, blanks: float = 0.0, schema_of: Any = lambda schema: schema) -> float:
    ended = 0
    for schema, least in SCHEMAS:
        for seed in seeds:
            text = written(schema_of(schema), seed, 2 * shortest(least), blanks)
            if text is not None:
                jsonschema_rs.validate(schema, json.loads(text, parse_float=finite))
                ended += 1
    return ended / (len(SCHEMAS) * len(seeds))


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 42), marks=pytest.mark.slow)], ids=["few", "many"])
def test_texts_end_within_twice_the_shortest_and_are_valid(seeds: range) -> None:
    assert share_that_ends(seeds) >= 0.95


def test_a_text_that_is_left_alone_always_ends_and_is_valid() -> None:
    """With a budget that a model of this kind needs rather than the least: all fifty end."""
    for schema, least in SCHEMAS:
        text = written(schema, 7, 400 + 4 * shortest(least), blanks=8.0)
        assert text is not None, schema
        jsonschema_rs.validate(schema, json.loads(text, parse_float=finite))


def test_control_unbounded_blanks_do_not_end() -> None:
    """A model that likes blanks: with the bound it ends, with any white space it does not."""
    schema = {**OBJECT, "properties": PERSON, "required": ["name", "age"]}
    free = {**schema, "x-guidance": {"whitespace_pattern": r"[ \n\t]*"}}
    assert BLANKS["whitespace_pattern"] != free["x-guidance"]["whitespace_pattern"]
    assert written(schema, 0, 400, blanks=30.0) is not None
    assert written(free, 0, 400, blanks=30.0) is None
