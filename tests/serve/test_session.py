"""A coding agent's session of ten turns, sampled with seeds by a noisy model: every call is valid, and drafts change none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outrider.build import Engine
from outrider.dialects.detect import Dialect
from outrider.params import SamplingParams
from outrider.serve.chat.fields import ChatRequest
from outrider.serve.chat.turn import Speech, Turn, messages_of, turn_of
from outrider.serve.parsing import parse
from outrider.serve.reading import added_tokens
from tests.serve.chatserver import SCRIPTS, chat_engine

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": properties, "required": list(properties)[:1], "additionalProperties": False}}}
    for name, properties in (
        ("read_file", {"path": {"type": "string", "maxLength": 24}, "line": {"type": "integer", "minimum": 1, "maximum": 999}}),
        ("edit", {"path": {"type": "string", "maxLength": 24}, "how": {"type": "string", "enum": ["insert", "replace"]}}),
        ("run", {"command": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3}}),
    )
]  # fmt: skip
ANSWERS = [
    '{"name": "read_file", "arguments": {"path": "src/a.py", "line": 3}}', '{"name": "edit", "arguments": {"path": "src/a.py"}}',
    '{"name": "run", "arguments": {"command": ["make", "test"]}}',
]  # fmt: skip


def session(speech: Speech) -> list[tuple[ChatRequest, Turn]]:
    """Ten requests, each with the turns before it; the choices alternate."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You edit code."}, {"role": "user", "content": "fix it"}]
    out = []
    for i in range(10):
        choice = ("required", "auto")[i % 2]
        request = parse(ChatRequest, {"model": "m", "messages": messages, "tools": TOOLS, "tool_choice": choice})
        out.append((request, turn_of(request, speech)))
        call = {"id": f"c{i}", "type": "function", "function": json.loads(ANSWERS[i % 3])}
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        messages = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]}]
        messages += [{"role": "tool", "tool_call_id": f"c{i}", "content": f"result {i}"}]
    return out


def valid(name: str, arguments: dict[str, Any]) -> bool:
    properties = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}[name]["properties"]  # type: ignore[index]
    if set(arguments) - set(properties) or next(iter(properties)) not in arguments:
        return False
    kinds = {"string": str, "integer": int, "array": list}
    for key, value in arguments.items():
        schema = properties[key]
        if not isinstance(value, kinds[schema["type"]]) or value not in schema.get("enum", [value]):
            return False
        if isinstance(value, str) and len(value) > schema.get("maxLength", 99):
            return False
        if isinstance(value, int) and not 1 <= value <= 999:
            return False
        if isinstance(value, list) and (len(value) > 3 or any(len(one) > 12 for one in value)):
            return False
    return True


def run(engine: Engine, seeds: range) -> int:
    """The calls of seeded sessions, each checked; drafts must change nothing."""
    tokenizer = engine.tokenizer
    speech = Speech(Dialect("hermes"), added_tokens(tokenizer), template="x")
    for i, answer in enumerate(ANSWERS):
        SCRIPTS.update({f"result {n}": f"<tool_call>\n{answer}\n</tool_call>" for n in range(i, 10, 3)})
    SCRIPTS["fix it"] = f"<tool_call>\n{ANSWERS[2]}\n</tool_call>"
    calls = 0
    for seed in seeds:
        for number, (request, turn) in enumerate(session(speech)[seed % 3 :: 3]):
            text = tokenizer.apply_chat_template(
                messages_of(request.messages, speech), tools=turn.shown, add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer.encode(text, add_special_tokens=False)
            params = {"seed": 100 * seed + number, "max_tokens": 220, "grammar": turn.grammar(None)}
            fast, slow = engine.generate([ids, ids], [SamplingParams(**params), SamplingParams(**params, draft_length=0)])
            assert fast.text == slow.text
            reader = turn.reader()
            pieces = reader.feed(fast.text) + reader.finish()
            if fast.outputs[0].finish_reason == "length":
                continue
            made = {p.call: p.text for p in pieces if p.kind == "call"}
            assert made or turn.mode == "auto"
            for index, name in made.items():
                whole = "".join(p.text for p in pieces if p.kind == "arguments" and p.call == index)
                assert valid(name, json.loads(whole)), fast.text
            calls += len(made)
    return calls


def test_a_seeded_session_makes_valid_calls_that_drafts_do_not_change() -> None:
    assert run(chat_engine("hermes", noise=1.0, sure=4.0, rule="match"), range(3)) >= 5


@pytest.mark.slow
def test_two_hundred_seeded_sessions() -> None:
    assert run(chat_engine("hermes", noise=1.0, sure=4.0, rule="match"), range(200)) >= 300
