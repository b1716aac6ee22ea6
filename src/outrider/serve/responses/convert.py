"""From a request for a response to the chat request that it means, and to the description of it that replies repeat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from outrider.serve.chat.fields import ChatRequest
from outrider.serve.parsing import BadField, parse
from outrider.serve.responses.fields import Choice, Item, Parts, ResponseRequest, ToolItem

STATELESS = "this server keeps no responses: send the whole conversation in input"
TEXT = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
"""The parameters of a custom tool: its one text."""


@dataclass(slots=True)
class Tools:
    """The tools of a request. functions: as a chat request has them. custom: names of those that take one text. spaces: the
    namespace of each name that came in one. skipped: types that this server cannot run."""

    functions: list[dict[str, Any]] = field(default_factory=list)
    custom: set[str] = field(default_factory=set)
    spaces: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def add(self, tools: list[ToolItem], space: str | None = None) -> None:
        """Take tools in, those of namespaces too."""
        for tool in tools:
            if tool.type == "namespace":
                self.add(tool.tools or [], tool.name or space)
            elif tool.type in ("function", "custom"):
                if tool.name is None:
                    raise BadField("a tool needs a name", "tools")
                self._function(tool, tool.name, space)
            else:
                self.skipped.append(tool.type)

    def _function(self, tool: ToolItem, name: str, space: str | None) -> None:
        parameters = tool.parameters
        if tool.type == "custom":
            self.custom.add(name)
            parameters = TEXT
        if space is not None:
            self.spaces[name] = space
        function = {"name": name, "description": tool.description, "parameters": parameters, "strict": tool.strict}
        self.functions.append({"type": "function", "function": {k: v for k, v in function.items() if v is not None}})


def chat_of(request: ResponseRequest) -> tuple[ChatRequest, Tools]:
    """The chat request that a request for a response means. Raises BadField for what needs stored state."""
    if request.previous_response_id is not None:
        raise BadField(STATELESS, "previous_response_id", "previous_response_not_found")
    for name in ("background", "conversation", "prompt"):
        if getattr(request, name):
            raise BadField(f"{name} is not possible: {STATELESS}", name)
    tools = Tools()
    tools.add(request.tools or [])
    same = (
        "model", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "user", "stop",
        "frequency_penalty", "parallel_tool_calls", "stream", "chat_template_kwargs",
    )  # fmt: skip
    body = {name: value for name in same if (value := getattr(request, name)) is not None}
    body |= {"messages": messages_of(request), "max_completion_tokens": request.max_output_tokens}
    if tools.functions:
        body |= {"tools": tools.functions, "tool_choice": _choice(request.tool_choice)}
    elif request.tool_choice == "required" or isinstance(request.tool_choice, Choice):
        raise BadField("tool_choice needs a tool that this server can offer: a function or a custom one", "tool_choice")
    if request.reasoning is not None:
        body["reasoning_effort"] = request.reasoning.effort
    if request.text is not None and request.text.format is not None:
        body["response_format"] = _format(request.text.format)
    if request.speculation is not None:
        body["speculation"] = request.speculation.model_dump(exclude_none=True)
    if "message.output_text.logprobs" in (request.include or []):
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    elif request.top_logprobs:
        raise BadField('top_logprobs needs "message.output_text.logprobs" in include', "top_logprobs")
    return parse(ChatRequest, {name: value for name, value in body.items() if value is not None}), tools


def _choice(choice: Any) -> Any:
    if not isinstance(choice, Choice):
        return choice
    if choice.type != "allowed_tools":
        return {"type": "function", "function": {"name": choice.name}}
    tools = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools or []]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode or "auto", "tools": tools}}


def _format(wanted: Any) -> dict[str, Any]:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    if wanted.schema_ is None:
        raise BadField("text.format of type json_schema needs a schema", "text")
    return {"type": "json_schema", "json_schema": {"name": wanted.name, "schema": wanted.schema_}}


def messages_of(request: ResponseRequest) -> list[dict[str, Any]]:
    """The messages of a chat request: neighbouring thinking, text and calls of the assistant are one turn."""
    items = [Item(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    out: list[dict[str, Any]] = []
    if request.instructions:
        out.append({"role": "system", "content": request.instructions})
    for message in map(_message, items):
        last = out[-1] if out else None
        same = last is not None and last["role"] == message["role"] == "assistant"
        if last is not None and same and not (last.get("tool_calls") and message["content"]):
            _merge(last, message)
        else:
            out.append(message)
    return out


def _merge(last: dict[str, Any], more: dict[str, Any]) -> None:
    """Add to a turn of the assistant."""
    for name in ("content", "reasoning"):
        if more.get(name):
            last[name] = (last.get(name) or "") + more[name]
    if more.get("tool_calls"):
        last["tool_calls"] = [*last.get("tool_calls", []), *more["tool_calls"]]


def _message(item: Item) -> dict[str, Any]:
    if item.type == "message":
        content = _content(item.content)
        if item.role != "user" and not isinstance(content, str):
            raise BadField("images are for messages of the user: leave them out", "input")
        return {"role": item.role, "content": content}
    if item.type == "reasoning":
        thought = _text(item.content) or "".join(_texts(item.summary))
        return {"role": "assistant", "content": "", **({"reasoning": thought} if thought else {})}
    if item.type in ("function_call_output", "custom_tool_call_output"):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)}
    arguments = item.arguments if item.type == "function_call" else json.dumps({"input": item.input})
    function = {"name": item.name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": item.call_id, "type": "function", "function": function}],
    }


def _content(content: str | Parts | None) -> str | list[dict[str, Any]]:
    """The text of a message or an output, or its parts if there are images among them."""
    if isinstance(content, str) or not any(part.type == "input_image" for part in content or ()):
        return _text(content)
    return [
        {"type": "image_url", "image_url": {"url": part.image_url or ""}}
        if part.type == "input_image"
        else {"type": "text", "text": part.text or part.refusal or ""}
        for part in content or ()
    ]


def _text(content: str | Parts | None) -> str:
    return content if isinstance(content, str) else "".join(_texts(content))


def _texts(parts: Parts | None) -> Iterator[str]:
    return ((part.text or part.refusal or "") for part in parts or ())
