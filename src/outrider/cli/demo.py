"""`outrider demo`: what the product is, in under a minute, on the shipped pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from outrider.cli import tables, terminal
from outrider.cli.bench_print import phase_bar
from outrider.cli.engine_options import ENGINE, load_engine
from outrider.cli.options import Json
from outrider.cli.sampling_options import SAMPLING
from outrider.cli.takes import takes
from outrider.options import EngineOptions

COLOURS = {"accepted": "green", "corrected": "bold red", "bonus": "bold cyan", "sampled": "default"}


@takes(
    ENGINE,
    "options",
    only=("target", "draft", "length", "dtype"),
    length=2,
    slots=1,
    max_length=1024,
    prefix_cache=False,
)
@takes(SAMPLING, "sampling", only=("temperature", "max_tokens"), ignore_eos=True)
def demo(
    options: EngineOptions,
    sampling: Any,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Your own prompt. Default: a held-out one.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the text that is shown.")] = 0,
    prompts: Annotated[int, typer.Option("--prompts", min=2, help="Held-out prompts that are measured.")] = 8,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs of each prompt.")] = 2,
    json: Json = False,
) -> None:
    """The same prompt plain and speculative, side by side: speed, acceptance, the ledger, and where the time goes.

    Example: outrider demo --prompts 2 --repeats 1 --max-tokens 32
    """
    from outrider.assets import shipped_prompts
    from outrider.build import companion
    from outrider.evaluate.records import summarise

    params = replace(sampling, seed=seed)
    spec = load_engine(options)
    plain = companion(spec, "none")
    held_out = shipped_prompts()
    shown = prompt if prompt is not None else held_out[seed % len(held_out)]
    for engine in (plain, spec):  # the first run of anything pays for first touches of memory
        engine.generate([shown], replace(params, max_tokens=16))
    if not json:
        show(plain, spec, shown, params)
    texts = [spec.encode(p) for p in ([shown] if prompt is not None else []) + held_out[:prompts]]
    records = measure(plain, spec, texts, replace(params, seed=None), repeats)
    check = greedy_check(plain, spec, texts, params.max_tokens, options.length)
    document = report(summarise(records, "plain"), check, params.temperature, options.length)
    terminal.print_json(document) if json else print_report(document)


def measure(plain: Any, spec: Any, texts: list[list[int]], params: Any, repeats: int) -> list[Any]:
    """Records of both engines on every text, in turn."""
    from outrider.evaluate.measure import Arm, run_arms

    arms = [Arm("plain", plain), Arm("speculative", spec)]
    with terminal.loading("measuring, plain and speculative in turn") as progress:
        tick = terminal.counter(progress, repeats * len(texts) * 2)
        return run_arms(arms, texts, params, repeats=repeats, progress=tick)


def show(plain: Any, spec: Any, prompt: str, params: Any) -> None:
    """Stream the prompt on both engines; colours say where each piece of text came from."""
    from time import perf_counter

    console = terminal.err
    heading(console, "prompt")
    console.print(Text(prompt[-400:], style="dim"))
    for name, engine in (("plain decoding", plain), ("speculative decoding", spec)):
        heading(console, name)
        start = perf_counter()
        for event in engine.stream(prompt, params):
            console.print(coloured(engine, event), end="")
        console.print(
            f"\n[dim]{tables.rate(params.max_tokens / (perf_counter() - start))} tokens/s while printing[/dim]"
        )
    if terminal.plain(console):
        return
    key = Text.assemble(
        "every colour is the target's own distribution:  ",
        *(x for k in ("accepted", "corrected", "bonus") for x in ((k, COLOURS[k]), "  ")),
    )
    console.print(key)


def heading(console: Any, text: str) -> None:
    """A line across the terminal with a title; in a pipe the title alone."""
    console.print(f"{text}:") if terminal.plain(console) else console.rule(text, style="dim")


def coloured(engine: Any, event: Any) -> Text:
    """The event's text, token by token in the colour of its origin, where the pieces add up to what may be shown."""
    pieces = [engine.tokenizer.decode([t]) for t in event.tokens]
    if "".join(pieces) != event.text:  # a character spread over tokens: one colour for all of it
        return Text(event.text, style=COLOURS[event.origins[-1]] if event.origins else "")
    return Text.assemble(*((p, COLOURS[o]) for p, o in zip(pieces, event.origins, strict=True)))


def greedy_check(plain: Any, spec: Any, texts: list[list[int]], max_tokens: int, length: int) -> dict[str, Any]:
    """At temperature 0 both must give the same tokens; where rounding decides, the certificate says so."""
    from outrider.evaluate.scoring.divergence import certify
    from outrider.params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    pairs = zip(plain.generate(texts, params), spec.generate(texts, params), strict=True)
    found = [
        (a, certify(plain.parts.target, a.prompt, a.outputs[0].token_ids, b.outputs[0].token_ids, length + 1))
        for a, b in pairs
    ]
    differ = [d for _, d in found if d is not None]
    return {
        "prompts": len(found),
        "identical": len(found) - len(differ),
        "certified": sum(d.certified for d in differ),
        "uncertified": sum(not d.certified for d in differ),
        "divergences": [{"position": d.position, "gap": d.gap, "delta": d.delta} for d in differ],
    }


def report(arms: list[Any], check: dict[str, Any], temperature: float, length: int) -> dict[str, Any]:
    """The demo's document."""
    from outrider.evaluate.measure import machine
    from outrider.telemetry.ledger import predicted_speedup, summary

    plain, spec = arms
    sides = {
        name: {
            "tokens_per_second": arm.tokens_per_second,
            "low": arm.low,
            "high": arm.high,
            "tokens": arm.tokens,
            "seconds": arm.phases,
        }
        for name, arm in (("plain", plain), ("speculative", spec))
    }
    return {
        **sides,
        "speedup": spec.speedup.value,
        "speedup_interval": [spec.speedup.low, spec.speedup.high],
        "verdict": spec.speedup.verdict,
        "predicted_speedup": predicted_speedup(spec.counts, spec.phases, plain.counts, plain.phases),
        **summary(spec.counts),
        "greedy": check,
        "temperature": temperature,
        "length": length,
        "machine": machine(),
    }


def print_report(d: dict[str, Any]) -> None:
    """The document for people: a table, the ledger in a sentence, a bar of the step's time."""
    table = Table(
        title=f"temperature {d['temperature']:g}, draft length {d['length']}, held-out prompts", title_justify="left"
    )
    for column in ("", "tokens/s", "10th to 90th percentile", "where a step's time goes"):
        table.add_column(column)
    out = terminal.console()
    for name in ("plain", "speculative"):
        side = d[name]
        table.add_row(
            name,
            tables.rate(side["tokens_per_second"]),
            f"{tables.rate(side['low'])} to {tables.rate(side['high'])}",
            phase_bar(side["seconds"], 0 if terminal.plain(out) else 12),
        )
    tables.show(table, out)
    low, high = d["speedup_interval"]
    out.print(
        f"speed-up            [bold]{d['speedup']:.2f}[/bold]  (95% interval {low:.2f} to {high:.2f}; "
        f"acceptance and the clock predict {d['predicted_speedup']:.2f})"
    )
    out.print(f"acceptance length   {d['acceptance_length']:.2f} tokens per step (bonus included)")
    book = d["ledger"]
    out.print(
        f"rejections          predicted {book['predicted']:.1f}, observed {book['observed']}, expected within "
        f"{book['low']:.0f} to {book['high']:.0f}: {'agree' if book['agrees'] else '[bold red]DISAGREE[/bold red]'}"
    )
    greedy = d["greedy"]
    rest = f", {greedy['certified']} differ by rounding (certified)" if greedy["certified"] else ""
    bad = f", [bold red]{greedy['uncertified']} differ without a reason[/bold red]" if greedy["uncertified"] else ""
    out.print(
        f"greedy text         {greedy['identical']} of {greedy['prompts']} prompts identical, token by token{rest}{bad}"
    )
