"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them: what clients need that count tokens with the served tokenizer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from outrider.errors import RequestError
from outrider.serve.chat.fields import MAX_TOOLS, ChatRequest, Message, ToolField
from outrider.serve.middleware import OWNER
from outrider.serve.parsing import BadField, Strict, parse
from outrider.serve.requests import MAX_MESSAGES, Text, Token, Tokens
from outrider.serve.routes import OpenAI
from outrider.serve.spelling import Spelling
from outrider.serve.sse import while_connected

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class TokenizeRequest(Strict):
    """Body of POST /tokenize: a prompt, or messages as a chat has them."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """The served name."""
    prompt: Text | None = None
    """The text; or `messages`."""
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    """A conversation, written by the chat template."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its own tokens."""
    return_token_strs: bool | None = None
    """Send the text of every token too."""
    add_generation_prompt: bool | None = None
    """Whether the template opens the assistant's turn. Default true."""
    continue_final_message: bool | None = None
    """Leave the last message open."""
    tools: Annotated[list[ToolField], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Tools that the template shows."""
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    """Variables of the chat template."""

    @model_validator(mode="after")
    def _is_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give a prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """The served name."""
    tokens: Tokens | Annotated[list[Token], Field(max_length=0)]
    """Token ids."""


class Tokenizing:
    """The handlers of one server."""

    def __init__(self, v1: OpenAI) -> None:
        self.v1 = v1

    @property
    def tokenizer(self) -> Any:
        """The engine's. Raises RequestError if there is none."""
        found = self.v1.bridge.engine.tokenizer
        if found is None:
            raise RequestError("this server has no tokenizer: it works on token ids")
        return found

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize"""
        body = parse(TokenizeRequest, await self.v1.raw(request))
        if body.model is not None:
            self.v1.check_model(body.model)
        tokenizer, owner = self.tokenizer, request.scope.get(OWNER, 0)
        ids = await while_connected(request, self._ids(body, owner))
        strings = None
        if body.return_token_strs:
            spelling = Spelling(tokenizer)
            strings = await self.v1.bridge.in_thread(lambda: [spelling.text(token) for token in ids])
        most = self.v1.bridge.engine.max_length
        return JSONResponse({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": strings})

    async def _ids(self, body: TokenizeRequest, owner: int) -> list[int]:
        reading = self.v1.reading
        if body.prompt is not None:
            most = self.v1.bridge.prep.most
            return (await reading.read([body.prompt], body.add_special_tokens is not False, most, owner))[0]
        given = body.model_dump(exclude_none=True, exclude={"prompt", "return_token_strs"})
        chat = parse(ChatRequest, {**given, "model": self.v1.settings.model})
        return (await reading.conversation(chat, owner))[0]

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize"""
        body = parse(DetokenizeRequest, await self.v1.raw(request))
        if body.model is not None:
            self.v1.check_model(body.model)
        tokenizer, most = self.tokenizer, self.v1.bridge.engine.parts.target.vocab_size
        wrong = max(body.tokens, default=0)
        if wrong >= most:
            raise BadField(f"token {wrong} is outside the vocabulary of {most}", "tokens")
        decode = lambda: tokenizer.decode(body.tokens, skip_special_tokens=False)  # noqa: E731
        return JSONResponse({"prompt": await self.v1.bridge.in_thread(decode)})

    async def info(self, request: Request) -> Response:
        """GET /tokenizer_info: the settings that clients look for, by their names in tokenizer_config.json."""
        tokenizer, engine = self.tokenizer, self.v1.bridge.engine
        named = {name: str(value) for name in NAMES if (value := getattr(tokenizer, name, None)) is not None}
        if "eos_token" not in named and engine.eos:
            named["eos_token"] = Spelling(tokenizer).text(min(engine.eos))
        template = getattr(tokenizer, "chat_template", None)
        more = {"chat_template": template} if template else {}
        kind = getattr(tokenizer, "init_kwargs", {}).get("tokenizer_class") or "PreTrainedTokenizerFast"
        return JSONResponse({"tokenizer_class": kind, "model_max_length": engine.max_length, **named, **more})
