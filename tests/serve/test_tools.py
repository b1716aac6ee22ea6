"""Tools over HTTP: calls of every choice, whole and streamed, under speculation and without, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serve.chatserver import SCRIPTS, chat_engine
from tests.serve.harness import Running, serving

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look_up", "description": "Looks up.", "strict": True, "parameters": {
        "type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}, "required": ["place"],
        "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now", "strict": True, "parameters": {
        "type": "object", "properties": {}, "required": [], "additionalProperties": False}}},
]  # fmt: skip
ONE = '<tool_call>\n{"name": "look_up", "arguments": {"place": "Bern", "days": 3}}\n</tool_call>'
TWO = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
SCRIPTS |= {"one": f"Let me see.\n{ONE}", "both": f"{ONE}\n{TWO}", "sunny": "It is sunny.", "hello": "Hello!"}


@pytest.fixture(scope="module")
def hermes() -> Iterator[Running]:
    with serving(engine=chat_engine("hermes"), model="scripted", fixed=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(hermes: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=hermes.url + "/v1", api_key="unused", max_retries=0) as one:
        yield one


def ask(client: openai.OpenAI, text: str, **more: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    given = {"model": "scripted", "messages": messages, "temperature": 0, "tools": TOOLS, **more}
    return client.chat.completions.create(**given)


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or []]


def test_a_call_that_the_model_chooses_and_its_result(client: openai.OpenAI) -> None:
    reply = ask(client, "one").choices[0]
    assert reply.finish_reason == "tool_calls"
    assert reply.message.content == "Let me see."
    assert calls_of(reply.message) == [("look_up", {"place": "Bern", "days": 3})]
    call = reply.message.tool_calls[0]
    messages = [
        {"role": "user", "content": "one"},
        reply.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    after: Any = client.chat.completions.create(model="scripted", messages=messages, tools=TOOLS, temperature=0)  # type: ignore
    assert after.choices[0].message.content == "It is sunny."
    assert after.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["none", "auto", "required", {"type": "function", "function": {"name": "now"}}])
@pytest.mark.parametrize("text", ["hello", "one", "both"])
def test_choices(client: openai.OpenAI, choice: Any, text: str) -> None:
    """Whatever the model wants to say, required and named calls are made, and none are where none is chosen."""
    reply = ask(client, text, tool_choice=choice, max_tokens=300).choices[0]
    found = calls_of(reply.message)
    if choice == "none":
        assert not found and reply.message.content == SCRIPTS[text]
    elif choice == "auto":
        assert len(found) == {"hello": 0, "one": 1, "both": 2}[text]
    elif choice == "required":
        assert found and reply.finish_reason in ("tool_calls", "length")
    else:
        assert [name for name, _ in found] == ["now"]
        assert reply.finish_reason == "stop"


def test_one_call_only_if_no_parallel_ones_are_wanted(client: openai.OpenAI) -> None:
    assert len(calls_of(ask(client, "both", parallel_tool_calls=False).choices[0].message)) == 1


@pytest.mark.parametrize("text", ["hello", "one", "both"])
def test_a_stream_is_the_whole_reply_in_pieces(client: openai.OpenAI, text: str) -> None:
    """An id, a name and a role come once, and the pieces of the arguments join to those of the whole reply."""
    whole = ask(client, text).choices[0]
    content, calls, reason = "", dict[int, dict[str, Any]](), None
    roles = 0
    for chunk in ask(client, text, stream=True):
        for choice in chunk.choices:
            roles += choice.delta.role is not None
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for part in choice.delta.tool_calls or []:
                if part.index not in calls:
                    assert part.id and part.type == "function" and part.function.arguments == ""
                    calls[part.index] = {"name": part.function.name, "arguments": ""}
                else:
                    assert part.id is None and part.function.name is None
                calls[part.index]["arguments"] += part.function.arguments or ""
    assert roles == 1
    assert reason == whole.finish_reason
    assert content == (whole.message.content or "")
    made = [(c["name"], c["arguments"]) for c in calls.values()]
    assert made == [(c.function.name, c.function.arguments) for c in whole.message.tool_calls or []]
    with client.chat.completions.stream(
        model="scripted", messages=[{"role": "user", "content": text}], tools=TOOLS, temperature=0
    ) as stream:
        final = stream.get_final_completion().choices[0].message
    assert len(final.tool_calls or []) == len(calls)


def test_speculation_does_not_change_a_call(client: openai.OpenAI) -> None:
    for text in ("one", "both"):
        for choice in ("auto", "required"):
            given = {"tool_choice": choice, "max_tokens": 200}
            fast = ask(client, text, **given).choices[0].message
            slow = ask(client, text, extra_body={"speculation": {"mode": "off"}}, **given).choices[0].message
            assert calls_of(fast) == calls_of(slow) and fast.content == slow.content


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": TOOLS + TOOLS}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "gone"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"unheard_of": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"thinking_budget": 1}}, "chat_template_kwargs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"guided_json": {}}, "guided_json"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"tool_format": "x"}, "tool_format"),
    ],
)
def test_what_is_refused(hermes: Running, body: dict[str, Any], param: str) -> None:
    given = {"model": "scripted", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **body}
    status, _, data = hermes.call("POST", "/v1/chat/completions", given)
    error = json.loads(data)["error"]
    assert (status, error["param"]) == (400, param), error


def test_a_model_without_calls_takes_no_tools() -> None:
    with serving(engine=chat_engine("plain"), model="scripted", fixed=True) as running:
        body = {"model": "scripted", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
        assert (
            json.loads(running.call("POST", "/v1/chat/completions", body)[2])["choices"][0]["message"]["content"]
            == "Hello!"
        )
        status, _, data = running.call("POST", "/v1/chat/completions", {**body, "tools": TOOLS})
        assert status == 400 and "--tool-format" in json.loads(data)["error"]["message"]


def test_thinking_comes_first_and_apart() -> None:
    SCRIPTS["think"] = f"I need it.\n</think>\n\nHere: {TWO}"
    with serving(engine=chat_engine("thinker"), model="scripted", fixed=True) as running:
        body = {"model": "scripted", "messages": [{"role": "user", "content": "think"}], "temperature": 0}
        ask = lambda **more: json.loads(running.call("POST", "/v1/chat/completions", {**body, **more})[2])  # noqa: E731
        reply = ask(tools=TOOLS)
        message = reply["choices"][0]["message"]
        assert message["reasoning"] == message["reasoning_content"] == "I need it."
        assert message["content"] == "Here:" and message["tool_calls"][0]["function"]["name"] == "now"
        assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] > 5
        assert ask(include_reasoning=False)["choices"][0]["message"].get("reasoning") is None
        forced = ask(tools=TOOLS, tool_choice="required")["choices"][0]["message"]
        assert forced["reasoning"] == "I need it." and forced["tool_calls"]
        formed = ask(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 7}}})
        assert formed["choices"][0]["message"]["content"] == "7"
        assert formed["choices"][0]["message"]["reasoning"] == "I need it."
        plain = ask(reasoning_effort="none", messages=[{"role": "user", "content": "hello"}])["choices"][0]["message"]
        assert plain["content"] == "Hello!" and "reasoning" not in plain
        back = {"role": "assistant", "content": "a", "reasoning": "b"}
        sizes = []
        # both names are accepted in, and shown to the template
        for more in (back, {"role": "assistant", "content": "a"}):
            said = ask(messages=[{"role": "user", "content": "hello"}, more, {"role": "user", "content": "hello"}])
            sizes.append(said["usage"]["prompt_tokens"])
        assert sizes[0] > sizes[1]
