"""`outrider chat`: a conversation in the terminal, with what speculation saved on every turn."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli.closing import Closing
from outrider.errors import ConfigError, RequestError


def chat(
    target: opt.Target = None,
    draft: opt.Draft = "auto",
    length: opt.Length = 3,
    rule: opt.Rule = "auto",
    allow_lossy: opt.AllowLossy = False,
    temperature: opt.Temperature = 0.7,
    top_p: opt.TopP = 1.0,
    seed: opt.Seed = None,
    max_tokens: opt.MaxTokens = 256,
    system: Annotated[str | None, typer.Option("--system", help="System message.", show_default=False)] = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    implementation: opt.Implementation = "auto",
    max_length: opt.MaxLength = None,
) -> None:
    """Talk to a model. End with Ctrl-D or /quit; /clear starts over.

    A target without a chat template (the shipped pair, any base model) continues what you type instead.
    """
    from outrider.cli.setup import engine_from_options
    from outrider.params import SamplingParams

    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens)
    closing = Closing()
    engine = engine_from_options(
        sinks=(closing,),
        target=target,
        draft=draft,
        length=length,
        rule=rule,
        allow_lossy=allow_lossy,
        dtype=dtype,
        device=device,
        implementation=implementation,
        max_length=max_length,
        slots=1,
    )
    edit_lines()
    talk = Conversation(engine, system, closing)
    if not talk.template:
        opt.err.print("[dim]this target has no chat template: it continues your text[/dim]")
    while (line := read_line()) is not None:
        if line in ("/quit", "/exit"):
            break
        if line == "/clear":
            talk.clear()
        elif line.strip():
            try:
                talk.turn(line, params)
            except RequestError as error:  # too long a conversation is no reason to lose it
                opt.err.print(f"outrider: {error} (/clear starts over)")


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
        self.messages: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation. Raises RequestError for one that the template refuses."""
        try:
            return self.engine.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # templates are programs of the model's makers and raise what they like
            raise RequestError(f"the target's chat template refuses this conversation ({str(error)[:200]})") from None

    def turn(self, line: str, params: Any) -> None:
        """Stream the answer to `line`, then one line of how it went. Ctrl-C stops the answer only."""
        prompt: Any = line
        if self.template:
            self.messages.append({"role": "user", "content": line})
            try:
                prompt = self._prompt(self.messages)
            except RequestError:
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
            opt.err.print("[dim] (stopped)[/dim]", end="")
        except RequestError:
            closing.line()
            if self.template:
                self.messages.pop()
            raise
        typer.echo()
        if self.template:
            self.messages.append({"role": "assistant", "content": answer})
        opt.say(closing.line())
