"""`outrider generate`: text from any target with any drafter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import paths, terminal
from outrider.cli.engine_options import ENGINE, SpeculativeConfig, configured, load_engine
from outrider.cli.options import Json
from outrider.cli.sampling_options import SAMPLING, JsonSchema, Regex, grammar
from outrider.cli.takes import takes
from outrider.errors import ConfigError, RequestError
from outrider.options import EngineOptions

Images = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        callback=paths.readable,
        help="A picture for a target that reads images (PNG, JPEG, WebP, GIF); several: --image a.png --image b.png.",
        show_default=False,
    ),
]


def read_prompt(given: str | None) -> str:
    """The prompt of the command line or of standard input. ConfigError where there is none."""
    if given not in (None, "-"):
        text = given
    elif sys.stdin is None or (given is None and sys.stdin.isatty()):
        raise ConfigError('a prompt is missing: outrider generate "def main(", or - to read it from standard input')
    else:
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text:
        raise ConfigError("the prompt is empty: give at least one character")
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@takes(ENGINE, "options", leave_out=("slots",), slots=1)
@takes(SAMPLING, "sampling")
def generate(
    options: EngineOptions,
    sampling: Any,
    prompt: Annotated[
        str | None,
        typer.Argument(
            callback=read_prompt,
            help="The prompt; '-', or none and a pipe, reads it from standard input.",
            show_default=False,
        ),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            "--prediction", help="A predicted continuation to draft from (see --draft prediction).", show_default=False
        ),
    ] = None,
    image: Images = None,
    regex: Regex = None,
    json_schema: JsonSchema = None,
    speculative_config: SpeculativeConfig = None,
    json: Json = False,
) -> None:
    """Continue PROMPT. The text has the target's own distribution, whatever drafts it.

    With --image the target must read images; PROMPT is then a user's message by its chat template, unless it has the model's own
    marks where the images belong.

    Example: outrider generate "def read(path):" --draft ngram --temperature 0
    """
    if regex is not None or json_schema is not None:
        paths.needs("grammar", ("llguidance",))
    from outrider.cli.closing import Closing

    sampling = replace(sampling, grammar=grammar(regex, json_schema))
    options = replace(options, slots=sampling.n)
    if prediction is not None and options.draft == "auto":
        options = replace(options, draft="prediction+auto" if options.target else "prediction")
    closing = Closing()
    engine = load_engine(configured(options, speculative_config), sinks=(closing,))
    if prediction is not None:
        sampling = replace(sampling, prediction=tuple(engine.encode(prediction)))
    given = prompt if not image else with_images(engine, str(prompt), image)
    closing.begin(engine)
    if json:
        terminal.print_json(document(engine, whole(engine, given, sampling)))
    elif sampling.n > 1:
        for output in whole(engine, given, sampling).outputs:
            typer.echo(f"--- sample {output.index} ({output.finish_reason})\n{output.text}")
        terminal.say(closing.line())
    else:
        print_stream(engine, given, sampling, closing)


def with_images(engine: Any, text: str, images: Sequence[Path]) -> Any:
    """A prompt of a text and images: as it stands where it has the model's marks for them, else as one message of a user."""
    reader = engine.images
    if reader.mark() in text:
        return reader.read(text, list(images))
    content = [*({"type": "image", "image": path} for path in images), {"type": "text", "text": text}]
    return reader.chat([{"role": "user", "content": content}])


def whole(engine: Any, prompt: Any, sampling: Any) -> Any:
    """The finished request. Raises RequestError if a sample of it failed."""
    result = engine.generate([prompt], sampling)[0]
    failed = next((o.error for o in result.outputs if o.error), None)
    if failed:
        raise RequestError(failed)
    return result


def print_stream(engine: Any, prompt: Any, sampling: Any, closing: Any) -> None:
    """The text as it comes, and how it went. Raises RequestError if it failed."""
    for event in engine.stream(prompt, sampling):
        if event.error:
            raise RequestError(event.error)
        typer.echo(event.text, nl=False)
    typer.echo()
    terminal.say(closing.line())
    if not engine.parts.rule.lossless:
        terminal.say(
            f"lossy rule {engine.parts.rule.name!r}: total variation spent on this text {engine.counts.bias:.4f}"
        )


def document(engine: Any, result: Any) -> dict[str, Any]:
    """The JSON of a finished request: the first sample at the top level, further ones under `samples`."""
    from dataclasses import asdict

    from outrider.telemetry.ledger import summary

    def one(output: Any) -> dict[str, Any]:
        out = {
            "index": output.index,
            "text": output.text,
            "token_ids": list(output.token_ids),
            "finish_reason": output.finish_reason,
            **summary(output.counts),
        }
        if output.logprobs:
            out["logprobs"] = [asdict(x) for x in output.logprobs]
        return out

    first = one(result.outputs[0])
    more = {"samples": [one(o) for o in result.outputs]} if len(result.outputs) > 1 else {}
    return {
        **first,
        **more,
        "prompt_token_ids": list(result.prompt),
        "seconds": engine.seconds,
        "drafter": engine.parts.drafter.name,
        "rule": engine.parts.rule.name,
        "lossless": engine.parts.rule.lossless,
        "length": engine.loaded.options.length if engine.loaded else None,
        "bias": sum(o.counts.bias for o in result.outputs),
    }
