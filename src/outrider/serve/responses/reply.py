"""The reply to a request for a response: one object, or the whole sequence of events that tells how it grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from time import time
from typing import Any

from outrider.dialects.pieces import Piece
from outrider.dialects.values import said
from outrider.errors import OutriderError
from outrider.serve.bridge import Bridge
from outrider.serve.chat.reply import Call, ChatReply
from outrider.serve.responses.convert import Tools
from outrider.serve.responses.fields import ResponseRequest
from outrider.serve.sse import event_frame

ECHOED = (
    "instructions", "max_output_tokens", "max_tool_calls", "temperature", "top_p", "user", "safety_identifier", "prompt_cache_key",
)  # fmt: skip


class ResponseReply(ChatReply):
    """A chat reply in the form of a response. asked, tools: the request, set before the first event."""

    prefix = "resp_"
    asked: ResponseRequest
    tools: Tools

    # ------------------------------------------------------------------ the object
    def _object(self, status: str, output: list[dict[str, Any]], error: dict[str, Any] | None = None) -> dict[str, Any]:
        asked = self.asked
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.prefix + self.ticket.id, "object": "response", "created_at": self.created,
            "completed_at": int(time()) if status == "completed" else None, "status": status, "error": error,
            "incomplete_details": reason, "model": asked.model, "output": output, "previous_response_id": None,
            "parallel_tool_calls": asked.parallel_tool_calls is not False, "tool_choice": _plain(asked.tool_choice) or "auto",
            "tools": _plain(asked.tools) or [], "text": _plain(asked.text) or {"format": {"type": "text"}},
            "reasoning": _plain(asked.reasoning) or {"effort": None, "summary": None}, "truncation": asked.truncation or "disabled",
            "top_logprobs": asked.top_logprobs or 0, "presence_penalty": asked.presence_penalty or 0.0,
            "frequency_penalty": asked.frequency_penalty or 0.0, "store": False, "background": False,
            "service_tier": asked.service_tier or "default", "metadata": asked.metadata or {},
            **{name: getattr(asked, name) for name in ECHOED},
            "usage": self._usage() if status in ("completed", "incomplete") else None,
            **({"skipped_tools": self.tools.skipped} if self.tools.skipped else {}),
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        counted = super().usage()
        thought = counted.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
        return {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": counted["prompt_tokens_details"],
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": counted["total_tokens"],
        }

    async def whole(self, bridge: Bridge) -> dict[str, Any]:
        """Wait for the end and build the response."""
        await self._prepare()
        items = Items(self)
        async for batch in bridge.events(self.ticket):
            self._take(batch)
            for _ in items.grow(self._new()):
                pass
        for _ in items.close():
            pass
        return self._object(self._status(), items.done)

    def text_logprobs(self) -> list[dict[str, Any]]:
        """Log-probabilities of the sample's tokens, if they were asked for."""
        found = self._logprobs(0, self.choices[0].logprobs)
        return [] if found is None else found["content"]

    def _status(self) -> str:
        return "incomplete" if self.choices[0].finish == "length" else "completed"

    def _new(self) -> list[Piece]:
        said = self.spoken[0]
        pieces, said.fresh = said.fresh, []
        return pieces

    # ------------------------------------------------------------------ streamed
    async def frames(self, bridge: Bridge, pad: bool = False) -> AsyncIterator[bytes]:
        """The events, numbered from 0; an error becomes `response.failed`."""
        number = 0

        def framed(kind: str, body: dict[str, Any]) -> bytes:
            nonlocal number
            number += 1
            return event_frame(kind, {"type": kind, "sequence_number": number - 1, **body}, pad)

        items = Items(self)
        yield framed("response.created", {"response": self._object("in_progress", [])})
        yield framed("response.in_progress", {"response": self._object("in_progress", [])})
        try:
            await self._prepare()
            async for batch in bridge.events(self.ticket):
                self._take(batch)
                for kind, body in items.grow(self._new()):
                    yield framed(kind, body)
                await asyncio.sleep(0)
            for kind, body in items.close():
                yield framed(kind, body)
            status = self._status()
            yield framed(f"response.{status}", {"response": self._object(status, items.done)})
        except OutriderError as error:
            failed = {"code": "server_error", "message": str(error)}
            yield framed("response.failed", {"response": self._object("failed", items.done, failed)})


class Items:
    """The items of a response as they grow: one is open at a time. done: those that are complete."""

    def __init__(self, reply: ResponseReply) -> None:
        self._reply, self.done = reply, list[dict[str, Any]]()
        self._kind: str | None = None
        self._id, self._text = "", list[str]()
        self._call: Call | None = None

    def grow(self, pieces: list[Piece]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of new pieces."""
        for piece in pieces:
            if piece.kind == "call":
                yield from self.close()
                yield from self._open_call(self._reply.spoken[0].calls[piece.call])
                continue
            if piece.kind == "arguments":
                self._text.append(piece.text)
                if self._kind == "function_call" and piece.text:
                    yield self._event("response.function_call_arguments.delta", delta=piece.text)
                continue
            kind = "message" if piece.kind == "content" else "reasoning"
            if self._kind != kind:
                yield from self.close()
                yield from self._open_text(kind)
            self._text.append(piece.text)
            more = {"logprobs": []} if kind == "message" else {}
            yield self._event(f"response.{_PARTS[kind]}.delta", content_index=0, delta=piece.text, **more)

    def close(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events that end the open item."""
        if self._kind is None:
            return
        text, item = "".join(self._text), self._item("completed")
        if self._kind == "function_call" and self._call is not None:
            yield self._event("response.function_call_arguments.done", arguments=text, name=self._call.name)
        elif self._kind == "custom_tool_call":
            yield self._event("response.custom_tool_call_input.delta", delta=item["input"])
            yield self._event("response.custom_tool_call_input.done", input=item["input"])
        else:
            more = {"logprobs": []} if self._kind == "message" else {}
            yield self._event(f"response.{_PARTS[self._kind]}.done", content_index=0, text=text, **more)
            yield self._event("response.content_part.done", content_index=0, part=item["content"][0])
        place = len(self.done)
        self.done.append(item)
        self._kind, self._text, self._call = None, [], None
        yield "response.output_item.done", {"output_index": place, "item": item}

    def _open_text(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        self._kind, self._id = kind, f"{'msg' if kind == 'message' else 'rs'}_{self._reply.ticket.id}_{len(self.done)}"
        item = self._item("in_progress")
        part = item["content"][0]
        yield "response.output_item.added", {"output_index": len(self.done), "item": {**item, "content": []}}
        yield self._event("response.content_part.added", content_index=0, part=part)

    def _open_call(self, call: Call) -> Iterator[tuple[str, dict[str, Any]]]:
        custom = call.name in self._reply.tools.custom
        self._kind, self._call = "custom_tool_call" if custom else "function_call", call
        self._id = f"{'ctc' if custom else 'fc'}_{self._reply.ticket.id}_{len(self.done)}"
        yield "response.output_item.added", {"output_index": len(self.done), "item": self._item("in_progress")}

    def _item(self, status: str) -> dict[str, Any]:
        """The open item with its text so far."""
        text = "".join(self._text)
        if self._call is not None:
            return self._called(self._call, text, status)
        if self._kind == "reasoning":
            content = [{"type": "reasoning_text", "text": text}]
            head = {"id": self._id, "type": "reasoning", "summary": [], "status": status}
            return {**head, "content": content, "encrypted_content": None}
        logprobs = self._reply.text_logprobs() if status == "completed" else []
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
        return {"id": self._id, "type": "message", "role": "assistant", "status": status, "content": [part]}

    def _called(self, call: Call, text: str, status: str) -> dict[str, Any]:
        space = self._reply.tools.spaces.get(call.name)
        head = {"id": self._id, "call_id": call.id, "name": call.name, "status": status}
        head |= {} if space is None else {"namespace": space}
        if self._kind == "function_call":
            return {**head, "type": "function_call", "arguments": text}
        try:
            given = said(text or "{}").get("input", "")
        except (ValueError, RecursionError, AttributeError):
            given = text
        return {**head, "type": "custom_tool_call", "input": str(given)}

    def _event(self, kind: str, **more: Any) -> tuple[str, dict[str, Any]]:
        return kind, {"item_id": self._id, "output_index": len(self.done), **more}


_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


def _plain(value: Any) -> Any:
    """A checked field as JSON."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value.model_dump(exclude_none=True, by_alias=True) if hasattr(value, "model_dump") else value
