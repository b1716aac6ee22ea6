"""/v1/responses and /v1/messages: what their clients read, whole and streamed; and malformed requests of every new route."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from tests.serve.chatserver import SCRIPTS, chat_engine
from tests.serve.harness import Running, serving

CALL = '<tool_call>\n{"name": "look_up", "arguments": {"place": "Bern"}}\n</tool_call>'
NOTE = '<tool_call>\n{"name": "patch", "arguments": {"input": "a\\nb"}}\n</tool_call>'
SCHEMA = {
    "type": "object",
    "properties": {"place": {"type": "string"}},
    "required": ["place"],
    "additionalProperties": False,
}
FLAT: list[Any] = [
    {"type": "function", "name": "look_up", "description": "d", "strict": True, "parameters": SCHEMA},
    {"type": "custom", "name": "patch", "description": "d", "format": {"type": "text"}},
    {"type": "web_search"},
    {"type": "namespace", "name": "space", "tools": [{"type": "function", "name": "inner", "parameters": SCHEMA}]},
]
HERS = [
    {"name": "look_up", "description": "d", "input_schema": SCHEMA},
    {"type": "web_search_20250305", "name": "web_search"},
]
SCRIPTS |= {"weather": f"I ask.\n{CALL}", "note": NOTE, "cold": "It is cold.", "hi": "Hello there!"}
SCRIPTS["deep"] = f"Hm, so.\n</think>\n\nYes. {CALL}"


@pytest.fixture(scope="module")
def agents() -> Iterator[Running]:
    with serving(engine=chat_engine("thinker"), model="scripted", fixed=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(agents: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=agents.url + "/v1", api_key="unused", max_retries=0) as one:
        yield one


OFF: dict[str, Any] = {"reasoning": {"effort": "none"}}


def test_a_response_and_the_conversation_behind_it(client: openai.OpenAI) -> None:
    first = client.responses.create(model="scripted", input="weather", tools=FLAT, temperature=0, **OFF)
    assert first.status == "completed" and first.output_text == "I ask."
    kinds = [item.type for item in first.output]
    assert kinds == ["message", "function_call"]
    call: Any = first.output[1]
    assert call.name == "look_up" and json.loads(call.arguments) == {"place": "Bern"}
    items = [{"role": "user", "content": "weather"}, *(item.model_dump() for item in first.output)]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "cold"})
    more: dict[str, Any] = {"input": items, "instructions": "Be brief."}
    second = client.responses.create(model="scripted", tools=FLAT, temperature=0, **more, **OFF)
    assert second.output_text == "It is cold."
    assert second.usage is not None and second.usage.output_tokens > 0
    assert second.store is False


def test_custom_tools_and_thinking(client: openai.OpenAI) -> None:
    note: Any = client.responses.create(model="scripted", input="note", tools=FLAT, temperature=0, **OFF).output[0]
    assert (note.type, note.name, note.input) == ("custom_tool_call", "patch", "a\nb")
    deep = client.responses.create(model="scripted", input="deep", tools=FLAT, temperature=0)
    assert [item.type for item in deep.output] == ["reasoning", "message", "function_call"]
    assert deep.usage is not None and deep.usage.output_tokens_details.reasoning_tokens > 0


@pytest.mark.parametrize("text", ["hi", "weather", "note", "deep"])
def test_the_events_of_a_response_build_it(client: openai.OpenAI, text: str) -> None:
    """Numbers without gaps; every item is added, grows, and is done; the last event holds all of it, as the whole reply does."""
    more = {} if text == "deep" else OFF
    whole = client.responses.create(model="scripted", input=text, tools=FLAT, temperature=0, **more)
    events = list(client.responses.create(model="scripted", input=text, tools=FLAT, temperature=0, stream=True, **more))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    last: Any = events[-1]
    assert last.type == "response.completed"
    strip = lambda item: {k: v for k, v in item.model_dump().items() if k not in ("id", "call_id")}  # noqa: E731
    assert list(map(strip, last.response.output)) == list(map(strip, whole.output))
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert list(map(strip, done)) == list(map(strip, whole.output))
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert deltas == whole.output_text
    with client.responses.stream(model="scripted", input=text, tools=FLAT[:1], temperature=0, **more) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == (whole.output_text if text != "note" else "")


def test_what_needs_state_is_refused_in_a_sentence(agents: Running) -> None:
    body = {"model": "scripted", "input": "hi"}
    for more in (
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"conversation": "c"},
        {"prompt": {"id": "p"}},
    ):
        status, _, data = agents.call("POST", "/v1/responses", {**body, **more})
        error = json.loads(data)["error"]
        assert status == 400 and "send the whole conversation in input" in error["message"]
        assert error["param"] == next(iter(more))
    status, _, data = agents.call("POST", "/v1/responses", {**body, "top_logprobs": 2})
    assert status == 400 and json.loads(data)["error"]["param"] == "top_logprobs"
    cut = json.loads(agents.call("POST", "/v1/responses", {**body, "max_output_tokens": 3, **OFF})[2])
    assert cut["status"] == "incomplete" and cut["incomplete_details"]["reason"] == "max_output_tokens"


def events_of(data: bytes) -> list[dict[str, Any]]:
    frames = [f for f in data.decode().split("\n\n") if f.strip()]
    out = [json.loads(f.split("data: ", 1)[1]) for f in frames]
    assert [f.split("\n")[0].removeprefix("event: ") for f in frames] == [e["type"] for e in out]
    return out


def read_and_written(usage: dict[str, int]) -> tuple[int, int]:
    """Tokens of the prompt, new and kept ones, and of the reply."""
    return usage["input_tokens"] + usage["cache_read_input_tokens"], usage["output_tokens"]


@pytest.mark.parametrize("text", ["hi", "weather", "deep"])
def test_a_message_and_its_events(agents: Running, text: str) -> None:
    body: dict[str, Any] = {"model": "scripted", "max_tokens": 300, "temperature": 0, "tools": HERS}
    body["messages"] = [
        {"role": "user", "content": [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]}
    ]
    if text != "deep":
        body["thinking"] = {"type": "disabled"}
    status, _, data = agents.call("POST", "/v1/messages", body, {"x-api-key": "any", "anthropic-version": "2023-06-01"})
    whole = json.loads(data)
    assert status == 200, whole
    assert whole["stop_reason"] == ("end_turn" if text == "hi" else "tool_use")
    events = events_of(agents.call("POST", "/v1/messages", {**body, "stream": True})[2])
    assert events[0]["type"] == "message_start" and [e["type"] for e in events[-2:]] == [
        "message_delta",
        "message_stop",
    ]
    blocks = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    for event in events:
        if event["type"] == "content_block_delta":
            block, delta = blocks[event["index"]], event["delta"]
            kind = delta["type"].removesuffix("_delta")
            if kind == "input_json":
                block["json"] = block.get("json", "") + delta["partial_json"]
            else:
                block[kind] += delta[kind]
    for block, wanted in zip(blocks, whole["content"], strict=True):
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("json"))
            block.pop("id"), wanted.pop("id")
        assert block == wanted
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert read_and_written(events[-2]["usage"]) == read_and_written(whole["usage"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("value", ["1e400", "-1E+999", "1e-999", "9" * 300])
def test_a_number_that_no_float_holds_reaches_the_client_and_comes_back(
    agents: Running, value: str, stream: bool
) -> None:
    """The model may write it, since JSON has it: as a value of its own it cannot be written, so it is its text."""
    said = '<tool_call>\n{"name": "measure", "arguments": {"x": VALUE}}\n</tool_call>'
    SCRIPTS[f"measure {value}"] = said.replace("VALUE", value)
    tools = [{"name": "measure", "input_schema": {"type": "object", "properties": {"x": {"type": "number"}}}}]
    asked = {"role": "user", "content": f"measure {value}"}
    body = {"model": "scripted", "max_tokens": 400, "temperature": 0, "tools": tools, "thinking": {"type": "disabled"}}
    status, _, data = agents.call("POST", "/v1/messages", {**body, "messages": [asked], "stream": stream})
    assert status == 200
    if stream:
        said = "".join(
            e["delta"].get("partial_json", "") for e in events_of(data) if e["type"] == "content_block_delta"
        )
        assert said == '{"x": ' + value + "}"
        return
    use = json.loads(data)["content"][0]
    assert use["input"] == {"x": {"1e-999": 0.0, "9" * 300: int("9" * 300)}.get(value, value)}
    back = {"type": "tool_result", "tool_use_id": use["id"], "content": "cold"}
    more = [asked, {"role": "assistant", "content": [use]}, {"role": "user", "content": [back]}]
    assert agents.call("POST", "/v1/messages", {**body, "messages": more})[0] == 200


def test_results_of_tools_choices_and_counts(agents: Running) -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {"place": "Bern"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "cold"}]}
    messages = [
        {"role": "user", "content": "weather"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"}, use]},
        {"role": "user", "content": [result]},
    ]
    body = {
        "model": "scripted",
        "messages": messages,
        "tools": HERS,
        "system": "Be brief.",
        "thinking": {"type": "disabled"},
    }
    reply = json.loads(agents.call("POST", "/v1/messages", {**body, "max_tokens": 50, "temperature": 0})[2])
    assert reply["content"] == [{"type": "text", "text": "It is cold."}]
    counted = json.loads(agents.call("POST", "/v1/messages/count_tokens", body)[2])
    assert counted == {"input_tokens": read_and_written(reply["usage"])[0]}
    forced = {**body, "max_tokens": 200, "temperature": 0, "tool_choice": {"type": "tool", "name": "look_up"}}
    assert json.loads(agents.call("POST", "/v1/messages", forced)[2])["content"][0]["name"] == "look_up"
    stopped = {**body, "max_tokens": 50, "temperature": 0, "stop_sequences": ["cold"]}
    ended = json.loads(agents.call("POST", "/v1/messages", stopped)[2])
    assert (ended["stop_reason"], ended["stop_sequence"]) == ("stop_sequence", "cold")
    status, _, data = agents.call("POST", "/v1/messages", body)
    error = json.loads(data)
    assert status == 400 and error["type"] == "error" and error["error"]["param"] == "max_tokens"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}], "tool_choice": "auto"},
    "/v1/responses": {"model": "scripted", "input": [{"role": "user", "content": "hi"}], "max_output_tokens": 2, "tools": FLAT},
    "/v1/messages": {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "tools": HERS},
    "/v1/messages/count_tokens": {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]},
}  # fmt: skip


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*here, key)
        yield from places(one, (*here, key))


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_malformed_requests_end_in_4xx(agents: Running, path: str) -> None:
    """A part of a right body is replaced by anything, dropped, or joined by an unknown field: an answer, or a 4xx that says why."""
    right = ROUTES[path]

    @bounded(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.sampled_from(list(places(right))), JSON, st.sampled_from(["put", "drop", "add"]))
    def malformed(place: tuple[Any, ...], value: Any, how: str) -> None:
        body = json.loads(json.dumps(right))
        inside = body
        for key in place[:-1]:
            inside = inside[key]
        if how == "drop":
            del inside[place[-1]]
        elif how == "put" or not isinstance(inside, dict):
            inside[place[-1]] = value
        else:
            inside["unheard_of"] = value
        status, _, data = agents.call("POST", path, body)
        assert status in (200, 400, 404), (body, data)
        if status != 200:
            error = json.loads(data)["error"]
            assert {"message", "type", "param", "code"} <= set(error) and error["type"] == "invalid_request_error"

    malformed()
    assert agents.call("POST", path, right)[0] == 200
