"""Body of POST /v1/responses. Checked against openai-python 3.57's `ResponseCreateParams`, and what codex 0.171 sends."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from outrider.serve.chat.fields import MAX_TOOLS, Effort, Id, Name
from outrider.serve.parsing import Strict
from outrider.serve.requests import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOKENS,
    Harmless,
    JsonSchema,
    Speculation,
    StopString,
    Text,
)

MAX_KEYS = 4096
"""Keys of a tool of a type that is left out; `serve.body` refuses objects with more."""
Status = Annotated[str, Field(max_length=32)]


class Returned(Strict):
    """Something of an earlier reply that clients send back: unused fields that a client library has added, null, are left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_unused(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name in cls.model_fields}


class Part(Returned):
    """A part of a message: text in, text out, or a refusal."""

    type: Literal["input_text", "output_text", "refusal", "summary_text", "reasoning_text", "text"]
    text: Text | None = None
    refusal: Text | None = None
    annotations: Annotated[list[Any], Field(max_length=256)] | None = None
    logprobs: Any = None
    cache_control: Any = None


Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


class Item(Returned):
    """An item of the input: a message, a call, its output, or thinking."""

    type: Literal[
        "message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output", "reasoning"
    ] = "message"
    id: Id | None = None
    status: Status | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Text | Parts | None = None
    phase: Annotated[str, Field(max_length=64)] | None = None
    call_id: Id | None = None
    name: Name | None = None
    namespace: Name | None = None
    arguments: Text | None = None
    input: Text | None = None
    output: Text | Parts | None = None
    summary: Parts | None = None
    encrypted_content: Text | None = None
    internal_chat_message_metadata_passthrough: Any = None

    @model_validator(mode="after")
    def _is_whole(self) -> Item:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "custom_tool_call": ("call_id", "name", "input"),
            "function_call_output": ("call_id", "output"),
            "custom_tool_call_output": ("call_id", "output"),
        }
        for name in needed.get(self.type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is needed in an item of type {self.type}")
        return self


class ToolItem(Strict):
    """A tool of any type: functions and custom tools are served, a namespace holds more of them, and others are left out."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"maxProperties": MAX_KEYS})
    type: Annotated[str, Field(max_length=64)]
    name: Name | None = None
    description: Text | None = None
    parameters: Annotated[dict[str, Any], Field(max_length=256)] | None = None
    strict: bool | None = None
    tools: Annotated[list[ToolItem], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None


class Choice(Strict):
    """A tool that must be called, or those that may be."""

    type: Literal["function", "custom", "allowed_tools"]
    name: Name | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[ToolItem], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None = None


class Reasoning(Strict):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None  # the thinking is shown as it is
    generate_summary: Any = None
    context: Any = None


class TextFormat(JsonSchema):
    """The required form of the text; `schema` is needed by json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: Annotated[dict[str, Any] | None, Field(max_length=256)] = Field(None, alias="schema")  # type: ignore[assignment]


class TextField(Strict):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class StreamOptions(Strict):
    include_obfuscation: bool | None = None


class ResponseRequest(Harmless):
    """Body of POST /v1/responses."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolItem], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextField | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=16)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    # vLLM's and ours
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    speculation: Speculation | None = None
    # what changes nothing, and what is refused with a sentence
    client_metadata: Any = None
    max_tool_calls: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: Annotated[str, Field(max_length=256)] | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: None = None
