"""`outrider chat`: a conversation in the terminal, with what speculation saved on every turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import paths, terminal
from outrider.cli.chat_lines import ENDS, edited_lines, history_file, obey, read_text
from outrider.cli.closing import Closing, sentence
from outrider.cli.engine_options import ENGINE, load_engine
from outrider.cli.generate import Images
from outrider.cli.sampling_options import SAMPLING
from outrider.cli.takes import takes
from outrider.conversations import rendered_text
from outrider.dialects.formats import FORMATS
from outrider.dialects.harmony import HarmonyReader
from outrider.dialects.pieces import Piece
from outrider.dialects.reader import Reader
from outrider.errors import CapabilityError, ConfigError, RequestError
from outrider.options import EngineOptions
from outrider.records import Counts

TAIL = 32
"""Tokens at the end of a prompt that tell whether the template has opened the thinking."""


@takes(ENGINE, "options", leave_out=("slots",), slots=1)
@takes(SAMPLING, "sampling", only=("temperature", "top_p", "seed", "max_tokens"), temperature=0.7, max_tokens=256)
def chat(
    options: EngineOptions,
    sampling: Any,
    model: Annotated[
        str | None,
        typer.Argument(
            callback=paths.model,
            help="The model, as --target: a GGUF file, a folder or a Hub name.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System message of the conversation.", show_default=False)
    ] = None,
    image: Images = None,
) -> None:
    """Talk to a model. End with Ctrl-D or /quit; /help lists the commands, such as /system, /temperature, /draft, /stats and,
    for a target that reads images, /image FILE.

    A target without a chat template (the shipped pair, any base model) continues what you type instead. Lines typed before are kept
    in ~/.local/state/outrider/chat_history.

    Example: outrider chat model.gguf --temperature 0.2 --max-tokens 64
    """
    if model is not None and options.target is not None:
        raise ConfigError("the model is named twice: give it alone, or as --target")
    closing = Closing()
    engine = load_engine(options if model is None else options.changed(target=model), sinks=(closing,))
    talk = Conversation(engine, system, closing, sampling)
    talk.show(image or [])
    if not talk.template:
        terminal.err.print("[dim]this target has no chat template: it continues your text[/dim]")
    with edited_lines(history_file()):
        while (text := read_text()) is not None and text.strip() not in ENDS:
            if (said := obey(talk, text)) is not None:
                terminal.say(said)
            elif text.strip():
                try:
                    talk.turn(text.removeprefix("/") if text.startswith("//") else text)
                except (RequestError, CapabilityError) as error:  # too long a conversation is no reason to lose it
                    terminal.err.print(f"outrider: {error} (/clear starts over)")


class Conversation:
    """Messages so far, and one turn at a time. params: of the next turn; /temperature and /draft change them. images: files that
    the next message shows."""

    def __init__(self, engine: Any, system: str | None, closing: Closing, params: Any) -> None:
        self.engine, self.closing = engine, closing
        source = getattr(engine.tokenizer, "chat_template", None)
        self.template = bool(source)
        self.system: str | None = None
        self.dialect, self.params = None, params
        self.turns, self.seconds, self.total = 0, 0.0, Counts()
        self.context = 0
        self.clear()
        if self.template:
            from outrider.dialects.detect import detect

            self.dialect = detect(self._render, str(source))
            self.params = replace(params, keep_special=_marks(engine.tokenizer, self.read_marks()))
        try:
            self.instruct(system)
        except RequestError as error:
            raise ConfigError(f"{error}: leave --system out, or use another target") from None

    def read_marks(self) -> tuple[str, ...]:
        """The marks that the reader of answers needs to see: of channels (gpt-oss), or of thinking."""
        form, dialect = FORMATS["gpt_oss"], self.dialect
        if dialect is None:
            return ()
        return (form.open, *form.marks) if dialect.form == form.name else dialect.thinking or ()

    def clear(self) -> None:
        """Start over, with the same system message."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        self.images: list[Path] = []
        self.context = 0

    def instruct(self, system: str | None) -> None:
        """Another system message from now on. Raises RequestError if the target's template takes none."""
        if system and not self.template:
            raise ConfigError("--system needs a target with a chat template")
        rest = self.messages[bool(self.system) :]
        messages = [*([{"role": "system", "content": system}] if system else []), *rest]
        if self.template:
            self._prompt([*messages, {"role": "user", "content": "hello"}])
        self.system, self.messages = system, messages

    def show(self, images: Sequence[Path]) -> None:
        """Show these with the next message too. Raises ConfigError if the target has no chat template, which puts them in place."""
        if images and not self.template:
            raise ConfigError("images need a target with a chat template")
        self.images += images

    def _render(self, messages: list[dict[str, Any]], **more: Any) -> str:
        return rendered_text(self.engine.tokenizer, messages, **more)

    def _prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation. Raises RequestError for one that the template refuses."""
        if any(not isinstance(message["content"], str) for message in messages):
            return self.engine.images.chat(messages)
        tokenizer = self.engine.tokenizer
        try:
            text = rendered_text(tokenizer, messages, add_generation_prompt=True)
            return list(tokenizer.encode(text, add_special_tokens=False))
        except Exception as error:  # templates are programs of the model's makers and raise what they like
            raise RequestError(f"the target's chat template refuses this conversation ({str(error)[:200]})") from None

    def turn(self, line: str) -> None:
        """Stream the answer to `line`, thinking dimmed, then one line of how it went. Ctrl-C stops the answer only."""
        prompt: Any = line
        if self.template:
            shown, self.images = [{"type": "image", "image": path} for path in self.images], []
            self.messages.append(
                {"role": "user", "content": [*shown, {"type": "text", "text": line}] if shown else line}
            )
            try:
                prompt = self._prompt(self.messages)
            except (RequestError, CapabilityError):
                self.messages.pop()
                raise
        closing, said = self.closing.begin(self.engine), {"reasoning": "", "content": ""}
        try:
            for kind, text in self._pieces(prompt):
                said[kind] += text
                typer.echo(typer.style(text, dim=True) if kind == "reasoning" else text, nl=False)
        except KeyboardInterrupt:
            terminal.err.print("[dim] (stopped)[/dim]", end="")
        except RequestError:
            closing.line()
            if self.template:
                self.messages.pop()
            raise
        typer.echo()
        if self.template:
            thought = {"reasoning_content": said["reasoning"]} if said["reasoning"] else {}
            self.messages.append({"role": "assistant", "content": said["content"], **thought})
        line = closing.line()
        self._count()
        terminal.say(line)

    def _pieces(self, prompt: Any) -> Iterator[tuple[str, str]]:
        """Kind ("reasoning" or "content") and text of the pieces of an answer."""
        thinking, context = None, len(prompt)
        if self.dialect is not None:
            thinking = self.dialect.thinks(self.engine.tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False))
        channels = self.dialect is not None and self.dialect.form == "gpt_oss"
        reader: HarmonyReader | Reader = HarmonyReader() if channels else Reader(None, thinking)
        for event in self.engine.stream(prompt, self.params):
            if event.error:
                raise RequestError(event.error)
            context += len(event.tokens)
            self.context = context
            yield from map(_said, reader.feed(event.text))
        yield from map(_said, reader.finish())

    def _count(self) -> None:
        """Add the last turn to the sums of the conversation."""
        self.turns += 1
        self.seconds += self.closing.seconds
        self.total.merge(self.engine.counts)

    def stats(self) -> str:
        """The sums of the conversation so far."""
        if not self.turns:
            return "nothing was said yet"
        line = sentence(self.total, self.seconds, 0.0, lossless=self.engine.parts.rule.lossless).rpartition("; ")[0]
        room = f"; the conversation has {self.context} of {self.engine.max_length} tokens" if self.template else ""
        return f"{self.turns} turn{'s' * (self.turns > 1)}; {line}{room}"


def _said(piece: Piece) -> tuple[str, str]:
    """A piece as it is shown: what is no thinking is the answer, a call that nobody asked for too."""
    return ("reasoning" if piece.kind == "reasoning" else "content"), piece.text


def _marks(tokenizer: Any, marks: tuple[str, ...]) -> tuple[int, ...]:
    """Special tokens that the text must show, for the reader: those that mark thinking."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ids = (tokenizer.get_vocab().get(mark.strip()) for mark in marks)
    return tuple(i for i in ids if i is not None and i in special and i != getattr(tokenizer, "eos_token_id", None))
