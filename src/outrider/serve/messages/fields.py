"""Body of POST /v1/messages: Anthropic's shape, as its clients (and agents with a local server) send it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from outrider.serve.chat.fields import MAX_TOOLS, Id, Name
from outrider.serve.parsing import Strict
from outrider.serve.requests import MAX_MESSAGES, MAX_TOKENS, MAX_URL, Speculation, StopString, Text

MAX_BLOCKS = 256


class TextBlock(Strict):
    type: Literal["text"]
    """`text`."""
    text: Text
    """The text."""
    cache_control: Any = None
    """No effect."""
    citations: Any = None
    """No effect."""


class ImageSource(Strict):
    type: Literal["base64", "url"]
    """`base64`; `url` only for a data URL."""
    media_type: Literal["image/png", "image/jpeg", "image/webp", "image/gif"] | None = None
    """Its format, for `base64`."""
    data: Annotated[str, Field(max_length=MAX_URL)] | None = None
    """The file, for `base64`."""
    url: Annotated[str, Field(max_length=MAX_URL)] | None = None
    """A data URL: addresses are never fetched."""

    @property
    def data_url(self) -> str:
        """The image as a URL."""
        return (
            self.url or "" if self.type == "url" else f"data:{self.media_type or 'image/png'};base64,{self.data or ''}"
        )


class ImageBlock(Strict):
    type: Literal["image"]
    """`image`."""
    source: ImageSource
    """The file."""
    cache_control: Any = None
    """No effect."""


class ThinkingBlock(Strict):
    """Thinking of an earlier turn. signature: nothing is signed here."""

    type: Literal["thinking"]
    """`thinking`."""
    thinking: Text
    """The text."""
    signature: Text | None = None
    """No effect: nothing is signed here."""
    cache_control: Any = None
    """No effect."""


class RedactedBlock(Strict):
    """Thinking that another server has encrypted: it cannot be read, and is left out."""

    type: Literal["redacted_thinking"]
    """`redacted_thinking`."""
    data: Text
    """Left out: it cannot be read here."""


class UseBlock(Strict):
    type: Literal["tool_use"]
    """`tool_use`."""
    id: Id
    """The call's id."""
    name: Name
    """What is called."""
    input: Annotated[dict[str, Any], Field(max_length=256)]
    """Its arguments."""
    cache_control: Any = None
    """No effect."""
    caller: Any = None
    """No effect."""


class ResultBlock(Strict):
    type: Literal["tool_result"]
    """`tool_result`."""
    tool_use_id: Id
    """The call that is answered."""
    content: Text | Annotated[list[TextBlock | ImageBlock], Field(max_length=MAX_BLOCKS, fail_fast=True)] | None = None
    """What it gave."""
    is_error: bool | None = None
    """Whether it failed."""
    cache_control: Any = None
    """No effect."""


Block = Annotated[
    TextBlock | ImageBlock | ThinkingBlock | RedactedBlock | UseBlock | ResultBlock, Field(discriminator="type")
]
Blocks = Annotated[list[Block], Field(max_length=MAX_BLOCKS, fail_fast=True)]


class MessageField(Strict):
    role: Literal["user", "assistant", "system"]
    """Who speaks."""
    content: Text | Blocks
    """The text, or blocks."""


class ToolField(Strict):
    """A tool of the client. Tools that the service would run have another type, and are left out."""

    # as `serve.body` bounds objects
    model_config = ConfigDict(extra="allow", json_schema_extra={"maxProperties": 4096})
    type: Annotated[str, Field(max_length=64)] | None = None
    """Tools that the service would run have a type, and are left out."""
    name: Name
    """Its name."""
    description: Text | None = None
    """What it does, for the model."""
    input_schema: Annotated[dict[str, Any], Field(max_length=256)] | None = None
    """A JSON schema of its arguments."""
    cache_control: Any = None
    """No effect."""


class ChoiceField(Strict):
    type: Literal["auto", "any", "tool", "none"]
    """`auto` lets the model choose, `any` and `tool` force a valid call."""
    name: Name | None = None
    """The tool, for `tool`."""
    disable_parallel_tool_use: bool | None = None
    """At most one call."""


class ThinkingField(Strict):
    """Whether to think. budget_tokens: accepted; `max_tokens` bounds the whole reply."""

    type: Literal["enabled", "disabled", "adaptive"]
    """Whether to think."""
    budget_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """Bounds nothing: `max_tokens` bounds the whole reply."""
    display: Any = None
    """No effect."""


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """How much to think; counts only beside `thinking`."""
    format: Any = None
    """Refused: force a tool whose `input_schema` is the form."""


class CountRequest(Strict):
    """Body of POST /v1/messages/count_tokens, and what a request has in common with it."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """The served name."""
    messages: Annotated[list[MessageField], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    """The conversation."""
    system: Text | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS, fail_fast=True)] | None = None
    """The system message."""
    tools: Annotated[list[ToolField], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """What may be called; the client runs it."""
    tool_choice: ChoiceField | None = None
    """Whether and what must be called."""
    thinking: ThinkingField | None = None
    """Whether to think."""
    output_config: OutputConfig | None = None
    """How much to think."""
    cache_control: Any = None
    """No effect."""
    context_management: Any = None
    """No effect."""


class MessageRequest(CountRequest):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    """Most tokens of the reply."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0 takes the most likely token. Default 1."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Keep the smallest set of tokens with this probability. Default 1."""
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    """Keep the k most likely tokens."""
    stop_sequences: Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    """End the text before one of these."""
    stream: bool | None = None
    """Send events while the reply is decoded."""
    speculation: Speculation | None = None
    """How this request is drafted."""
    # what changes nothing here
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    """No effect beyond `user_id`, which is read as `user`."""
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    """No effect."""
    inference_geo: Any = None
    """No effect."""
    container: None = None
    """Null."""
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = None
    """Empty."""
