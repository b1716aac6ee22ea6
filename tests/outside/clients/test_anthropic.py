"""Anthropic's library: calls, streams, results, counted tokens."""

from __future__ import annotations

from typing import Any


def test_anthropic(url: str) -> None:
    import anthropic

    client = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0)
    tool = {
        "name": "look_up",
        "description": "d",
        "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}},
    }
    given: dict[str, Any] = {"model": "scripted", "max_tokens": 100, "extra_body": {"temperature": 0}, "tools": [tool]}
    messages: list[Any] = [{"role": "user", "content": "weather"}]
    first = client.messages.create(messages=messages, **given)
    assert first.stop_reason == "tool_use" and first.content[-1].input == {"place": "Bern"}
    with client.messages.stream(messages=messages, **given) as stream:
        final = stream.get_final_message()
    assert [b.type for b in final.content] == ["text", "tool_use"]
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "cold"}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(messages=messages, **given).content[0].text == "It is cold in Bern."
    assert client.messages.count_tokens(model="scripted", messages=messages[:1]).input_tokens > 5
