"""From the texts of a request to token ids: prompts, conversations by the model's own template, predictions, banned words."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from outrider.dialects.detect import Dialect
from outrider.dialects.formats import FORMATS
from outrider.dialects.infill import infill_of, infilled
from outrider.engine.text import special_tokens
from outrider.errors import CapabilityError, ConfigError, RequestError
from outrider.pictured import ImagePrompt
from outrider.pictures import MOST, bytes_of_url
from outrider.serve.bridge import Bridge
from outrider.serve.chat.fields import ChatRequest
from outrider.serve.chat.turn import Speech, Turn, messages_of, template_kwargs, turn_of
from outrider.serve.parsing import BadField
from outrider.serve.prep import Refused, TooLong
from outrider.serve.prep_worker import TAIL, conversation, dialect_of, encoder, rendered, template_of
from outrider.serve.requests import CompletionRequest, RequestFields, text_of
from outrider.serve.settings import Settings
from outrider.serve.tickets import Unavailable

logger = logging.getLogger(__name__)
IMAGE_SECONDS = 60.0
"""Seconds that the images of a request may take to be read."""
PREDICTED = 4
"""Longest prediction, in multiples of the context."""


class Reading:
    """Reads the texts of requests for one server."""

    def __init__(self, bridge: Bridge, settings: Settings) -> None:
        self.bridge, self.settings = bridge, settings
        self._speech: asyncio.Future[Speech] | None = None
        self._decoding = asyncio.Lock()
        self._pictures = ThreadPoolExecutor(1, "pictures")

    def close(self) -> None:
        """Read no more pictures."""
        self._pictures.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ the model's language
    def begin(self) -> asyncio.Future[Speech]:
        """Find out what the model can say; once, and again if that failed on a busy machine."""
        if self._speech is None or _failed(self._speech):
            self._speech = asyncio.ensure_future(self._find_speech())
            self._speech.add_done_callback(_failed)  # nobody may be waiting for it
        return self._speech

    async def speech(self) -> Speech:
        """What the model can say."""
        return await asyncio.shield(self.begin())

    async def _find_speech(self) -> Speech:
        tokenizer, prep = self.bridge.engine.tokenizer, self.bridge.prep
        template = template_of(tokenizer)
        dialect = Dialect(None, why="it has no chat template")
        if template:
            inside = prep.in_thread(0, True)
            dialect = await prep.dialect() if inside else await self.bridge.in_thread(lambda: dialect_of(tokenizer))
        if self.settings.tool_format is not None:
            dialect = replace(dialect, form=self.settings.tool_format)
        if template:
            thinks = f", thinking between {' and '.join(map(str.strip, dialect.thinking))}" if dialect.thinking else ""
            logger.info("tool calls: %s%s", dialect.form or f"none ({dialect.why})", thinks)
        special = {} if tokenizer is None else special_tokens(tokenizer)
        marks = {} if tokenizer is None else added_tokens(tokenizer)
        return Speech(dialect, marks, frozenset(special), frozenset(self.bridge.engine.eos), template)

    # ------------------------------------------------------------------ prompts
    async def read(self, texts: list[str], special: bool, most: int, owner: int) -> list[list[int]]:
        """Token ids of texts, each of at most `most` tokens. special: add the tokens that begin or end a text."""
        prep, tokenizer = self.bridge.prep, self.bridge.engine.tokenizer
        if not texts:
            return []
        if tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer, and this server has none: send token ids")
        if prep.in_thread(sum(map(len, texts)), False):
            return await prep.encode(texts, special, most, owner)
        encode = encoder(tokenizer)
        return await self.bridge.in_thread(lambda: [encode(text, special) for text in texts])

    async def prompts(self, prompts: list[str | list[int]], special: bool, owner: int) -> list[list[int]]:
        """Token ids of prompts that are text or ids. An empty text is the token that begins a text, if the model has one."""
        most = self.bridge.prep.most
        for prompt in prompts:
            if not isinstance(prompt, str) and len(prompt) > most:
                raise TooLong(len(prompt), most)
        texts = [p for p in prompts if isinstance(p, str)]
        found = iter(await self.read(texts, special, most, owner))
        return [next(found) or self._beginning() if isinstance(p, str) else p for p in prompts]

    async def completions(self, body: CompletionRequest, owner: int) -> tuple[list[list[int]], tuple[int, ...]]:
        """The prompts of a completion, and tokens that end the text between a prompt and its suffix."""
        if not body.suffix:
            return await self.prompts(body.prompts, body.add_special_tokens is not False, owner), ()
        tokenizer = self.bridge.engine.tokenizer
        vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
        family = infill_of(vocabulary)
        if family is None:
            raise BadField("this model has no tokens for filling in the middle: leave suffix out", "suffix")
        if len(body.prompts) != 1 or not isinstance(body.prompts[0], str):
            raise BadField("suffix goes with one prompt, a text", "suffix")
        if body.echo:
            raise BadField("echo and suffix exclude each other", "echo")
        most = self.bridge.prep.most
        texts = [body.prompts[0], body.suffix]
        before, behind = await self.read(texts, False, most, owner)
        begin = getattr(tokenizer, "bos_token_id", None)
        known = dict(zip(texts, (before, behind), strict=True))
        ids, ends = infilled(
            family, vocabulary, texts[0], texts[1], known.__getitem__, [begin] if isinstance(begin, int) else []
        )
        return [ids], ends

    def shown(self, body: CompletionRequest, prompts: list[list[int]]) -> list[str]:
        """The texts of prompts, as an echo shows them."""
        tokenizer = self.bridge.engine.tokenizer
        decode = (
            (lambda ids: "") if tokenizer is None else (lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
        )
        return [p if isinstance(p, str) else decode(ids) for p, ids in zip(body.prompts, prompts, strict=True)]

    def _beginning(self) -> list[int]:
        begin = getattr(self.bridge.engine.tokenizer, "bos_token_id", None)
        if not isinstance(begin, int):
            raise BadField(
                "the prompt is empty, and this model has no token that begins a text: give some text", "prompt"
            )
        return [begin]

    async def predicted(self, body: RequestFields, owner: int) -> tuple[int, ...]:
        """Token ids of a request's prediction."""
        text = "" if body.prediction is None else text_of(body.prediction.content)
        most = PREDICTED * self.bridge.engine.max_length
        try:
            return tuple((await self.read([text], True, most, owner))[0]) if text else ()
        except TooLong as error:
            message = (
                f"the prediction has {error.tokens} tokens, and at most {most} are read: send only the expected part"
            )
            raise BadField(message, "prediction") from None

    async def banned(self, words: list[str], owner: int) -> tuple[tuple[int, ...], ...]:
        """Token ids of banned words, each as it is written at the beginning of a text and within it."""
        texts = [text for word in words for text in (word, f" {word.lstrip()}")]
        found = await self.read(texts, False, 64, owner)
        return tuple(dict.fromkeys(tuple(ids) for ids in found if ids))

    # ------------------------------------------------------------------ conversations
    async def conversation(self, body: ChatRequest, owner: int) -> tuple[list[int], Turn]:
        """The prompt of a conversation, by the model's own chat template, never a client's, in transformers' immutable sandbox;
        and the turn behind it.

        A model without a template continues text: if that is allowed, it gets the messages' texts, one per line.
        """
        speech = await self.speech()
        turn = turn_of(body, speech)
        special = body.add_special_tokens is True
        if not speech.template:
            if not self.settings.fallback_chat:
                raise BadField("this model has no chat template: use /v1/completions", "messages")
            if any(m.images for m in body.messages):
                raise BadField("this model has no chat template, which images need: leave them out", "messages")
            text = "\n".join(m.text for m in body.messages)
            ids = await self.prompts([text], body.add_special_tokens is not False, owner)
            return ids[0], turn
        messages, options = messages_of(body.messages, speech), self._options(body, speech, turn)
        prep, tokenizer = self.bridge.prep, self.bridge.engine.tokenizer
        urls = [url for message in body.messages for url in message.images]
        try:
            if urls:
                ids, tail = await self._pictured(messages, urls, special, owner, options)
            elif prep.in_thread(sum(len(m["content"]) for m in messages), True):
                ids, tail = await prep.chat(messages, special, owner, **options)
            else:
                ids, tail = await self.bridge.in_thread(lambda: conversation(tokenizer, messages, special, **options))
        except Refused as error:
            raise BadField(str(error), "messages") from None
        return ids, turn.at(tail)

    async def _pictured(
        self, messages: list[dict[str, Any]], urls: list[str], special: bool, owner: int, options: dict[str, Any]
    ) -> tuple[ImagePrompt, str]:
        """The prompt of a conversation with images, and the end of its text."""
        prep, engine = self.bridge.prep, self.bridge.engine
        if len(urls) > MOST:
            raise BadField(f"there are {len(urls)} images, and a prompt has at most {MOST}: send fewer", "messages")

        def read(text: str) -> ImagePrompt:
            files = [bytes_of_url(url, f"image {number}") for number, url in enumerate(urls, 1)]
            return engine.images.read(text, files, special)

        try:
            _ = engine.images  # says that the model reads none, before anything is done
            if prep.in_thread(0, True):
                text = await prep.render(messages, owner, **options)
            else:
                text = await self.bridge.in_thread(lambda: rendered(engine.tokenizer, messages, **options))
            return await self.alone(lambda: read(text)), text[-TAIL:]
        except Refused:
            raise
        except (CapabilityError, ConfigError, RequestError) as error:
            raise BadField(str(error), "messages") from None

    async def alone(self, read: Callable[[], ImagePrompt]) -> ImagePrompt:
        """Read the pictures of one request in a thread, which may take much memory: after those of others, also of those who no
        longer wait for them, and in the same thread, for every thread keeps memory that it has freed. Raises Unavailable after
        IMAGE_SECONDS of waiting, or of its own."""
        try:
            async with asyncio.timeout(IMAGE_SECONDS):
                await self._decoding.acquire()
        except TimeoutError:  # each that waits holds its pictures
            raise Unavailable("the images of others took too long to read: try again later") from None
        reading = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(self._pictures, read))
        reading.add_done_callback(lambda _: self._decoding.release())
        reading.add_done_callback(_failed)  # nobody may be waiting for it
        try:
            async with asyncio.timeout(IMAGE_SECONDS):
                return await asyncio.shield(reading)
        except TimeoutError:
            raise Unavailable("the images took too long to read: make them smaller, or send fewer") from None

    def _options(self, body: ChatRequest, speech: Speech, turn: Turn) -> dict[str, Any]:
        options = template_kwargs(body, speech)
        goes_on = body.continue_final_message is True
        if goes_on and body.add_generation_prompt is True:
            raise BadField(
                "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
            )
        if goes_on and body.messages[-1].role != "assistant":
            raise BadField(
                "continue_final_message continues a message of the assistant: let the last one be", "messages"
            )
        options["add_generation_prompt"] = not goes_on and body.add_generation_prompt is not False
        if goes_on:
            options["continue_final_message"] = True
        if turn.shown is not None:
            options["tools"] = turn.shown
        return options


def _failed(future: asyncio.Future[Any]) -> bool:
    """Whether a future has ended without a result; its exception then counts as seen."""
    return future.done() and (future.cancelled() or future.exception() is not None)


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """The added tokens of a tokenizer by their texts."""
    core = getattr(tokenizer, "_core", None) or getattr(tokenizer, "backend_tokenizer", None) or tokenizer
    ask = getattr(core, "get_added_tokens_decoder", None)
    added = ask() if ask is not None else getattr(tokenizer, "added_tokens_decoder", {})
    return {str(t.content): int(i) for i, t in added.items() if t.content}


def check_tool_format(name: str | None) -> str | None:
    """The name of a notation of calls. Raises ConfigError for an unknown one."""
    if name is not None and name not in FORMATS:
        raise ConfigError(f"no tool format {name!r}: choose one of {', '.join(sorted(FORMATS))}")
    return name
