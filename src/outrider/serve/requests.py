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
MAX_URL = 28_000_000
"""Longest data URL of an image: a file of 20 MiB."""

GONE = {
    **{
        f"guided_{kind}": f'send "structured_outputs": {{"{kind}": ...}}'
        for kind in ("json", "regex", "choice", "grammar")
    },
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
    """A last chunk with the numbers of tokens."""
    continuous_usage_stats: bool | None = None
    """The numbers of tokens so far in every chunk."""
    include_obfuscation: bool | None = None
    """No effect: nothing is obfuscated (`outrider serve --pad-streams` evens frames out)."""


class TextPart(Strict):
    type: Literal["text"]
    """`text`."""
    text: Text
    """The text."""
    cache_control: Any = None
    """No effect: agents mark what may be cached, and the server finds it by itself."""


class ImageUrl(Strict):
    url: Annotated[str, Field(max_length=MAX_URL)]
    """A data URL of a PNG, JPEG, WebP or GIF file (`data:image/png;base64,...`); addresses are never fetched."""
    detail: Literal["auto", "low", "high", "original"] | None = None
    """No effect: the model's own processor chooses the size."""


class ImagePart(Strict):
    type: Literal["image_url"]
    """`image_url`."""
    image_url: ImageUrl
    """The image."""
    cache_control: Any = None
    """No effect."""


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class PredictionField(Strict):
    """A continuation the client expects: a drafter proposes it; it never changes the distribution of the text."""

    type: Literal["content"]
    """`content`."""
    content: Content
    """The expected continuation."""


class Speculation(Strict):
    """Options of speculation for this request. They never change the distribution, except `tv_budget` under a lossy rule that the
    operator allowed.

    mode: "off" is plain decoding. length: most tokens drafted per step. drafter, rule: must be the server's own.
    """

    mode: Literal["auto", "off"] = "auto"
    """`off` decodes plainly; `auto` lets the server draft."""
    length: Annotated[int, Field(ge=0, le=MAX_LENGTH)] | None = None
    """Most draft tokens of a step."""
    drafter: Annotated[str, Field(max_length=200)] | None = None
    """Must name the server's own drafter."""
    rule: Annotated[str, Field(max_length=200)] | None = None
    """Must name the server's own rule."""
    tv_budget: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """Total variation that a lossy rule may spend; only where the operator allowed one."""


class JsonSchema(Strict):
    """A schema of `response_format`; `name`, `description` and `strict` are accepted, decoding is always strict."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    name: Annotated[str, Field(max_length=64)] | None = None
    """No effect."""
    description: Annotated[str, Field(max_length=4096)] | None = None
    """No effect."""
    schema_: Annotated[dict[str, Any], Field(alias="schema", max_length=256)]
    """The JSON schema that the text must fit."""
    strict: bool | None = None
    """No effect: decoding is always strict."""


class ResponseFormat(Strict):
    """The required form of the text; checked along every drafted path (see sampling/automaton.py)."""

    type: Literal["text", "json_object", "json_schema"]
    """What the text must be."""
    json_schema: JsonSchema | None = None
    """The schema, for `json_schema`."""

    @property
    def grammar(self) -> str | None:
        """The `grammar` of the sampling parameters."""
        if self.type == "text":
            return None
        return "json:" + json.dumps({"type": "object"} if self.json_schema is None else self.json_schema.schema_)


class StructuredOutputs(Strict):
    """vLLM's: exactly one of the first five. whitespace_pattern: what may stand between the parts of JSON."""

    json_: Annotated[dict[str, Any], Field(max_length=256)] | Text | None = Field(None, alias="json")
    """A JSON schema, as an object or as its text."""
    regex: Text | None = None
    """A regular expression for the whole text."""
    choice: Annotated[list[Choice], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    """The texts, one of which is written."""
    grammar: Text | None = None
    """A grammar in Lark's notation."""
    json_object: Literal[True] | None = None
    """Any JSON object."""
    disable_any_whitespace: bool | None = None
    """No white space between the parts of JSON."""
    whitespace_pattern: Annotated[str, Field(max_length=256)] | None = None
    """What may stand between the parts of JSON, as a regular expression."""


class Harmless(Strict):
    """Fields that clients send and that change nothing here: they steer billing, caches or the storing of replies."""

    service_tier: Annotated[str, Field(max_length=64)] | None = None
    """No effect."""
    store: bool | None = None
    """No effect: nothing is stored."""
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    """No effect."""
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    """No effect."""
    prompt_cache_retention: Annotated[str, Field(max_length=64)] | None = None
    """No effect."""
    prompt_cache_options: Any = None
    """No effect."""
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    """No effect."""
    moderation: Any = None
    """No effect."""
    priority: Annotated[int, Field(ge=-(1 << 31), le=(1 << 31) - 1)] | None = None
    """No effect."""
    request_id: Annotated[str, Field(max_length=256)] | None = None
    """No effect."""
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    """What is kept of prompts is shared only between requests with the same salt."""
    stream_include_usage: bool | None = None
    """No effect: use `stream_options`."""
    stream_continuous_usage_stats: bool | None = None
    """No effect: use `stream_options`."""


class RequestFields(Harmless):
    """Fields common to completions and chat completions."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """The served name, as `GET /v1/models` says."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0 takes the most likely token. Default 1."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Keep the smallest set of tokens with this probability; 0 is greedy. Default 1."""
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    """Independent samples. Default 1."""
    stream: bool | None = None
    """Send chunks as server-sent events while the text is decoded."""
    stream_options: StreamOptions | None = None
    """What the stream says besides."""
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    """End the text before one of these."""
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    """The same seed gives the same text (with `match` under any drafter)."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from the logits of tokens that stand in the output. Default 0."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted for every time that a token stands in the output. Default 0."""
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] | None = None
    """Added to the logits of tokens, by token id."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Tells a live experiment whose request it is; no effect otherwise."""
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    """Most tokens of the text. 0 with `echo` scores the prompt alone."""
    # vLLM's and SGLang's extra fields
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN)] | None = None
    """Keep the k most likely tokens; 0 or -1 keeps all. Default 0."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Drop tokens less likely than this share of the most likely one. Default 0."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Divide the logits of tokens that stand in prompt or output by this. Default 1."""
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    """No end-of-text token before so many tokens. Default 0."""
    ignore_eos: bool | None = None
    """Do not stop at the end-of-text token."""
    stop_token_ids: Annotated[list[Token], Field(max_length=256, fail_fast=True)] | None = None
    """End the text at one of these tokens."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its own tokens to the prompt. Default: true for completions, false for chat."""
    return_token_ids: bool | None = None
    """Send the token ids of prompt and output."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text. Default true."""
    spaces_between_special_tokens: bool | None = None
    """No effect: fast tokenizers write none."""
    include_stop_str_in_output: Literal[False] | None = None
    """May only be false."""
    allowed_token_ids: Annotated[list[Token], Field(min_length=1, max_length=MAX_ALLOWED, fail_fast=True)] | None = None
    """Only these tokens may be written."""
    bad_words: Annotated[list[StopString], Field(max_length=64, fail_fast=True)] | None = None
    """Texts that must not be written."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Log-probabilities of the prompt's tokens, and of so many likely ones beside each."""
    response_format: ResponseFormat | None = None
    """The form that the text must have (needs `outrider[grammar]`)."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's way to say it: exactly one kind."""
    # ours
    prediction: PredictionField | None = None
    """A continuation that the client expects, from which a drafter may propose."""
    speculation: Speculation | None = None
    """How this request is drafted."""

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
    """A text or token ids, or a list of them."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Log-probabilities of the written tokens, and of so many likely ones beside each."""
    best_of: Annotated[int, Field(ge=1, le=64)] | None = None
    """Refused unless it equals `n`."""
    echo: bool | None = None
    """Put the prompt in front of the text (and of `logprobs`)."""
    suffix: Text | None = None
    """The text behind the gap, for models that fill in the middle."""

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
