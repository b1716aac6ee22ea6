"""From a checked request to sampling parameters, or to an error for a field that the served engine does not support."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from outrider.params import SamplingParams
from outrider.serve.chat.fields import ChatRequest
from outrider.serve.parsing import BadField
from outrider.serve.requests import MAX_TOKENS, CompletionRequest, ResponseFormat, Speculation, StructuredOutputs

DEFAULT_TOKENS = 16
"""Default `max_tokens` of a completion, as in OpenAI's API."""


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """Facts that requests are checked against: the engine's drafter, rule, longest draft, and whether it is lossless."""

    drafter: str
    rule: str
    longest: int
    lossless: bool


def sampling(
    request: CompletionRequest | ChatRequest, engine: ServedEngine, predicted: tuple[int, ...], **more: Any
) -> SamplingParams:
    """The sampling parameters of a request. predicted: its `prediction` as token ids. more: parameters that the server sets."""
    asked = request.max_tokens
    if isinstance(request, ChatRequest):
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            raise BadField("give max_completion_tokens or max_tokens, not both", "max_tokens")
        asked = request.max_completion_tokens or request.max_tokens or MAX_TOKENS
        if request.max_tokens == 0:
            raise BadField("max_tokens must be at least 1: only completions with echo may ask for 0", "max_tokens")
        if request.top_logprobs and not request.logprobs:
            raise BadField("top_logprobs needs logprobs to be true", "top_logprobs")
    elif request.best_of is not None and request.best_of != request.samples:
        raise BadField("best_of must equal n: samples are not ranked here", "best_of")
    speculation = request.speculation or Speculation()
    _check_speculation(speculation, engine)
    given = {
        "temperature": 0.0 if request.top_p == 0 else request.temperature,  # an empty nucleus keeps the likeliest token
        "top_p": request.top_p or None,
        "top_k": None if request.top_k == -1 else request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": {int(k): v for k, v in request.logit_bias.items()} if request.logit_bias else None,
        "seed": request.seed,
        "n": request.samples,
        "max_tokens": max(1, asked) if asked is not None else DEFAULT_TOKENS,
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
        "stop": request.stop,
        "stop_token_ids": request.stop_token_ids,
        "logprobs": request.top,
        "allowed_token_ids": request.allowed_token_ids,
        "skip_special_tokens": request.skip_special_tokens,
        "tv_budget": speculation.tv_budget,
        "grammar": grammar_of(request),
        "prediction": predicted,
        "cache_salt": request.cache_salt,
        "draft_length": 0 if speculation.mode == "off" else speculation.length,
    }
    given |= more
    return SamplingParams.from_dict({name: value for name, value in given.items() if value is not None})


def grammar_of(request: CompletionRequest | ChatRequest) -> str | None:
    """The grammar that a request asks for, by its response format or its structured outputs."""
    formed = None if request.response_format is None else _of_format(request.response_format)
    structured = None if request.structured_outputs is None else _structured(request.structured_outputs)
    if formed is not None and structured is not None:
        raise BadField(
            "response_format and structured_outputs exclude each other: send one of them", "structured_outputs"
        )
    return structured if formed is None else formed


def _structured(wanted: StructuredOutputs) -> str | None:
    """The grammar of vLLM's structured outputs."""
    kinds = ("json_", "regex", "choice", "grammar", "json_object")
    given = [name for name in kinds if getattr(wanted, name) is not None]
    if len(given) != 1:
        raise BadField(
            "structured_outputs takes one of json, regex, choice, grammar, json_object", "structured_outputs"
        )
    if wanted.whitespace_pattern is not None and (
        wanted.disable_any_whitespace or given[0] not in ("json_", "json_object")
    ):
        raise BadField(
            "whitespace_pattern goes with json or json_object, without disable_any_whitespace", "structured_outputs"
        )
    if wanted.regex is not None:
        return f"regex:{wanted.regex}"
    if wanted.grammar is not None:
        return f"lark:{wanted.grammar}"
    if wanted.choice is not None:
        return "lark:start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in wanted.choice)
    return "json:" + json.dumps(_spaced(_schema(wanted), wanted))


def _schema(wanted: StructuredOutputs) -> dict[str, Any]:
    schema: Any = {"type": "object"} if wanted.json_ is None else wanted.json_
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise BadField("structured_outputs.json is no JSON: send the schema", "structured_outputs") from None
    if not isinstance(schema, dict):
        raise BadField("structured_outputs.json must be a schema, an object", "structured_outputs")
    return schema


def _spaced(schema: dict[str, Any], wanted: StructuredOutputs) -> dict[str, Any]:
    """The schema with the white space that is wanted between the parts of its JSON."""
    if wanted.disable_any_whitespace:
        return {**schema, "x-guidance": {"whitespace_flexible": False}}
    if wanted.whitespace_pattern is not None:
        return {**schema, "x-guidance": {"whitespace_pattern": wanted.whitespace_pattern}}
    return schema


def _of_format(wanted: ResponseFormat) -> str | None:
    """The grammar of a response format; raises BadField for a schema without its type or a type without its schema."""
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise BadField("json_schema goes with the type 'json_schema', and that type needs it", "response_format")
    return wanted.grammar


def _check_speculation(speculation: Speculation, engine: ServedEngine) -> None:
    """Raise BadField for options that this server's engine cannot change for a single request."""
    for name, asked, served in (
        ("drafter", speculation.drafter, engine.drafter),
        ("rule", speculation.rule, engine.rule),
    ):
        if asked is not None and asked != served:
            raise BadField(f"this server's {name} is {served!r}: leave speculation.{name} out", f"speculation.{name}")
    if speculation.length is not None and speculation.length > engine.longest:
        raise BadField(f"this server drafts at most {engine.longest} tokens a step", "speculation.length")
    if speculation.mode == "off" and speculation.length:
        raise BadField("speculation.length must be 0 or absent when the mode is off", "speculation.length")
    if speculation.tv_budget and engine.lossless:
        raise BadField(
            f"the rule {engine.rule!r} is exact and spends no total variation: leave tv_budget out, "
            "or ask the operator for a lossy rule",
            "speculation.tv_budget",
        )
