"""Every notation: what its grammar lets a model write, its reader reads as calls whose arguments the schemas admit."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from outrider.automata import Mark, Stages
from outrider.dialects.formats import FORMATS
from outrider.dialects.harmony import HarmonyReader
from outrider.dialects.lark import Tool, automatic, required
from outrider.dialects.pieces import Piece
from outrider.dialects.reader import Reader, Thinking
from outrider.dialects.values import typed
from outrider.errors import RequestError
from tests.dialects.tokens import byte_tokenizer, grammars_for, marks_of, random_text, text_of

TOOLS = [
    Tool("look_up", {"type": "object", "properties": {
        "place": {"type": "string"}, "days": {"type": "integer"}, "unit": {"type": "string", "enum": ["C", "F"]},
        "deep": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False},
        "many": {"type": "array", "items": {"type": "number"}}}, "required": ["place", "unit", "deep"]}),
    Tool("now", {"type": "object", "properties": {}}),
]  # fmt: skip
ENDINGS = ["\n</parameter>\n", "</parameter>\n", "</arg_value>\n", '<|"|>', "<escape>"]
SCHEMAS = {t.name: t.schema for t in TOOLS}


def reader_of(name: str, thinking: Thinking | None = None) -> Any:
    return HarmonyReader() if name == "gpt_oss" else Reader(FORMATS[name], thinking, SCHEMAS)


def read(name: str, text: str, cuts: random.Random | None = None, thinking: Thinking | None = None) -> list[Piece]:
    reader, out, at = reader_of(name, thinking), list[Piece](), 0
    while at < len(text):
        size = len(text) if cuts is None else cuts.randint(1, 7)
        out += reader.feed(text[at : at + size])
        at += size
    return out + reader.finish()


def whole(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, str]]]:
    """(content, reasoning, calls) of pieces."""
    of = lambda kind, call=-1: "".join(p.text for p in pieces if p.kind == kind and p.call == call)  # noqa: E731
    return of("content"), of("reasoning"), [(p.text, of("arguments", p.call)) for p in pieces if p.kind == "call"]


def fits(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    """Whether arguments fit the schemas of TOOLS."""
    kinds = {"string": str, "integer": int, "object": dict, "array": list, "boolean": bool, "number": (int, float)}
    properties = schema.get("properties", {})
    if set(value) - set(properties) or set(schema.get("required", ())) - set(value):
        return False
    for key, inner in value.items():
        wanted = properties[key]
        if not isinstance(inner, kinds[wanted["type"]]) or inner not in wanted.get("enum", [inner]):
            return False
        if wanted["type"] == "object" and not fits(inner, wanted):
            return False
        if wanted["type"] == "array" and not all(isinstance(x, int | float) for x in inner):
            return False
    return True


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_what_the_grammar_allows_is_read_as_valid_calls(name: str, tokens: bool) -> None:
    form = FORMATS[name]
    marks = [m for m in (form.open, form.close, *form.marks) if m]
    core = byte_tokenizer(dict.fromkeys(marks)) if tokens else byte_tokenizer()
    grammars, mark = grammars_for(core), marks_of(core)
    text = f"lark:{required(form, TOOLS, mark, True)}"
    for seed in range(2 if tokens else 1):
        written = text_of(core, random_text(core, grammars.start(text), seed, endings=ENDINGS))
        prefix = form.open if name == "gpt_oss" and not written.startswith(form.open) else ""
        content, reasoning, calls = whole(read(name, prefix + written))
        assert calls and not content and not reasoning, written
        for called, arguments in calls:
            assert fits(json.loads(arguments), SCHEMAS[called]), (written, called, arguments)
        for cut in range(2):
            assert whole(read(name, prefix + written, random.Random(cut))) == (content, reasoning, calls)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_automatic_calls_are_masked_from_their_mark_on_and_text_is_free(name: str) -> None:
    """Before the mark every token is allowed, and so again behind the call, unless nothing may follow it."""
    form = FORMATS[name]
    core = byte_tokenizer(dict.fromkeys(m for m in (form.open, form.close, *form.marks) if m))
    grammars, mark = grammars_for(core), marks_of(core)
    trigger = Mark(form.open, mark(form.open)) if not form.bare else Mark("{", None, start=True)
    free = f"Well, <b> {form.open}" if not form.bare else "\n {"
    if name == "gpt_oss":  # a channel may hold thinking or text, so the mask begins where a function is addressed
        trigger, free = Mark("to=functions."), f"{form.open}commentary to=functions."
    stages = Stages(f"lark:{automatic(form, TOOLS, mark, False)}", trigger, final=form.final)
    for seed in range(1):
        automaton = grammars.start(stages.text)
        tokens = random_text(core, automaton, seed, free=free, endings=ENDINGS)
        content, _, calls = whole(read(name, text_of(core, tokens)))
        assert content.strip() == ("" if form.bare or name == "gpt_oss" else "Well, <b>")
        assert len(calls) == 1 and fits(json.loads(calls[0][1]), SCHEMAS[calls[0][0]]), text_of(core, tokens)
        automaton.follow(tokens)
        assert automaton.allowed([]).sum() == (1 if form.final else core.get_vocab_size())


def test_a_path_across_borders_is_masked_as_the_text_would_be() -> None:
    """The mask behind a drafted path equals the mask of a text that contains it, wherever the path begins."""
    core = byte_tokenizer(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    grammars, mark = grammars_for(core), marks_of(core)
    form = FORMATS["hermes"]
    marks = (Mark("<think>", mark("<think>")), Mark("</think>", mark("</think>")))
    stages = Stages(f"lark:{automatic(form, TOOLS, mark, False)}", Mark(form.open, mark(form.open)), marks)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    text = f"<think>a <tool_call> b</think>\n\nSo: {call}\n{call} done"
    ids = core.encode(text, add_special_tokens=False).ids
    plain = []
    for n in range(len(ids) + 1):
        automaton = grammars.start(stages.text)
        automaton.follow(ids[:n])
        assert not automaton.exhausted
        plain.append(automaton.allowed([]))
    rng = random.Random(0)
    for begin in range(0, len(ids), 3):
        automaton = grammars.start(stages.text)
        automaton.follow(ids[:begin])
        for _ in range(4):
            end = min(len(ids), begin + rng.randint(0, 40))
            assert (automaton.allowed(ids[begin:end]) == plain[end]).all()
        assert (automaton.allowed([]) == plain[begin]).all()
    assert len({int(m.sum()) for m in plain}) >= 3


@pytest.mark.parametrize("token", [True, False])
def test_a_required_text_begins_behind_the_thinking(token: bool) -> None:
    core = byte_tokenizer(["</think>"] if token else [])
    grammars, mark = grammars_for(core), marks_of(core)
    end = core.get_vocab_size() - (2 if token else 1)
    stages = Stages('json:{"const": "x"}', None, (Mark("<think>"), Mark("</think>", mark("</think>"))), opened=True)
    automaton = grammars.start(stages.text)
    assert not automaton.allowed([])[end]  # the text must still come
    assert automaton.allowed([]).sum() == core.get_vocab_size() - 1
    tokens = random_text(core, automaton, 1, free='hm {"</think>')
    assert text_of(core, tokens).split("</think>")[1].strip() == '"x"'


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "gpt_oss"])
@pytest.mark.parametrize("text", [" " * 4000, "a" + " " * 4000, "f[CALL_ID]" + " " * 4000])
def test_blanks_behind_a_mark_are_read_in_linear_time(name: str, text: str) -> None:
    """A pattern that tries every split of the blanks would take minutes, in the loop that serves everybody."""
    whole_text = FORMATS[name].open + text
    assert whole(read(name, whole_text))[0].strip() == whole_text.strip()


@pytest.mark.parametrize(
    ("raw", "schema", "value"),
    [
        ("9" * 400, {"type": "integer"}, int("9" * 400)),
        ("2.0", {"type": "integer"}, 2.0),
        ("2.5", {"type": "integer"}, "2.5"),
        ("1e999", {"type": "number"}, "1e999"),
        ("[1e999]", {}, ["1e999"]),
        ("NaN", {}, "NaN"),
    ],
)
def test_numbers_that_no_float_holds_stay_text(raw: str, schema: dict[str, Any], value: Any) -> None:
    found = typed(raw, schema)
    assert found == value and type(found) is type(value)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=a>\nVALUE\n</parameter>\n</function>\n</tool_call>"),
        ("lfm2", "<|tool_call_start|>[f(a=VALUE)]<|tool_call_end|>"),
        ("hermes", '<tool_call>\n{"arguments": {"a": VALUE}, "name": "f"}\n</tool_call>'),
    ],
)
def test_half_a_character_in_a_call_is_the_mark_for_it(name: str, text: str) -> None:
    """JSON and Python may name one half of a surrogate pair, which no reply can carry; a whole pair is its character."""
    schemas = {"f": {"type": "object", "properties": {"a": {"type": "array"}}}}
    halves = r'["\ud800", "a\udc00b", "\ud83d\ude00", "\\ud800", "\u00e9"]'
    wanted = halves if name != "lfm2" else halves.replace(r"\ud83d\ude00", "\U0001f600")
    reader = Reader(FORMATS[name], None, schemas)
    _, _, calls = whole(reader.feed(text.replace("VALUE", wanted)) + reader.finish())
    assert json.loads(calls[0][1]) == {"a": ["\ufffd", "a\ufffdb", "\U0001f600", "\\ud800", "\u00e9"]}
    calls[0][1].encode()


def test_a_python_call_that_is_no_json_is_text() -> None:
    text = "<|tool_call_start|>[now(a={[]: 1})]<|tool_call_end|>"
    assert whole(read("lfm2", text)) == (text, "", [])


@pytest.mark.parametrize("name", ["qwen3_coder", "glm", "minimax"])
def test_definitions_stand_only_where_they_are_referred_to_and_are_bounded(name: str) -> None:
    long = {"enum": ["x" * 1000 + str(i) for i in range(200)]}
    numbers = {f"p{i}": {"type": "integer"} for i in range(200)}
    plain = {"type": "object", "properties": {**numbers, "one": {"$ref": "#/$defs/long"}}, "$defs": {"long": long}}
    rules = required(FORMATS[name], [Tool("f", plain)], {}.get, False)
    assert rules.count('"$defs"') == 1
    everywhere = {**plain, "properties": {key: {"$ref": "#/$defs/long"} for key in numbers}}
    with pytest.raises(RequestError, match="fewer tools"):
        required(FORMATS[name], [Tool("f", everywhere)], {}.get, False)
