"""Body of POST /v1/chat/completions: messages, tools, thinking."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from outrider.serve.parsing import Strict
from outrider.serve.requests import MAX_MESSAGES, MAX_PARTS, MAX_TOKENS, ImagePart, RequestFields, Text, TextPart

MAX_TOOLS, MAX_CALLS = 128, 64
NAME = re.compile(r"^[A-Za-z0-9_.-]{1,64}$")
Name = Annotated[str, Field(pattern=NAME.pattern, max_length=64)]
Id = Annotated[str, Field(max_length=256)]


class RefusalPart(Strict):
    type: Literal["refusal"]
    """`refusal`."""
    refusal: Text
    """The text of an earlier refusal."""


Parts = Annotated[list[TextPart | RefusalPart | ImagePart], Field(max_length=MAX_PARTS, fail_fast=True)]


class Called(Strict):
    """What a call names. parsed_arguments: added by the official client."""

    name: Name
    """The function."""
    arguments: Text | None = None
    """Its arguments as JSON text."""
    parsed_arguments: Any = None
    """No effect: added by the official client."""


class ToolCall(Strict):
    """A call of an earlier turn. index: of its stream, which some clients keep."""

    id: Id | None = None
    """The call's id."""
    type: Literal["function"] = "function"
    """`function`."""
    function: Called
    """What is called."""
    index: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    """No effect."""


Nothing = Annotated[list[Any], Field(max_length=0)] | None
"""A list field that clients send unused: empty or null."""


def _said(part: TextPart | RefusalPart | ImagePart) -> str:
    """The text of a part."""
    return part.text if isinstance(part, TextPart) else part.refusal if isinstance(part, RefusalPart) else ""


class Message(Strict):
    """One message. Fields of this server's replies may be sent back unchanged, and so may fields that client libraries add."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks."""
    content: Text | Parts | None = None
    """The text, or parts of it."""
    name: Annotated[str, Field(max_length=64)] | None = None
    """Who speaks, for templates that show it."""
    tool_call_id: Id | None = None
    """The call that a message of a tool answers."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    """Calls of an earlier turn."""
    reasoning_content: Text | None = None
    """Thinking of an earlier turn."""
    reasoning: Text | None = None
    """The same by its other name."""
    refusal: Text | None = None
    """A refusal of an earlier turn."""
    annotations: Nothing = None
    """Empty or null."""
    function_call: None = None
    """Null."""
    audio: None = None
    """Null."""
    parsed: Any = None
    """No effect: added by the official client."""
    cache_control: Any = None
    """No effect."""
    id: Id | None = None
    """No effect."""

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        """Only an assistant's message may be empty, because some replies are."""
        if self.role != "assistant" and self.content is None:
            raise ValueError("content is needed: give a text (null is for messages of the assistant)")
        for name in ("refusal", "parsed", "tool_calls", "reasoning", "reasoning_content"):
            if self.role != "assistant" and getattr(self, name):
                raise ValueError(f"{name} is for messages of the assistant: leave it out")
        if self.images and self.role not in ("user", "tool"):
            raise ValueError("images are for messages of the user and of tools: leave them out")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of a tool needs tool_call_id, the id of the call that it answers")
        return self

    @property
    def text(self) -> str:
        if self.content is None:
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "".join(_said(p) for p in self.content)

    @property
    def images(self) -> list[str]:
        """The URLs of its images, in order."""
        parts = self.content if isinstance(self.content, list) else []
        return [p.image_url.url for p in parts if isinstance(p, ImagePart)]

    @property
    def parts(self) -> str | list[dict[str, str]]:
        """The text, or where it has images its parts, as templates take them."""
        if not self.images or not isinstance(self.content, list):
            return self.text
        return [
            {"type": "image"} if isinstance(p, ImagePart) else {"type": "text", "text": _said(p)} for p in self.content
        ]

    @property
    def thought(self) -> str:
        """The thinking of an earlier turn, by either of its names."""
        return self.reasoning or self.reasoning_content or ""


class Function(Strict):
    """A function that may be called. strict: accepted; calls that are required are always held to the schema, but for keywords
    that grammars do not know (docs/agents.md)."""

    name: Name
    """Its name."""
    description: Text | None = None
    """What it does, for the model."""
    parameters: Annotated[dict[str, Any], Field(max_length=256)] | None = None
    """A JSON schema of its arguments."""
    strict: bool | None = None
    """No effect: required calls are always held to the schema."""


class ToolField(Strict):
    type: Literal["function"]
    """`function`."""
    function: Function
    """The function."""
    cache_control: Any = None
    """No effect."""


class Named(Strict):
    name: Name
    """Its name."""


class NamedChoice(Strict):
    type: Literal["function"]
    """`function`."""
    function: Named
    """The function that must be called."""


class Allowed(Strict):
    mode: Literal["auto", "required"]
    """Whether one must be called."""
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]
    """Those that may be."""


class AllowedChoice(Strict):
    type: Literal["allowed_tools"]
    """`allowed_tools`."""
    allowed_tools: Allowed
    """The tools that may be called."""


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(RequestFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    """The conversation."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """The same as `max_tokens`, by its newer name."""
    logprobs: bool | None = None
    """Whether log-probabilities are sent."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Likely tokens beside each. Default 0."""
    tools: Annotated[list[ToolField], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Functions that the model may call; the client runs them."""
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | AllowedChoice | None = None
    """`auto` lets the model choose, `required` and a named function force a valid call."""
    parallel_tool_calls: bool | None = None
    """Whether a reply may hold several calls. Default true."""
    functions: Nothing = None
    """Empty or null: use `tools`."""
    function_call: Literal["none", "auto"] | None = None
    """No effect without `functions`."""
    reasoning_effort: Effort | None = None
    """How much to think, for templates that read it; `none` switches thinking off."""
    include_reasoning: bool | None = None
    """Whether thinking is sent. Default true."""
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    """Variables of the chat template."""
    add_generation_prompt: bool | None = None
    """Whether the template opens the assistant's turn. Default true."""
    continue_final_message: bool | None = None
    """Continue the last message instead of answering it."""
    # what changes nothing here
    verbosity: Literal["low", "medium", "high"] | None = None
    """No effect."""
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    """Only `text`."""
    web_search_options: Any = None
    """No effect."""

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
