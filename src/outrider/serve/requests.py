"""OpenAI's requests: the accepted fields and their bounds.

Every field is bounded here, before anything is allocated. Unknown and unsupported fields are refused; no field is ignored except
those that by OpenAI's definition have no effect on the text (`user`, `metadata`).
Checked against OpenAI's openapi.yaml 2.3.0 (August 2026) and the extra fields of vLLM 0.33.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from outrider.errors import RequestError, unknown_name

MAX_PROMPTS, MAX_PROMPT_TOKENS, MAX_TEXT = 64, 1 << 20, 2_000_000
MAX_MESSAGES, MAX_PARTS, MAX_TOKEN, MAX_TOKENS, MAX_LENGTH = 1024, 64, (1 << 31) - 1, (1 << 31) - 1, 64

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Token = Annotated[int, Field(ge=0, le=MAX_TOKEN)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$", max_length=10)]


class Strict(BaseModel):
    """No unknown keys, no implicit conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class PredictionField(Strict):
    """A continuation the client expects: a drafter proposes it; it never changes the distribution of the text."""

    type: Literal["content"]
    content: Content


class Speculation(Strict):
    """Options of speculation for this request. They never change the distribution, except `tv_budget` under a lossy rule that the
    operator allowed.

    mode: "off" is plain decoding. length: most tokens drafted per step. drafter, rule: must be the server's own.
    """

    mode: Literal["auto", "off"] = "auto"
    length: Annotated[int, Field(ge=0, le=MAX_LENGTH)] | None = None
    drafter: Annotated[str, Field(max_length=200)] | None = None
    rule: Annotated[str, Field(max_length=200)] | None = None
    tv_budget: Annotated[float, Field(ge=0, le=1e9)] | None = None


class JsonSchema(Strict):
    """A schema of `response_format`; `name`, `description` and `strict` are accepted, decoding is always strict."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    name: Annotated[str, Field(max_length=64)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema", max_length=256)]
    strict: bool | None = None


class ResponseFormat(Strict):
    """The required form of the text; checked along every drafted path (see sampling/grammar.py)."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def grammar(self) -> str | None:
        """The `grammar` of the sampling parameters."""
        if self.type == "text":
            return None
        return "json:" + json.dumps({"type": "object"} if self.json_schema is None else self.json_schema.schema_)


class RequestFields(Strict):
    """Fields common to completions and chat completions."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    # vLLM's and SGLang's extra fields
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=256, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: Literal[True] | None = None
    include_stop_str_in_output: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    # ours
    prediction: PredictionField | None = None
    speculation: Speculation | None = None

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def usage_in_stream(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_chunks(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(RequestFields):
    """Body of POST /v1/completions."""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=64)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Its prompts, one or several, as text or as token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def top(self) -> int | None:
        return self.logprobs


Nothing = Annotated[list[Any], Field(max_length=0)] | None
"""A list field of a message that clients send back unchanged: empty or null."""


class Message(Strict):
    """One message. Fields of this server's replies may be sent back unchanged, and so may fields that client libraries add."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    refusal: Text | None = None
    tool_calls: Nothing = None
    annotations: Nothing = None
    function_call: None = None
    audio: None = None
    parsed: Any = None  # added by the official client: the parsed `content`
    reasoning_content: None = None
    reasoning: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        """Only an assistant's message may be empty, because some replies are."""
        if self.role != "assistant" and self.content is None:
            raise ValueError("content is needed: give a text (null is for messages of the assistant)")
        for name in ("refusal", "parsed"):
            if self.role != "assistant" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for messages of the assistant: leave it out")
        return self

    @property
    def text(self) -> str:
        return text_of(self.content) if self.content is not None else self.refusal or ""


class ChatRequest(RequestFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


_FIELDS = frozenset(
    name
    for model in (
        CompletionRequest,
        ChatRequest,
        Message,
        TextPart,
        StreamOptions,
        PredictionField,
        Speculation,
        ResponseFormat,
    )
    for name in model.model_fields
)


class BadField(RequestError):
    """A field that cannot be served. param: its name. code: OpenAI's error code, if there is one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


def text_of(content: str | list[TextPart]) -> str:
    """The text of a message or prediction."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def parse(model: type[RequestFields], body: object) -> Any:
    """A checked request of the class `model`. Raises BadField with field and remedy, without repeating the client's values."""
    if not isinstance(body, dict):
        raise BadField("the body must be a JSON object")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = _worst(error)
    where = [str(part) for part in first["loc"] if not _is_branch(part)]
    if first["type"] == "extra_forbidden":
        name, known = str(first["loc"][-1])[:64], _fields_at(model, where)
        message = f"{unknown_name('field', name, known)} (or it is not supported here)"
        raise BadField(message, ".".join([*where, name])[:200])
    param = ".".join(where)[:200] or None
    raise BadField(f"{param or 'the body'}: {_plain(first)}", param)


def _worst(error: ValidationError) -> Any:
    """The error to report: one about an unknown field first, otherwise the one deepest in the body."""
    errors = error.errors(include_url=False, include_context=True, include_input=False)
    return next((e for e in errors if e["type"] == "extra_forbidden"), max(errors, key=lambda e: len(e["loc"])))


def _is_branch(part: object) -> bool:
    """Whether a part of a location names a branch of a union, or a client's key, instead of a field."""
    return isinstance(part, str) and part not in _FIELDS


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    nested: dict[str, type[BaseModel]] = {
        "stream_options": StreamOptions,
        "speculation": Speculation,
        "prediction": PredictionField,
        "response_format": ResponseFormat,
        "messages": Message,
    }
    inside = [part for part in path if part in nested]
    return list((nested[inside[0]] if inside else model).model_fields)


def _plain(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "literal_error":
        return f"{message}; other values are not supported"
    return message[0].lower() + message[1:]
