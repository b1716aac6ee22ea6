"""Prepares a request for the queue: encodes its text, and refuses what cannot be served."""

from __future__ import annotations

from typing import Any

from outrider.engine.text import TextStream, special_tokens
from outrider.errors import CapabilityError, RequestError
from outrider.params import SamplingParams
from outrider.pictured import ImagePrompt, Pictured
from outrider.protocols import ImageReader
from outrider.sampling.pipeline import LogitsPipeline


class Intake:
    """Checks requests for one engine. May be used from any thread.

    tokenizer: a Hugging Face tokenizer, or None: then prompts are ids, and there is no text. most: the most tokens of a sequence.
    images: of a target that reads images.
    """

    def __init__(self, tokenizer: Any, pipeline: LogitsPipeline, most: int, images: ImageReader | None = None) -> None:
        self.tokenizer, self.pipeline, self.most = tokenizer, pipeline, most
        self._images = images
        self._special: dict[int, str] | None = None

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a text. Raises RequestError without a tokenizer, and for what is no text."""
        if self.tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer: build the engine with one, or pass token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            told = f"the prompt has half a surrogate pair, which is no character, at place {error.start}: leave it out"
            raise RequestError(told) from None
        return list(self.tokenizer.encode(prompt))

    @property
    def reader(self) -> ImageReader:
        """Of prompts with images. Raises CapabilityError if the target reads none."""
        if self._images is None:
            raise CapabilityError(
                "this engine's target reads no images: choose an image-text-to-text model, given as a folder or with its processor "
                "(tokenizer=processor)"
            )
        return self._images

    def pictured(self, prompt: list[int]) -> Pictured | None:
        """What the images of a prompt are to the target, which sees new ones now: only between two steps. Raises RequestError for
        images that it cannot read exactly."""
        if not isinstance(prompt, ImagePrompt):
            return None
        try:
            rows = tuple(map(self.reader.rows, prompt.images))
        except CapabilityError as error:
            raise RequestError(str(error)) from None
        return Pictured(rows, tuple(image.first for image in prompt.images))

    def check(self, tokens: list[int], params: SamplingParams) -> None:
        """Raise RequestError for a request that cannot be served."""
        vocab = self.pipeline.vocab_size
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token")
        if len(tokens) >= self.most:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.most}: shorten it to at most "
                f"{self.most - 1}, or build the engine with a larger max_length if the model allows it"
            )
        wrong = next((t for t in tokens if not 0 <= t < vocab), None)
        if wrong is not None:
            raise RequestError(
                f"prompt token {wrong} is outside the vocabulary of {vocab}: use this target's tokenizer"
            )
        params.check_vocab(vocab)
        if params.stop and self.tokenizer is None:
            raise RequestError("a stop string needs a tokenizer: build the engine with one, or use stop_token_ids")
        if params.grammar is not None:
            self.compile(params.grammar)

    def compile(self, grammar: str) -> None:
        """Compile a grammar and cache it. Raises RequestError for a bad one, or if the tokenizer does not support grammars."""
        if self.pipeline.grammars is None:
            raise RequestError("a grammar needs a fast tokenizer (tokenizer.json), and this engine has none")
        self.pipeline.grammars.compile(grammar)

    def text(self, prompt: list[int], params: SamplingParams) -> TextStream | None:
        """The text of one sequence; tokenizers whose decoding looks to the left need the prompt's last tokens."""
        if self.tokenizer is None:
            return None
        named = bool(params.stop or params.keep_special)
        if named and self._special is None:
            self._special = special_tokens(self.tokenizer)
        return TextStream(
            self.tokenizer,
            params.stop,
            context=prompt[-12:],
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
            special=self._special if named else None,
            shown=params.keep_special,
        )
