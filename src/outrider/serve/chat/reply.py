"""The reply to a chat completion: text, thinking and calls, whole or in deltas."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from outrider.dialects.pieces import Piece
from outrider.engine.prompt_scores import PromptScores
from outrider.engine.sequence import Event, TokenLogprob
from outrider.serve.bridge import Bridge
from outrider.serve.chat.fields import ChatRequest
from outrider.serve.chat.turn import Turn
from outrider.serve.echo import by_token
from outrider.serve.replies import Reply, ReplyChoice
from outrider.serve.tickets import Ticket

LETTERS = string.ascii_letters + string.digits


@dataclass(slots=True)
class Call:
    """A call that a sample makes. arguments: as the model wrote them so far."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Its arguments."""
        return "".join(self.arguments)


@dataclass(slots=True)
class Spoken:
    """What one sample has said. thought: tokens up to the end of its thinking, as far as steps tell."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    thought: int = 0
    fresh: list[Piece] = field(default_factory=list)

    def add(self, pieces: Iterable[Piece], new_id: Any) -> None:
        """Add pieces; `fresh` are those that no delta has shown yet."""
        for piece in pieces:
            if piece.kind == "call":
                self.calls.append(Call(piece.id or new_id(), piece.text))
            elif piece.kind == "arguments":
                self.calls[piece.call].arguments.append(piece.text)
            else:
                (self.content if piece.kind == "content" else self.reasoning).append(piece.text)
            self.fresh.append(piece)


class ChatReply(Reply):
    """The reply to one chat request. turn: what it may say."""

    kinds = ("chat.completion", "chat.completion.chunk")
    prefix = "chatcmpl-"

    def __init__(
        self, request: ChatRequest, ticket: Ticket, tokenizer: Any, longest: int, details: bool, turn: Turn
    ) -> None:
        super().__init__(request, ticket, tokenizer, longest, details)
        self.turn = turn
        self.spoken = [Spoken() for _ in self.choices]
        self._readers = [turn.reader() for _ in self.choices]
        self._begun = [False] * ticket.choices
        self._hides = request.include_reasoning is False
        form = turn.speech.form
        self._nine = form is not None and form.nine

    def new_id(self) -> str:
        """An id for a call."""
        return "".join(secrets.choice(LETTERS) for _ in range(9)) if self._nine else f"call_{secrets.token_hex(12)}"

    def _take(self, batch: list[tuple[int, Event]]) -> dict[int, ReplyChoice]:
        for index, event in batch:
            said, reader = self.spoken[index], self._readers[index]
            pieces = reader.feed(event.text)
            if event.finish_reason is not None:
                pieces += reader.finish()
            if not said.content and not said.calls and (said.reasoning or any(p.kind == "reasoning" for p in pieces)):
                said.thought += len(event.tokens)
            said.add((p for p in pieces if not (self._hides and p.kind == "reasoning")), self.new_id)
        return super()._take(batch)

    def finish(self, index: int, reason: str | None) -> str | None:
        """Why a sample ended, as OpenAI says it: a call that the request named ends with "stop"."""
        called = bool(self.spoken[index].calls) and self.turn.mode != "named"
        return "tool_calls" if reason == "stop" and called else reason

    def usage(self) -> dict[str, Any]:
        """Token counts, with those of the thinking."""
        out = super().usage()
        thought = sum(said.thought for said in self.spoken)
        if thought or self.turn.speech.dialect.thinking:
            out.setdefault("completion_tokens_details", {})["reasoning_tokens"] = thought
        return out

    prompt_scores: list[PromptScores] | None = None

    # ------------------------------------------------------------------ whole
    async def whole(self, bridge: Bridge) -> dict[str, Any]:
        """Wait for the end and build the reply."""
        out = await super().whole(bridge)
        if self.prompt_scores is not None:
            out["prompt_logprobs"] = await by_token(
                self.prompt_scores[0], self.request.prompt_logprobs or 0, self._spelling
            )
        return out

    def _said(self, index: int, c: ReplyChoice) -> dict[str, Any]:
        said = self.spoken[index]
        text = "".join(said.content)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if said.reasoning:
            thought = "".join(said.reasoning)
            message |= {"reasoning": thought, "reasoning_content": thought}
        if said.calls:
            message["content"] = text or None
            message["tool_calls"] = [_call(call.id, call.name, call.text) for call in said.calls]
        elif said.reasoning and not text:
            message["content"] = None
        return {"message": message, "finish_reason": self.finish(index, c.finish)}

    # ------------------------------------------------------------------ streamed
    def _deltas(self, index: int, c: ReplyChoice) -> list[dict[str, Any]]:
        more: dict[str, Any] = {"token_ids": c.tokens} if self.request.return_token_ids else {}
        logprobs = self._logprobs(index, c.logprobs)
        said, out = self.spoken[index], list[dict[str, Any]]()
        if not self._begun[index]:
            self._begun[index] = True
            out.append(_delta(index, {"role": "assistant", "content": ""}))
        deltas = [self._piece(said, piece) for piece in said.fresh]
        said.fresh = []
        if not deltas and (logprobs or more):
            deltas = [{"content": ""}]
        for i, delta in enumerate(deltas):
            out.append({**_delta(index, delta), **({"logprobs": logprobs, **more} if i == 0 else {})})
        if c.finish:
            out.append({**_delta(index, {}), "finish_reason": self.finish(index, c.finish)})
        return out

    def _piece(self, said: Spoken, piece: Piece) -> dict[str, Any]:
        if piece.kind == "reasoning":
            return {"reasoning": piece.text, "reasoning_content": piece.text}
        if piece.kind == "content":
            return {"content": piece.text}
        if piece.kind == "arguments":
            return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}
        call = said.calls[piece.call]
        return {"tool_calls": [{"index": piece.call, **_call(call.id, call.name, "")}]}

    # ------------------------------------------------------------------ log-probabilities
    def _logprobs(self, index: int, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        return {"content": [self._modern(e) for e in entries], "refusal": None}

    def _modern(self, e: TokenLogprob) -> dict[str, Any]:
        return {**self._token(e.token, e.logprob), "top_logprobs": [self._token(t, v) for t, v in e.top]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        special = (
            token in self._spelling.special
        )  # it has no bytes, so that the joined bytes of all tokens are the text
        spelled = None if self.tokenizer is None else [] if special else list(self._spelling.bytes_of(token))
        return {"token": self._spelling.text(token), "logprob": max(logprob, -9999.0), "bytes": spelled}


def _call(id_: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
