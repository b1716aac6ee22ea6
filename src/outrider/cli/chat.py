"""`outrider chat`: a conversation in the terminal, with what speculation saved on every turn."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import paths, terminal
from outrider.cli.closing import Closing
from outrider.cli.engine_options import ENGINE, load_engine
from outrider.cli.generate import Images
from outrider.cli.sampling_options import SAMPLING
from outrider.cli.takes import takes
from outrider.errors import CapabilityError, ConfigError, RequestError
from outrider.options import EngineOptions


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
    """Talk to a model. End with Ctrl-D or /quit; /clear starts over; /image FILE adds a picture to the next message, for a target
    that reads images.

    A target without a chat template (the shipped pair, any base model) continues what you type instead.

    Example: outrider chat model.gguf --temperature 0.2 --max-tokens 64
    """
    if model is not None and options.target is not None:
        raise ConfigError("the model is named twice: give it alone, or as --target")
    closing = Closing()
    engine = load_engine(options if model is None else options.changed(target=model), sinks=(closing,))
    edit_lines()
    talk = Conversation(engine, system, closing)
    talk.images += image or []
    if not talk.template:
        terminal.err.print("[dim]this target has no chat template: it continues your text[/dim]")
    while (line := read_line()) is not None:
        if line in ("/quit", "/exit"):
            break
        if line == "/clear":
            talk.clear()
        elif line.strip():
            try:
                if line.startswith("/image "):
                    talk.images.append(Path(line.removeprefix("/image ").strip()))
                else:
                    talk.turn(line, sampling)
            except (RequestError, CapabilityError) as error:  # too long a conversation is no reason to lose it
                terminal.err.print(f"outrider: {error} (/clear starts over)")


def edit_lines() -> None:
    """Arrow keys and the lines typed before, where Python was built with readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  importing it is what gives input() its editing


def read_line() -> str | None:
    """One line from the user, None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


class Conversation:
    """Messages so far, and one turn at a time."""

    def __init__(self, engine: Any, system: str | None, closing: Closing) -> None:
        self.engine, self.system, self.closing = engine, system, closing
        self.images: list[Path] = []
        self.template = bool(getattr(engine.tokenizer, "chat_template", None))
        if system and not self.template:
            raise ConfigError("--system needs a target with a chat template")
        self.clear()
        if self.template:
            try:
                self._prompt([*self.messages, {"role": "user", "content": "hello"}])
            except RequestError as error:
                raise ConfigError(f"{error}: leave --system out, or use another target") from None

    def clear(self) -> None:
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []

    def _prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation. Raises RequestError for one that the template refuses."""
        if any(not isinstance(message["content"], str) for message in messages):
            return self.engine.images.chat(messages)
        try:
            return self.engine.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # templates are programs of the model's makers and raise what they like
            raise RequestError(f"the target's chat template refuses this conversation ({str(error)[:200]})") from None

    def turn(self, line: str, params: Any) -> None:
        """Stream the answer to `line`, then one line of how it went. Ctrl-C stops the answer only."""
        prompt: Any = line
        if self.images and not self.template:
            raise RequestError("images need a target with a chat template")
        if self.template:
            shown, self.images = [{"type": "image", "image": path} for path in self.images], []
            self.messages.append({"role": "user", "content": [*shown, {"type": "text", "text": line}] if shown else line})
            try:
                prompt = self._prompt(self.messages)
            except (RequestError, CapabilityError):
                self.messages.pop()
                raise
        closing, answer = self.closing.begin(self.engine), ""
        try:
            for event in self.engine.stream(prompt, params):
                if event.error:
                    raise RequestError(event.error)
                answer += event.text
                typer.echo(event.text, nl=False)
        except KeyboardInterrupt:
            terminal.err.print("[dim] (stopped)[/dim]", end="")
        except RequestError:
            closing.line()
            if self.template:
                self.messages.pop()
            raise
        typer.echo()
        if self.template:
            self.messages.append({"role": "assistant", "content": answer})
        terminal.say(closing.line())
