"""`outrider generate`: text from any target with any drafter."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli import paths
from outrider.errors import ConfigError, RequestError


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; '-', or none and a pipe, reads it from standard input.", show_default=False),
    ] = None,
    target: opt.Target = None,
    draft: opt.Draft = "auto",
    length: opt.Length = 3,
    rule: opt.Rule = "auto",
    allow_lossy: opt.AllowLossy = False,
    temperature: opt.Temperature = 1.0,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    repetition_penalty: opt.RepetitionPenalty = 1.0,
    presence_penalty: opt.PresencePenalty = 0.0,
    frequency_penalty: opt.FrequencyPenalty = 0.0,
    seed: opt.Seed = None,
    n: Annotated[int, typer.Option("--samples", help="Independent samples of the prompt.")] = 1,
    max_tokens: opt.MaxTokens = 128,
    stop: opt.Stop = None,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="Log-probabilities with this many alternatives.", show_default=False),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            "--prediction", help="A predicted continuation to draft from (see --draft prediction).", show_default=False
        ),
    ] = None,
    regex: opt.Regex = None,
    json_schema: opt.JsonSchema = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at the end-of-text token.")] = False,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    quantize_draft: opt.Quantize = None,
    implementation: opt.Implementation = "auto",
    speculative_config: opt.SpeculativeConfig = None,
    max_length: opt.MaxLength = None,
    json: opt.Json = False,
) -> None:
    """Continue PROMPT. The text is distributed as the target's own, whatever drafts it.

    Example: outrider generate "def read_config(path):" --draft ngram --temperature 0
    """
    text = read_prompt(prompt)
    if regex is not None or json_schema is not None:
        paths.needs("grammar", ("llguidance",))
    from outrider.build import Engine
    from outrider.cli.closing import Closing
    from outrider.cli.setup import engine_from_options
    from outrider.params import SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        n=n,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        logprobs=logprobs,
        ignore_eos=ignore_eos,
        grammar=opt.grammar(regex, json_schema),
    )
    if prediction is not None and draft == "auto":
        draft = "prediction+auto" if target else "prediction"
    closing = Closing()
    engine: Engine = engine_from_options(
        sinks=(closing,),
        target=target,
        draft=draft,
        length=length,
        rule=rule,
        allow_lossy=allow_lossy,
        dtype=dtype,
        device=device,
        draft_quantize=quantize_draft,
        implementation=implementation,
        speculative_config=speculative_config,
        max_length=max_length,
        slots=n,
    )
    if prediction is not None:
        from dataclasses import replace

        params = replace(params, prediction=tuple(engine.encode(prediction)))
    closing.begin(engine)
    if json or n > 1:
        result = engine.generate([text], params)[0]
        failed = next((o.error for o in result.outputs if o.error), None)
        if failed:
            raise RequestError(failed)
        if json:
            opt.print_json(document(engine, result))
        else:
            for output in result.outputs:
                typer.echo(f"--- sample {output.index} ({output.finish_reason})\n{output.text}")
            opt.say(closing.line())
        return
    for event in engine.stream(text, params):
        if event.error:
            raise RequestError(event.error)
        typer.echo(event.text, nl=False)
    typer.echo()
    opt.say(closing.line())
    if not engine.parts.rule.lossless:
        opt.err.print(
            f"outrider: lossy rule {engine.parts.rule.name!r}: total variation spent on this text {engine.counts.bias:.4f}"
        )


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
