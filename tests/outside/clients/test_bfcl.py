"""Tool sets of the Berkeley Function Calling Leaderboard, required mode: every call that a noisy model makes is valid.

OUTRIDER_BFCL: the folder of the package `bfcl_eval`, whose data is read where it is. Drafts change none of the texts.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from outrider.dialects.detect import Dialect
from outrider.params import SamplingParams
from outrider.serve.chat.fields import ChatRequest
from outrider.serve.chat.turn import Speech, messages_of, turn_of
from outrider.serve.parsing import parse
from outrider.serve.reading import added_tokens
from tests.serve.chatserver import chat_engine

if "OUTRIDER_BFCL" not in os.environ:
    pytest.skip("make test-bfcl", allow_module_level=True)
DATA = Path(os.environ["OUTRIDER_BFCL"]) / "data"
FILES = ("multiple", "parallel_multiple", "live_multiple", "live_parallel_multiple")
EACH = 5
TYPES = {"dict": "object", "float": "number", "tuple": "array"}


def as_schema(told: Any) -> Any:
    """JSON Schema of BFCL's own spelling of types; `any` is no restriction."""
    if isinstance(told, list):
        return [as_schema(one) for one in told]
    if not isinstance(told, dict):
        return told
    out = {key: as_schema(value) for key, value in told.items()}
    if isinstance(out.get("type"), str):
        out["type"] = TYPES.get(out["type"], out["type"])
        if out["type"] == "any":
            del out["type"]
    return out


def finite(number: str) -> float:
    """A number as a double; one that is too large for any (`1e999` is valid JSON) as the largest, since infinity is no JSON."""
    return max(min(float(number), sys.float_info.max), -sys.float_info.max)


def tool_sets() -> list[tuple[str, list[dict[str, Any]]]]:
    out = []
    for name in FILES:
        with (DATA / f"BFCL_v4_{name}.json").open(encoding="utf-8") as lines:
            for line in islice(lines, EACH):
                row = json.loads(line)
                tools = [{"type": "function", "function": {**f, "name": f["name"].replace(".", "_"),
                          "parameters": as_schema(f["parameters"])}} for f in row["function"]]  # fmt: skip
                out.append((row["id"], tools))
    return out


@pytest.fixture(scope="module")
def engine() -> Any:
    return chat_engine("hermes", noise=1.0, sure=4.0, rule="match", length=30_000)


@pytest.mark.parametrize(("name", "tools"), [pytest.param(*one, id=one[0]) for one in tool_sets()])
def test_required_calls_are_valid(engine: Any, name: str, tools: list[dict[str, Any]]) -> None:
    tokenizer = engine.tokenizer
    speech = Speech(Dialect("hermes"), added_tokens(tokenizer), template="x")
    messages = [{"role": "user", "content": "go on"}]
    request = parse(ChatRequest, {"model": "m", "messages": messages, "tools": tools, "tool_choice": "required"})
    turn = turn_of(request, speech)
    text = tokenizer.apply_chat_template(
        messages_of(request.messages, speech), tools=turn.shown, add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    params = {"seed": 1, "max_tokens": 900, "grammar": turn.grammar(None)}
    fast, slow = engine.generate([ids, ids], [SamplingParams(**params), SamplingParams(**params, draft_length=0)])
    assert fast.text == slow.text
    reader = turn.reader()
    pieces = reader.feed(fast.text) + reader.finish()
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in tools}
    made = {p.call: p.text for p in pieces if p.kind == "call"}
    assert made
    cut = fast.outputs[0].finish_reason == "length"
    for index, called in list(made.items())[: -1 if cut else None]:
        whole = "".join(p.text for p in pieces if p.kind == "arguments" and p.call == index)
        jsonschema_rs.validate(schemas[called], json.loads(whole, parse_float=finite))
    assert len(made) - cut >= 1, "no call was finished"
