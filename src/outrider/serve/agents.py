"""The routes of other wire formats: /v1/responses and /v1/messages. Both mean a chat request, and share its way."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from outrider.serve.messages.convert import chat_of as chat_of_message
from outrider.serve.messages.fields import CountRequest, MessageRequest
from outrider.serve.messages.reply import MessageReply
from outrider.serve.middleware import OWNER
from outrider.serve.parsing import parse
from outrider.serve.responses.convert import chat_of as chat_of_response
from outrider.serve.responses.fields import ResponseRequest
from outrider.serve.responses.reply import ResponseReply
from outrider.serve.routes import OpenAI
from outrider.serve.sse import while_connected


class Agents:
    """The handlers of one server."""

    def __init__(self, v1: OpenAI) -> None:
        self.v1 = v1

    async def responses(self, request: Request) -> Any:
        """POST /v1/responses"""
        asked = parse(ResponseRequest, await self.v1.raw(request))
        chat, tools = chat_of_response(asked)
        begin = self.v1.begin(chat, request.scope.get(OWNER, 0), self.v1.who(request, chat), ResponseReply)
        reply = await self.v1.begun(request, begin)
        assert isinstance(reply, ResponseReply)
        reply.asked, reply.tools = asked, tools
        return await self.v1.sent(request, reply)

    async def messages(self, request: Request) -> Any:
        """POST /v1/messages"""
        chat = chat_of_message(parse(MessageRequest, await self.v1.raw(request)))
        begin = self.v1.begin(chat, request.scope.get(OWNER, 0), self.v1.who(request, chat), MessageReply)
        return await self.v1.sent(request, await self.v1.begun(request, begin))

    async def count_tokens(self, request: Request) -> Response:
        """POST /v1/messages/count_tokens"""
        chat = chat_of_message(parse(CountRequest, await self.v1.raw(request)))
        self.v1.check_model(chat.model)
        counted = self.v1.reading.conversation(chat, request.scope.get(OWNER, 0))
        ids, _ = await while_connected(request, counted)
        return JSONResponse({"input_tokens": len(ids)})
