"""Body of POST /v1/messages: Anthropic's shape, as its clients (and agents with a local server) send it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from outrider.serve.chat.fields import MAX_TOOLS, Id, Name
from outrider.serve.parsing import Strict
from outrider.serve.requests import MAX_MESSAGES, MAX_TOKENS, Speculation, StopString, Text

MAX_BLOCKS = 256


class TextBlock(Strict):
    type: Literal["text"]
    text: Text
    cache_control: Any = None
    citations: Any = None


class ThinkingBlock(Strict):
    """Thinking of an earlier turn. signature: nothing is signed here."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None
    cache_control: Any = None


class RedactedBlock(Strict):
    """Thinking that another server has encrypted: it cannot be read, and is left out."""

    type: Literal["redacted_thinking"]
    data: Text


class UseBlock(Strict):
    type: Literal["tool_use"]
    id: Id
    name: Name
    input: Annotated[dict[str, Any], Field(max_length=256)]
    cache_control: Any = None
    caller: Any = None


class ResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: Id
    content: Text | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS, fail_fast=True)] | None = None
    is_error: bool | None = None
    cache_control: Any = None


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedBlock | UseBlock | ResultBlock, Field(discriminator="type")
]
Blocks = Annotated[list[Block], Field(max_length=MAX_BLOCKS, fail_fast=True)]


class MessageField(Strict):
    role: Literal["user", "assistant", "system"]
    content: Text | Blocks


class ToolField(Strict):
    """A tool of the client. Tools that the service would run have another type, and are left out."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"maxProperties": 4096})  # as `serve.body` bounds objects
    type: Annotated[str, Field(max_length=64)] | None = None
    name: Name
    description: Text | None = None
    input_schema: Annotated[dict[str, Any], Field(max_length=256)] | None = None
    cache_control: Any = None


class ChoiceField(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingField(Strict):
    """Whether to think. budget_tokens: accepted; `max_tokens` bounds the whole reply."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    display: Any = None


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Any = None


class CountRequest(Strict):
    """Body of POST /v1/messages/count_tokens, and what a request has in common with it."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[MessageField], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Text | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS, fail_fast=True)] | None = None
    tools: Annotated[list[ToolField], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ChoiceField | None = None
    thinking: ThinkingField | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None
    context_management: Any = None


class MessageRequest(CountRequest):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    speculation: Speculation | None = None
    # what changes nothing here
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    inference_geo: Any = None
    container: None = None
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = None
