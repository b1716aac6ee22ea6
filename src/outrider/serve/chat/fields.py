"""Body of POST /v1/chat/completions: messages, tools, thinking."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from outrider.serve.parsing import Strict
from outrider.serve.requests import MAX_MESSAGES, MAX_PARTS, MAX_TOKENS, RequestFields, Text, TextPart

MAX_TOOLS, MAX_CALLS = 128, 64
NAME = re.compile(r"^[A-Za-z0-9_.-]{1,64}$")
Name = Annotated[str, Field(pattern=NAME.pattern, max_length=64)]
Id = Annotated[str, Field(max_length=256)]


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: Text


Parts = Annotated[list[TextPart | RefusalPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class Called(Strict):
    """What a call names. parsed_arguments: added by the official client."""

    name: Name
    arguments: Text | None = None
    parsed_arguments: Any = None


class ToolCall(Strict):
    """A call of an earlier turn. index: of its stream, which some clients keep."""

    id: Id | None = None
    type: Literal["function"] = "function"
    function: Called
    index: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None


Nothing = Annotated[list[Any], Field(max_length=0)] | None
"""A list field that clients send unused: empty or null."""


class Message(Strict):
    """One message. Fields of this server's replies may be sent back unchanged, and so may fields that client libraries add."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Parts | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_call_id: Id | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    refusal: Text | None = None
    annotations: Nothing = None
    function_call: None = None
    audio: None = None
    parsed: Any = None  # added by the official client: the parsed `content`
    cache_control: Any = None
    id: Id | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        """Only an assistant's message may be empty, because some replies are."""
        if self.role != "assistant" and self.content is None:
            raise ValueError("content is needed: give a text (null is for messages of the assistant)")
        for name in ("refusal", "parsed", "tool_calls", "reasoning", "reasoning_content"):
            if self.role != "assistant" and getattr(self, name):
                raise ValueError(f"{name} is for messages of the assistant: leave it out")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of a tool needs tool_call_id, the id of the call that it answers")
        return self

    @property
    def text(self) -> str:
        if self.content is None:
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "".join(p.text if isinstance(p, TextPart) else p.refusal for p in self.content)

    @property
    def thought(self) -> str:
        """The thinking of an earlier turn, by either of its names."""
        return self.reasoning or self.reasoning_content or ""


class Function(Strict):
    """A function that may be called. strict: calls are always held to the schema when they are required."""

    name: Name
    description: Text | None = None
    parameters: Annotated[dict[str, Any], Field(max_length=256)] | None = None
    strict: bool | None = None


class ToolField(Strict):
    type: Literal["function"]
    function: Function
    cache_control: Any = None


class Named(Strict):
    name: Name


class NamedChoice(Strict):
    type: Literal["function"]
    function: Named


class Allowed(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: Allowed


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(RequestFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolField], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # what changes nothing here
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    web_search_options: Any = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


