"""Where audited text comes from: our engine, a Python callable, or an OpenAI-compatible server."""

from __future__ import annotations

import importlib
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

from outrider.build import Engine
from outrider.errors import ConfigError
from outrider.files import json_rows, read_text
from outrider.params import SamplingParams
from outrider.web import OPENER, base_of, refusal, words

MAX_RESPONSE = 1 << 26
MAX_TEXTS = 1 << 30
"""Largest file of recorded texts, bytes."""
"""Most bytes read of one response."""


@dataclass(frozen=True, slots=True)
class Emission:
    """One continuation: token ids (with the end token, if it ended), log-probabilities where reported, or an error."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    error: str | None = None


AS_IDS = "return_tokens_as_token_ids"
"""vLLM's field for log-probabilities that name tokens by their ids."""
Source = Callable[[Sequence[list[int]], Sequence[int]], list[Emission]]
"""Continuations of prompts (token ids), one seed each."""


def of_engine(engine: Engine, params: SamplingParams) -> Source:
    """Our own engine."""

    def run(prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Emission]:
        results = engine.generate(list(prompts), [replace(params, seed=s) for s in seeds])
        return [
            Emission(o.token_ids, tuple(x.logprob for x in o.logprobs), o.error) for r in results for o in r.outputs
        ]

    return run


def of_callable(generate: Callable[[list[int], int], Sequence[int]]) -> Source:
    """A function of (prompt token ids, seed) that returns the new token ids. An exception is a failed text."""

    def one(prompt: list[int], seed: int) -> Emission:
        try:
            return Emission(tuple(int(t) for t in generate(list(prompt), seed)))
        except Exception as error:
            return Emission((), error=f"{type(error).__name__}: {error}")

    return lambda prompts, seeds: [one(p, s) for p, s in zip(prompts, seeds, strict=True)]


def load_callable(name: str) -> Callable[[list[int], int], Sequence[int]]:
    """`module:function`, imported. Raises ConfigError when it is not there."""
    module, colon, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name!r} cannot be imported ({error}): give module:function") from None
    if not callable(found):
        raise ConfigError(f"{name!r} is not module:function of something callable")
    return cast(Callable[[list[int], int], Sequence[int]], found)


@dataclass(frozen=True, slots=True)
class Recorded:
    """Texts that were generated elsewhere, grouped by prompt: `samples` texts of each of `prompts`, in their order."""

    prompts: list[list[int]]
    emissions: list[list[Emission]]

    @property
    def samples(self) -> int:
        return len(self.emissions[0])

    def source(self) -> Source:
        """The texts as a source: each prompt's in the order recorded."""
        left = [list(group) for group in self.emissions]

        def run(prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Emission]:
            return [left[self.prompts.index(list(p))].pop(0) for p in prompts]

        return run


def read_texts(path: Path) -> Recorded:
    """JSON lines `{"prompt_token_ids": [..], "token_ids": [..], "logprobs": [..]}` (the last one optional).

    Every prompt needs the same number of texts. Raises ConfigError with file and line.
    """
    groups: dict[tuple[int, ...], list[Emission]] = {}
    for where, row in json_rows(read_text(path, MAX_TEXTS), path):
        try:
            prompt, tokens = (tuple(int(t) for t in row[k]) for k in ("prompt_token_ids", "token_ids"))
            logprobs = tuple(float(x) for x in row.get("logprobs") or ())
        except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
            raise ConfigError(f"{where}: not a text of token ids ({type(error).__name__}: {error})") from None
        groups.setdefault(prompt, []).append(Emission(tokens, logprobs))
    if not groups or not all(groups):
        raise ConfigError(f"{path}: no texts, or a text with an empty prompt")
    sizes = {len(g) for g in groups.values()}
    if len(sizes) != 1:
        raise ConfigError(
            f"{path}: prompts have between {min(sizes)} and {max(sizes)} texts; give each the same number"
        )
    return Recorded([list(p) for p in groups], list(groups.values()))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible server: url up to and without /v1/completions, the model's name there, an API key if it wants one."""

    url: str
    model: str
    key: str | None = None
    concurrency: int = 4
    timeout: float = 300.0

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One POST. Raises ConfigError with the server's own words."""
        base = base_of(self.url)
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{base}/v1/completions", json.dumps(body).encode(), headers)
        try:
            with OPENER.open(request, timeout=self.timeout) as response:
                raw = response.read(MAX_RESPONSE + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise ConfigError(refusal(base, error)) from None
        except (OSError, HTTPException, ValueError) as error:
            said = words(str(error) or type(error).__name__)
            raise ConfigError(f"{base} cannot be reached ({said}): check the address and that it is serving") from None
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError):
            raise ConfigError(f"{base} did not answer with JSON of at most {MAX_RESPONSE >> 20} MiB") from None
        if not isinstance(document, dict) or not isinstance(document.get("choices"), list) or not document["choices"]:
            raise ConfigError(f"{base} answered without `choices`: is it an OpenAI-compatible completions server?")
        return document


def of_endpoint(endpoint: Endpoint, params: SamplingParams, vocab: int | None = None) -> Source:
    """Completions of token-id prompts over HTTP, several at a time. vocab: ids that the target knows.

    A server that cannot be used at all (nothing there, no token ids) shows at the first request, which raises ConfigError; after
    that a request that fails is a failed text, so that what has been judged is not lost.
    """
    answered, left_out = threading.Event(), set[str]()

    def ask(prompt: list[int], seed: int) -> Emission:
        body = request_body(endpoint.model, prompt, params, seed)
        try:
            document = endpoint.complete({k: v for k, v in body.items() if k not in left_out})
        except ConfigError as error:
            if AS_IDS in left_out or AS_IDS not in str(error):
                raise
            left_out.add(AS_IDS)  # a server that refuses what it does not know, as ours does, sends ids without it
            return ask(prompt, seed)
        return read_choice(document["choices"][0], params.max_tokens, vocab)

    def one(prompt: list[int], seed: int) -> Emission:
        try:
            return ask(prompt, seed)
        except ConfigError as error:
            return Emission((), error=str(error))

    def run(prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Emission]:
        first = [] if answered.is_set() or not prompts else [ask(prompts[0], seeds[0])]
        answered.set()
        with ThreadPoolExecutor(endpoint.concurrency) as pool:
            return [*first, *pool.map(one, prompts[len(first) :], seeds[len(first) :])]

    return run


def request_body(model: str, prompt: list[int], params: SamplingParams, seed: int) -> dict[str, Any]:
    """The request: only parameters that do something are sent, so that a strict server meets no unknown field needlessly."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": seed,
        "logprobs": 1,
        "return_token_ids": True,
        AS_IDS: True,
    }
    for name in ("top_k", "min_p", "presence_penalty", "frequency_penalty"):
        if getattr(params, name):
            body[name] = getattr(params, name)
    if params.repetition_penalty != 1.0:
        body["repetition_penalty"] = params.repetition_penalty
    if params.ignore_eos:
        body["ignore_eos"] = True
    return body


def read_choice(choice: Any, most: int, vocab: int | None = None) -> Emission:
    """Token ids of a choice: `token_ids`, `logprobs.tokens` in the form `token_id:17`, or the `id`s of `logprobs.content`.

    most: tokens that were asked for. vocab: ids that there are. Raises ConfigError without ids, and for what can be no answer to
    that request: a server that answers so has not been judged.
    """
    book = choice.get("logprobs") if isinstance(choice, dict) else None
    book = {} if book is None else book
    if not isinstance(choice, dict) or not isinstance(book, dict):
        raise ConfigError("the server's answer is no completion: its choices or their logprobs have another shape")
    ids = choice.get("token_ids")
    if ids is None:
        named, content = book.get("tokens"), book.get("content")
        ids = [_id_of(w) for w in named] if isinstance(named, list) else []
        if not ids and isinstance(
            content, list
        ):  # llama.cpp's server; its log-probabilities of accepted drafts are no such
            ids = [entry.get("id") if isinstance(entry, dict) else None for entry in content]
        if not ids or None in ids:
            raise ConfigError(
                "the server returns no token ids, and text alone does not say which tokens were drawn: start it so that "
                "completions carry `token_ids` or `token_id:N` (vLLM: --return-tokens-as-token-ids)"
            )
    last = (1 << 31) - 1 if vocab is None else vocab - 1
    if not isinstance(ids, list) or len(ids) > most or any(type(t) is not int or not 0 <= t <= last for t in ids):
        raise ConfigError(
            f"the server's answer is no list of at most {most} token ids between 0 and {last}: is it the model that --target names?"
        )
    values = book.get("token_logprobs")
    known = isinstance(values, list) and len(values) == len(ids) and all(_is_logprob(v) for v in values)
    return Emission(tuple(ids), tuple(map(float, values)) if known else ())  # type: ignore[arg-type]


def _is_logprob(value: Any) -> bool:
    """Whether it is a logarithm that a server may report: -9999 is what some say for minus infinity."""
    return type(value) in (int, float) and -1e4 < value < 1


def _id_of(word: Any) -> int | None:
    digits = word.removeprefix("token_id:") if isinstance(word, str) and word.startswith("token_id:") else ""
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None
