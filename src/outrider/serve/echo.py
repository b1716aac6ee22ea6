"""Completions that repeat their prompts, and log-probabilities of prompts."""

from __future__ import annotations

import asyncio
from typing import Any

from outrider.engine.prompt_scores import PromptScores
from outrider.engine.sequence import Event, TokenLogprob
from outrider.engine.text import TextStream
from outrider.errors import RequestError
from outrider.params import SamplingParams
from outrider.serve.bridge import Bridge
from outrider.serve.parsing import BadField
from outrider.serve.replies import Reply, ReplyChoice
from outrider.serve.requests import CompletionRequest, RequestFields
from outrider.serve.spelling import Spelling
from outrider.serve.sse import PIECE

MAX_SCORES = 1 << 20
"""Most log-probabilities of prompt tokens in one reply: some hundred MB while they are computed."""
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


def check_scores(prompts: list[list[int]], samples: int, top: int) -> None:
    """Raise RequestError for more log-probabilities of prompts than a reply may have; every sample repeats those of its prompt."""
    count = sum(map(len, prompts)) * samples * (top + 1)
    if count > MAX_SCORES:
        raise RequestError(
            f"this reply would have {count} log-probabilities of prompt tokens, and at most {MAX_SCORES} are given: "
            "send fewer prompts at once, or ask for fewer likely tokens beside each"
        )


def alone(body: RequestFields, params: SamplingParams) -> bool:
    """Whether the forward over the prompt answers the request: it wants no token, or only the likeliest one."""
    if not isinstance(body, CompletionRequest) or not body.echo:
        return False
    plain = params.greedy and not params.edits and params.n == 1 and not params.stop and not params.stop_token_ids
    plain = plain and params.skip_special_tokens
    return body.max_tokens == 0 or (body.max_tokens == 1 and plain and body.logprobs is not None)


def last_event(scores: PromptScores, top: int, tokenizer: Any, ends: frozenset[int], ignore_eos: bool) -> Event:
    """The one token behind a prompt, as the engine would report it with `top` likely tokens."""
    entry = scores.following
    entry = TokenLogprob(entry.token, entry.logprob, entry.top[:top])
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
        if isinstance(self.request, CompletionRequest) and self.request.echo:
            said["text"] = self.texts[self._prompt(index)] + said["text"]
        return said

    async def whole(self, bridge: Bridge) -> dict[str, Any]:
        """Wait for the end and build the reply."""
        out = await super().whole(bridge)
        top = self.request.prompt_logprobs
        if top is not None and self.scores is not None:
            told = [await by_token(scores, top, self._spelling) for scores in self.scores]
            for choice in out["choices"]:
                choice["prompt_logprobs"] = told[self._prompt(choice["index"])]
        return out

    async def _spaced(self, index: int, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        """The log-probabilities of the prompt, if it is repeated, and of the text."""
        request = self.request
        if self.scores is None or self.top is None or not (isinstance(request, CompletionRequest) and request.echo):
            return await super()._spaced(index, entries)
        await asyncio.sleep(0)  # let other tasks run between two of many prompts
        scores, spelling = self.scores[self._prompt(index)], self._spelling
        first = scores.tokens[0]
        head: dict[str, Any] = {
            "tokens": [spelling.shown(first)],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [self._offsets[index].next(first)],
        }
        shown = [TokenLogprob(e.token, e.logprob, _with_itself(e, self.top)) for e in scores.entries]
        for name, more in (await super()._spaced(index, [*shown, *entries]) or {}).items():
            head[name] += more
        return head

    def prepare(self, texts: list[str], scores: list[PromptScores] | None) -> EchoReply:
        """Itself, with the prompts."""
        self.texts, self.scores = texts, scores
        return self


def _with_itself(entry: TokenLogprob, top: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens, and the token itself if it is not among them."""
    found = entry.top[:top]
    return found if any(token == entry.token for token, _ in found) else (*found, (entry.token, entry.logprob))


async def by_token(scores: PromptScores, top: int, spelling: Spelling) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: nothing for the first token, then an object by token id for each. Other tasks may run after every
    PIECE of them."""
    out: list[dict[str, Any] | None] = [None]
    for entry, rank in zip(scores.entries, scores.ranks, strict=True):
        if len(out) % PIECE == 0:
            await asyncio.sleep(0)
        ranked = {token: (value, i + 1) for i, (token, value) in enumerate(entry.top[:top])}
        ranked[entry.token] = (entry.logprob, rank)
        out.append(
            {
                str(token): {"logprob": max(value, LOWEST), "rank": place, "decoded_token": spelling.text(token)}
                for token, (value, place) in ranked.items()
            }
        )
    return out
