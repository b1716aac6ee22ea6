"""Clients in Python as they are: each is skipped where it is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

os.environ |= {"OPENAI_API_KEY": "unused", "LITELLM_LOCAL_MODEL_COST_MAP": "true", "LITELLM_MODE": "PRODUCTION"}


def test_openai_tools_parse_and_responses(url: str) -> None:
    openai = pytest.importorskip("openai")
    pydantic = pytest.importorskip("pydantic")

    class Person(pydantic.BaseModel):
        name: str
        age: int

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    ask = [{"role": "user", "content": "person"}]
    parsed = client.chat.completions.parse(model="scripted", messages=ask, response_format=Person, temperature=0)
    assert parsed.choices[0].message.parsed == Person(name="Ada", age=36)
    answer = client.responses.parse(model="scripted", input="person", text_format=Person, temperature=0)
    assert answer.output_parsed == Person(name="Ada", age=36)
    with client.responses.stream(model="scripted", input="hi", temperature=0) as stream:
        assert stream.get_final_response().output_text == "Hello there!"


def test_anthropic(url: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0)
    tool = {"name": "look_up", "description": "d", "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}}}
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


def test_litellm(url: str) -> None:
    litellm = pytest.importorskip("litellm")
    parameters = {"type": "object", "properties": {"place": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": parameters}}]
    given = {"model": "openai/scripted", "api_base": f"{url}/v1", "api_key": "unused", "temperature": 0}
    reply = litellm.completion(messages=[{"role": "user", "content": "weather"}], tools=tools, **given)
    assert json.loads(reply.choices[0].message.tool_calls[0].function.arguments) == {"place": "Bern"}
    pieces = litellm.completion(messages=[{"role": "user", "content": "hi"}], stream=True, **given)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == "Hello there!"


def test_langchain_agent(url: str) -> None:
    pytest.importorskip("langchain_openai")
    prebuilt = pytest.importorskip("langgraph.prebuilt")
    from langchain_core.tools import tool  # type: ignore[import-not-found]
    from langchain_openai import ChatOpenAI  # type: ignore[import-not-found]

    asked = []

    @tool
    def look_up(place: str) -> str:
        """The weather of a place."""
        asked.append(place)
        return "cold"

    model = ChatOpenAI(model="scripted", base_url=f"{url}/v1", api_key="unused", temperature=0, max_retries=0)
    agent = prebuilt.create_react_agent(model, [look_up])
    out = agent.invoke({"messages": [("user", "weather")]})
    assert asked == ["Bern"] and out["messages"][-1].content == "It is cold in Bern."


def test_instructor(url: str) -> None:
    instructor = pytest.importorskip("instructor")
    openai = pytest.importorskip("openai")
    pydantic = pytest.importorskip("pydantic")

    class Person(pydantic.BaseModel):
        name: str
        age: int

    client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="unused"), mode=instructor.Mode.TOOLS)
    found = client.chat.completions.create(
        model="scripted", response_model=Person, temperature=0, messages=[{"role": "user", "content": "ada"}]
    )
    assert found.model_dump() == {"name": "Ada", "age": 36}  # of a class that instructor makes


def test_llm(url: str, tmp_path: Any) -> None:
    pytest.importorskip("llm")
    lines = f'- model_id: scripted\n  model_name: scripted\n  api_base: "{url}/v1"\n  supports_tools: true\n'
    (tmp_path / "extra-openai-models.yaml").write_text(lines)
    env = os.environ | {"LLM_USER_PATH": str(tmp_path)}
    command = [sys.executable, "-m", "llm", "-m", "scripted", "hi", "-o", "temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.strip() == "Hello there!", done.stderr
