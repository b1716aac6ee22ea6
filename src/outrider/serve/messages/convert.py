"""From a request for a message to the chat request that it means."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from outrider.serve.chat.fields import ChatRequest
from outrider.serve.messages.fields import (
    CountRequest,
    ImageBlock,
    MessageField,
    MessageRequest,
    RedactedBlock,
    ResultBlock,
    TextBlock,
    ThinkingBlock,
    UseBlock,
)
from outrider.serve.parsing import BadField, parse


def chat_of(request: CountRequest) -> ChatRequest:
    """The chat request that a request means. Raises BadField for what cannot be served."""
    if request.output_config is not None and request.output_config.format is not None:
        raise BadField(
            "output_config.format is not supported: force a tool whose input_schema is the form", "output_config"
        )
    messages = [{"role": "system", "content": _text(request.system)}] if request.system else []
    for message in request.messages:
        messages += _messages(message)
    body: dict[str, Any] = {"model": request.model, "messages": messages}
    tools = [tool for tool in request.tools or [] if tool.type in (None, "custom")]
    if tools:
        body["tools"] = [{"type": "function", "function": _function(tool)} for tool in tools]
        body |= _choice(request)
    elif request.tool_choice is not None and request.tool_choice.type in ("any", "tool"):
        raise BadField("tool_choice needs a tool with an input_schema", "tool_choice")
    if request.thinking is not None:
        effort = (request.output_config and request.output_config.effort) or "medium"
        body["reasoning_effort"] = "none" if request.thinking.type == "disabled" else effort
    if isinstance(request, MessageRequest):
        body |= {"max_completion_tokens": request.max_tokens, "stop": request.stop_sequences}
        same = ("temperature", "top_p", "top_k", "stream")
        body |= {name: value for name in same if (value := getattr(request, name)) is not None}
        if request.speculation is not None:
            body["speculation"] = request.speculation.model_dump(exclude_none=True)
        user = (request.metadata or {}).get("user_id")
        body["user"] = user[:512] if isinstance(user, str) else None
    return parse(ChatRequest, {name: value for name, value in body.items() if value is not None})


def _function(tool: Any) -> dict[str, Any]:
    given = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {name: value for name, value in given.items() if value is not None}


def _choice(request: CountRequest) -> dict[str, Any]:
    choice = request.tool_choice
    if choice is None:
        return {}
    out: dict[str, Any] = {"parallel_tool_calls": not choice.disable_parallel_tool_use}
    if choice.type == "tool":
        if choice.name is None:
            raise BadField("tool_choice of type tool needs the tool's name", "tool_choice.name")
        return out | {"tool_choice": {"type": "function", "function": {"name": choice.name}}}
    return out | {"tool_choice": "required" if choice.type == "any" else choice.type}


def _messages(message: MessageField) -> Iterator[dict[str, Any]]:
    """The messages of a chat that one message is: results of tools are messages of their own, before the text beside them."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    text, calls, thought = list[str](), list[dict[str, Any]](), list[str]()
    shown = [block for block in message.content if isinstance(block, TextBlock | ImageBlock)]
    for block in message.content:
        if isinstance(block, TextBlock):
            text.append(block.text)
        elif isinstance(block, ImageBlock):
            if message.role != "user":
                raise BadField("images are blocks of the user", "messages")
        elif isinstance(block, ThinkingBlock):
            thought.append(block.thinking)
        elif isinstance(block, UseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ResultBlock):
            said = _content(block.content)
            if block.is_error:
                said = f"Error: {said}" if isinstance(said, str) else [{"type": "text", "text": "Error: "}, *said]
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": said}
        else:
            assert isinstance(block, RedactedBlock)
    if message.role == "assistant":
        more: dict[str, Any] = {"tool_calls": calls} if calls else {}
        yield {
            "role": "assistant",
            "content": "".join(text),
            **more,
            **({"reasoning": "".join(thought)} if thought else {}),
        }
    elif calls or thought:
        raise BadField("tool_use and thinking are blocks of the assistant", "messages")
    elif shown:
        yield {"role": message.role, "content": _content(shown)}


def _content(content: str | Sequence[TextBlock | ImageBlock] | None) -> str | list[dict[str, Any]]:
    """The text of a message or a result, or its parts if there are images among them."""
    if isinstance(content, str):
        return content
    blocks = content or ()
    if not any(isinstance(block, ImageBlock) for block in blocks):
        return _text([block for block in blocks if isinstance(block, TextBlock)])
    return [
        {"type": "text", "text": block.text}
        if isinstance(block, TextBlock)
        else {"type": "image_url", "image_url": {"url": block.source.data_url}}
        for block in blocks
    ]


def _text(content: str | list[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "\n\n".join(block.text for block in content or ())
