"""Completions that repeat their prompts, and log-probabilities of prompts."""

from __future__ import annotations

from typing import Any

from outrider.engine.prompt_scores import PromptScores
from outrider.engine.sequence import Event
from outrider.engine.text import TextStream
from outrider.params import SamplingParams
from outrider.serve.parsing import BadField
from outrider.serve.replies import Reply, ReplyChoice
from outrider.serve.requests import CompletionRequest, RequestFields
from outrider.serve.spelling import Spelling

LOWEST = -9999.0
"""What stands for minus infinity, which JSON does not have."""


def wanted(body: RequestFields) -> int | None:
    """How many likely tokens of each place of the prompt a request wants; None: no log-probabilities of the prompt."""
    echoed = body.logprobs if isinstance(body, CompletionRequest) and body.echo else None
    if body.stream and (echoed is not None or body.prompt_logprobs is not None):
        raise BadField("log-probabilities of the prompt are not streamed: leave stream out", "stream")
    if isinstance(body, CompletionRequest) and body.echo and body.stream:
        raise BadField("echo is not streamed: leave stream out", "echo")
    if isinstance(body, CompletionRequest) and body.max_tokens == 0 and not body.echo:
        raise BadField("max_tokens may be 0 only with echo: ask for at least one token", "max_tokens")
    found = [k for k in (echoed, body.prompt_logprobs) if k is not None]
    return max(found, default=None)


def alone(body: RequestFields, params: SamplingParams) -> bool:
    """Whether the forward over the prompt answers the request: it wants no token, or only the likeliest one."""
    if not isinstance(body, CompletionRequest) or not body.echo:
        return False
    plain = params.greedy and not params.edits and params.n == 1 and not params.stop and not params.stop_token_ids
    return body.max_tokens == 0 or (body.max_tokens == 1 and plain and body.logprobs is not None)


def last_event(scores: PromptScores, tokenizer: Any, ends: frozenset[int], ignore_eos: bool) -> Event:
    """The one token behind a prompt, as the engine would report it."""
    entry = scores.following
    ended = entry.token in ends and not ignore_eos
    text = ""
    if tokenizer is not None and not ended:
        stream = TextStream(tokenizer, context=scores.tokens[-12:])
        text = stream.push(entry.token) + stream.finish()
    return Event("", 0, (entry.token,), ("sampled",), text, (entry,), "stop" if ended else "length")


class EchoReply(Reply):
    """A completion with its prompts. texts: of the prompts. scores: of the prompts, if they were wanted."""

    texts: list[str]
    scores: list[PromptScores] | None = None

    def _prompt(self, index: int) -> int:
        return index // self.request.samples

    def _said(self, index: int, c: ReplyChoice) -> dict[str, Any]:
        said = super()._said(index, c)
        request, number = self.request, self._prompt(index)
        if isinstance(request, CompletionRequest) and request.echo:
            said["text"] = self.texts[number] + said["text"]
        if request.prompt_logprobs is not None and self.scores is not None:
            said["prompt_logprobs"] = by_token(self.scores[number], request.prompt_logprobs, self._spelling)
        return said

    def _logprobs(self, index: int, entries: list[Any]) -> dict[str, Any] | None:
        request = self.request
        if self.scores is None or self.top is None or not (isinstance(request, CompletionRequest) and request.echo):
            return super()._logprobs(index, entries)
        if self._told[index]:
            return super()._logprobs(index, entries)
        self._told[index] = True
        scores, spelling = self.scores[self._prompt(index)], self._spelling
        first = scores.tokens[0]
        head: dict[str, Any] = {
            "tokens": [spelling.shown(first)],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [self._offsets[index].next(first)],
        }
        shown = [e.__class__(e.token, e.logprob, _with_itself(e, self.top)) for e in scores.entries]
        for name, more in self._legacy(index, [*shown, *entries]).items():
            head[name] += more
        return head

    _told: list[bool]

    def prepare(self, texts: list[str], scores: list[PromptScores] | None) -> EchoReply:
        """Itself, with the prompts."""
        self.texts, self.scores, self._told = texts, scores, [False] * len(self.choices)
        return self


def _with_itself(entry: Any, top: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens, and the token itself if it is not among them."""
    found = entry.top[:top]
    return found if any(token == entry.token for token, _ in found) else (*found, (entry.token, entry.logprob))


def by_token(scores: PromptScores, top: int, spelling: Spelling) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: nothing for the first token, then an object by token id for each."""
    out: list[dict[str, Any] | None] = [None]
    for entry, rank in zip(scores.entries, scores.ranks, strict=True):
        ranked = {token: (value, i + 1) for i, (token, value) in enumerate(entry.top[:top])}
        ranked[entry.token] = (entry.logprob, rank)
        out.append({
            str(token): {"logprob": max(value, LOWEST), "rank": place, "decoded_token": spelling.text(token)}
            for token, (value, place) in ranked.items()
        })
    return out
