"""LiteLLM: calls and streams."""

from __future__ import annotations

import json
import os

os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "true", "LITELLM_MODE": "PRODUCTION"}  # no downloads


def test_litellm(url: str) -> None:
    import litellm

    parameters = {"type": "object", "properties": {"place": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": parameters}}]
    given = {"model": "openai/scripted", "api_base": f"{url}/v1", "api_key": "unused", "temperature": 0}
    reply = litellm.completion(messages=[{"role": "user", "content": "weather"}], tools=tools, **given)
    assert json.loads(reply.choices[0].message.tool_calls[0].function.arguments) == {"place": "Bern"}
    pieces = litellm.completion(messages=[{"role": "user", "content": "hi"}], stream=True, **given)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == "Hello there!"
