"""OpenAI's requests: the accepted fields and their bounds.

Every field is bounded here, before anything is allocated. Unknown and unsupported fields are refused; no field is ignored except
those that have no effect on the text by their definition (`Harmless`); docs/agents.md names every one.
Checked against OpenAI's openapi.yaml 2.3.0 (August 2026) and the extra fields of vLLM 0.33.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from outrider.serve.parsing import Strict

MAX_PROMPTS, MAX_PROMPT_TOKENS, MAX_TEXT = 64, 1 << 20, 2_000_000
MAX_MESSAGES, MAX_PARTS, MAX_TOKEN, MAX_TOKENS, MAX_LENGTH = 1024, 64, (1 << 31) - 1, (1 << 31) - 1, 64
MAX_ALLOWED = 1024

GONE = {
    **{f"guided_{kind}": f'send "structured_outputs": {{"{kind}": ...}}' for kind in ("json", "regex", "choice", "grammar")},
    "guided_decoding_backend": "leave it out, there is one",
    "guided_whitespace_pattern": 'send "structured_outputs": {"json": ..., "whitespace_pattern": ...}',
    "guided_json_object": 'send "structured_outputs": {"json_object": true}',
    "thinking_token_budget": "bound the whole reply by max_tokens",
}
"""Fields of older or other interfaces, and what to send instead."""
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Choice = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Token = Annotated[int, Field(ge=0, le=MAX_TOKEN)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$", max_length=10)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # nothing is obfuscated


class TextPart(Strict):
    type: Literal["text"]
    text: Text
    cache_control: Any = None  # agents mark what may be cached: every prompt is read anew


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


class StructuredOutputs(Strict):
    """vLLM's: exactly one of the first five. whitespace_pattern: what may stand between the parts of JSON."""

    json_: Annotated[dict[str, Any], Field(max_length=256)] | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Choice], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    grammar: Text | None = None
    json_object: Literal[True] | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: Annotated[str, Field(max_length=256)] | None = None


class Harmless(Strict):
    """Fields that clients send and that change nothing here: they steer billing, caches or the storing of replies."""

    service_tier: Annotated[str, Field(max_length=64)] | None = None
    store: bool | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    prompt_cache_retention: Annotated[str, Field(max_length=64)] | None = None
    prompt_cache_options: Any = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    moderation: Any = None
    priority: Annotated[int, Field(ge=-(1 << 31), le=(1 << 31) - 1)] | None = None
    request_id: Annotated[str, Field(max_length=256)] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    stream_include_usage: bool | None = None
    stream_continuous_usage_stats: bool | None = None


class RequestFields(Harmless):
    """Fields common to completions and chat completions."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    # vLLM's and SGLang's extra fields
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=256, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None  # fast tokenizers write none
    include_stop_str_in_output: Literal[False] | None = None
    allowed_token_ids: Annotated[list[Token], Field(min_length=1, max_length=MAX_ALLOWED, fail_fast=True)] | None = None
    bad_words: Annotated[list[StopString], Field(max_length=64, fail_fast=True)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
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
    echo: bool | None = None
    suffix: Text | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Its prompts, one or several, as text or as token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def top(self) -> int | None:
        return self.logprobs


def text_of(content: str | list[TextPart]) -> str:
    """The text of a message or prediction."""
    return content if isinstance(content, str) else "".join(part.text for part in content)
