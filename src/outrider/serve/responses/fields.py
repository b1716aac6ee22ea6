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
    MAX_URL,
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
    """A part of a message: text in, text out, a refusal, or an image."""

    type: Literal["input_text", "output_text", "refusal", "summary_text", "reasoning_text", "text", "input_image"]
    """Its kind."""
    text: Text | None = None
    """The text."""
    refusal: Text | None = None
    """A refusal."""
    image_url: Annotated[str, Field(max_length=MAX_URL)] | None = None
    """A data URL of an image; addresses are never fetched."""
    detail: Literal["auto", "low", "high", "original"] | None = None
    """No effect: the model's own processor chooses the size."""
    file_id: None = None
    """Null: no files are kept here."""
    annotations: Annotated[list[Any], Field(max_length=256)] | None = None
    """No effect."""
    logprobs: Any = None
    """No effect."""
    cache_control: Any = None
    """No effect."""


Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


class Item(Returned):
    """An item of the input: a message, a call, its output, or thinking."""

    type: Literal[
        "message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output", "reasoning"
    ] = "message"
    """Its kind."""
    id: Id | None = None
    """No effect."""
    status: Status | None = None
    """No effect."""
    role: Literal["user", "assistant", "system", "developer"] | None = None
    """Who speaks, in a message."""
    content: Text | Parts | None = None
    """Of a message or of thinking."""
    phase: Annotated[str, Field(max_length=64)] | None = None
    """No effect."""
    call_id: Id | None = None
    """The call."""
    name: Name | None = None
    """What is called."""
    namespace: Name | None = None
    """Where it is defined."""
    arguments: Text | None = None
    """Arguments of a function, as JSON text."""
    input: Text | None = None
    """The text of a custom tool's call."""
    output: Text | Parts | None = None
    """What a call gave."""
    summary: Parts | None = None
    """Thinking of an earlier turn."""
    encrypted_content: Text | None = None
    """Left out: it cannot be read here."""
    internal_chat_message_metadata_passthrough: Any = None
    """No effect."""

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
    """`function`, `custom`, `namespace`; tools of other types are left out and named in the reply."""
    name: Name | None = None
    """Its name."""
    description: Text | None = None
    """What it does, for the model."""
    parameters: Annotated[dict[str, Any], Field(max_length=256)] | None = None
    """A JSON schema of its arguments."""
    strict: bool | None = None
    """No effect."""
    tools: Annotated[list[ToolItem], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """The tools of a namespace."""


class Choice(Strict):
    """A tool that must be called, or those that may be."""

    type: Literal["function", "custom", "allowed_tools"]
    """What is chosen."""
    name: Name | None = None
    """The tool that must be called."""
    mode: Literal["auto", "required"] | None = None
    """Whether one of `tools` must be called."""
    tools: Annotated[list[ToolItem], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Those that may be."""


class Reasoning(Strict):
    effort: Effort | None = None
    """How much to think, for templates that read it."""
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    """No effect: the thinking is shown as it is."""
    generate_summary: Any = None
    """No effect."""
    context: Any = None
    """No effect."""


class TextFormat(JsonSchema):
    """The required form of the text; `schema` is needed by json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    """What the text must be."""
    schema_: Annotated[dict[str, Any] | None, Field(max_length=256)] = Field(None, alias="schema")
    """The schema, for `json_schema`."""


class TextField(Strict):
    format: TextFormat | None = None
    """The form that the text must have."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """No effect."""


class StreamOptions(Strict):
    include_obfuscation: bool | None = None
    """No effect: nothing is obfuscated."""


class ResponseRequest(Harmless):
    """Body of POST /v1/responses."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """The served name."""
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    """A text, or the items of the conversation."""
    instructions: Text | None = None
    """A system message in front."""
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """Most tokens of the reply."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0 takes the most likely token. Default 1."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Keep the smallest set of tokens with this probability. Default 1."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Likely tokens beside each."""
    tools: Annotated[list[ToolItem], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """What may be called; the client runs it."""
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    """Whether and what must be called."""
    parallel_tool_calls: bool | None = None
    """Whether a reply may hold several calls. Default true."""
    reasoning: Reasoning | None = None
    """How to think."""
    text: TextField | None = None
    """The form of the text."""
    stream: bool | None = None
    """Send events while the reply is decoded."""
    stream_options: StreamOptions | None = None
    """No effect."""
    include: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=16)] | None = None
    """`message.output_text.logprobs` sends log-probabilities; others have no effect."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """As in chat."""
    # vLLM's and ours
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    """Keep the k most likely tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Drop tokens less likely than this share of the most likely one."""
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    """The same seed gives the same text."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """As in chat."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """As in chat."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """As in chat."""
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    """End the text before one of these."""
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    """Variables of the chat template."""
    speculation: Speculation | None = None
    """How this request is drafted."""
    # what changes nothing, and what is refused with a sentence
    client_metadata: Any = None
    """No effect."""
    max_tool_calls: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """No effect: the server runs no tools."""
    truncation: Literal["auto", "disabled"] | None = None
    """No effect: an input that is too long is refused."""
    previous_response_id: Annotated[str, Field(max_length=256)] | None = None
    """Refused: nothing is stored; send the conversation as `input`."""
    background: bool | None = None
    """Refused unless false."""
    conversation: Any = None
    """Refused: nothing is stored."""
    prompt: Any = None
    """Refused: nothing is stored."""
    context_management: None = None
    """Null."""
