"""The reply to a request for a message: whole, or as Anthropic's events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from outrider.dialects.pieces import Piece
from outrider.dialects.values import arguments
from outrider.errors import OutriderError, RequestError
from outrider.serve.bridge import Bridge
from outrider.serve.chat.reply import ChatReply
from outrider.serve.sse import event_frame


class MessageReply(ChatReply):
    """A chat reply in the form of a message."""

    prefix = "msg_"

    def new_id(self) -> str:
        """An id for a call."""
        return "toolu_" + super().new_id().removeprefix("call_")

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.prefix + self.ticket.id,
            "type": "message",
            "role": "assistant",
            "model": self.request.model,
        }

    def _stop(self) -> tuple[str, str | None]:
        """Why it ended, and the stop sequence if one did it."""
        finish, said = self.choices[0].finish, self.spoken[0]
        text = self.ticket.sequences[0].text if self.ticket.sequences else None
        stopped = None if text is None else text.stop_string
        if stopped is not None:
            return "stop_sequence", stopped
        return ("max_tokens" if finish == "length" else "tool_use" if said.calls else "end_turn"), None

    def _usage(self, written: int | None = None) -> dict[str, Any]:
        counted, cached = super().usage(), self.ticket.cached_tokens
        return {
            "input_tokens": counted["prompt_tokens"] - cached,
            "output_tokens": counted["completion_tokens"] if written is None else written,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
        }

    async def whole(self, bridge: Bridge) -> dict[str, Any]:
        """Wait for the end and build the message."""
        await self._prepare()
        async for batch in bridge.events(self.ticket):
            self._take(batch)
        said, (reason, stopped) = self.spoken[0], self._stop()
        content: list[dict[str, Any]] = []
        if said.reasoning:
            content.append({"type": "thinking", "thinking": "".join(said.reasoning), "signature": ""})
        if said.content or not said.calls:
            content.append({"type": "text", "text": "".join(said.content)})
        for call in said.calls:
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments(call.text)})
        end = {"stop_reason": reason, "stop_sequence": stopped, "usage": self._usage()}
        return {**self._head(""), "content": content, **end}

    async def frames(self, bridge: Bridge, pad: bool = False) -> AsyncIterator[bytes]:
        """The events as they come."""
        blocks = Blocks(self)
        start = {**self._head(""), "content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage(0)}
        yield event_frame("message_start", {"type": "message_start", "message": start}, pad)
        try:
            await self._prepare()
            async for batch in bridge.events(self.ticket):
                self._take(batch)
                said = self.spoken[0]
                pieces, said.fresh = said.fresh, []
                for event in blocks.grow(pieces):
                    yield event_frame(event["type"], event, pad)
                await asyncio.sleep(0)
            for event in blocks.close():
                yield event_frame(event["type"], event, pad)
            reason, stopped = self._stop()
            delta = {"stop_reason": reason, "stop_sequence": stopped}
            yield event_frame("message_delta", {"type": "message_delta", "delta": delta, "usage": self._usage()}, pad)
            yield event_frame("message_stop", {"type": "message_stop"}, pad)
        except OutriderError as error:
            kind = "invalid_request_error" if isinstance(error, RequestError) else "api_error"
            yield event_frame("error", {"type": "error", "error": {"type": kind, "message": str(error)}}, pad)


class Blocks:
    """The content blocks of a message as they grow: one is open at a time."""

    def __init__(self, reply: MessageReply) -> None:
        self._reply, self._kind, self._index = reply, "", -1

    def grow(self, pieces: list[Piece]) -> Iterator[dict[str, Any]]:
        """The events of new pieces."""
        for piece in pieces:
            if piece.kind == "call":
                call = self._reply.spoken[0].calls[piece.call]
                yield from self._open("tool_use", {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            elif piece.kind == "arguments":
                yield self._delta({"type": "input_json_delta", "partial_json": piece.text})
            elif piece.kind == "content":
                if self._kind != "text":
                    yield from self._open("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": piece.text})
            else:
                if self._kind != "thinking":
                    yield from self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": piece.text})

    def close(self) -> Iterator[dict[str, Any]]:
        """The event that ends the open block."""
        if self._kind:
            yield {"type": "content_block_stop", "index": self._index}
            self._kind = ""

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self._kind, self._index = kind, self._index + 1
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
