"""`outrider plan`: which drafter, length and batch to run here, or whether not to speculate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from outrider.cli import options as opt
from outrider.cli.bench import parse_lengths
from outrider.errors import ConfigError


def plan(
    target: opt.Target = None,
    draft: Annotated[
        list[str] | None, typer.Option("--draft", "-d", help="Drafter to consider (repeatable). Default: auto.")
    ] = None,
    lengths: Annotated[
        str, typer.Option("--lengths", help="Draft lengths; 0, plain decoding, is always among them.")
    ] = "0,1,2,3,4,6",
    batches: Annotated[str, typer.Option("--batches", help="Prompts decoded together, as 1,4.")] = "1",
    rule: opt.Rule = "speculative_sampling",
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Prompts of your traffic.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option("--count", min=4, help="Prompts used to predict acceptance.")] = 24,
    temperature: opt.Temperature = 1.0,
    max_tokens: opt.MaxTokens = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Timed runs of each configuration.")] = 4,
    price: Annotated[
        float | None,
        typer.Option("--price", min=0, help="Price of this machine per hour: adds cost.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    implementation: opt.Implementation = "auto",
    max_length: opt.MaxLength = None,
    json: opt.Json = False,
) -> None:
    """Rank configurations by expected tokens per second on this machine, with intervals, and say what would change the answer."""
    from outrider.cli.setup import engine_from_options
    from outrider.engine.build import companion
    from outrider.evaluate import plan as pl
    from outrider.evaluate.measure import machine
    from outrider.evaluate.predict import load_items
    from outrider.sampling.params import SamplingParams

    drafts, wanted, sizes = draft or ["auto"], parse_lengths(lengths), parse_batches(batches)
    if rule not in ("auto", "speculative_sampling"):
        raise ConfigError(f"plan predicts speculative_sampling; rule {rule!r} can be measured with bench")
    engine = engine_from_options(
        target=target, draft=drafts[0], length=max(wanted), rule="speculative_sampling", dtype=dtype, device=device,
        implementation=implementation, max_length=max_length, slots=1,
    )  # fmt: skip
    items = load_items(prompts, count)
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
    calls: dict[str, Any] = {}
    models: dict[str, str] = {}
    for name in drafts:
        one = companion(engine, name)
        if len(one.loaded.models) != 1 or "+" in name or name in ("none", "ngram", "prediction"):
            continue  # no law of its own to replay: its own counts are taken
        models[name] = next(iter(one.loaded.models))
        with opt.loading(f"predicting acceptance of {name}") as progress:
            calls[name] = pl.tokens_per_call(pl.read_texts(one, items, params, progress, seed=seed), wanted)
    texts = [engine.encode(i.prompt) for i in items]
    with opt.loading("timing") as progress:
        timings = pl.time_steps(engine, texts, drafts, wanted, sizes, params, rounds=rounds, progress=progress)
    choices = pl.rank(timings, calls, seed=seed)
    document = document_of(choices, sizes, price, models)
    document |= {"predicted": sorted(calls), "machine": machine(), "temperature": temperature, "max_tokens": max_tokens}
    opt.print_json(document) if json else print_document(document)


def parse_batches(text: str) -> list[int]:
    """ "1,4" -> [1, 4]."""
    try:
        sizes = sorted({int(x) for x in text.split(",") if x.strip()})
    except ValueError:
        sizes = []
    if not sizes or not all(1 <= n <= 1024 for n in sizes):
        raise ConfigError(f"--batches takes whole numbers from 1 to 1024 separated by commas, got {text!r}")
    return sizes


def document_of(choices: list[Any], sizes: list[int], price: float | None, models: dict[str, str]) -> dict[str, Any]:
    """The ranking and the advice for every batch size."""
    from dataclasses import asdict

    from outrider.evaluate.plan import advice

    rows = []
    for c in choices:
        cost = None if price is None else price / 3600 / c.tokens_per_second * 1e6
        rows.append({"name": c.name, **asdict(c), "cost_per_million_tokens": cost})
    return {"choices": rows, "advice": {str(b): advice(choices, b, models) for b in sizes}}


def print_document(d: dict[str, Any]) -> None:
    """The document for people."""
    console = opt.Console(highlight=False)
    table = Table()
    priced = d["choices"][0]["cost_per_million_tokens"] is not None
    for column in (
        "configuration",
        "tokens/s (95%)",
        "tokens per call",
        "ms per step",
        "most of it",
        "break-even",
        *(["per million tokens"] if priced else []),
    ):
        table.add_column(column, overflow="fold")
    for c in d["choices"]:
        row = [
            c["name"],
            f"{c['tokens_per_second']:.1f} ({c['low']:.1f} to {c['high']:.1f})",
            f"{c['tokens_per_call']:.2f}",
            f"{1e3 * sum(c['seconds'].values()):.1f}",
            c["bottleneck"],
            ""
            if c["break_even"] is None
            else "none is enough"
            if c["break_even"] == float("inf")
            else f"{c['break_even']:.2f}",
        ]
        table.add_row(*row, *([f"{c['cost_per_million_tokens']:.2f}"] if priced else []))
    console.print(table)
    for batch, a in d["advice"].items():
        gain = "" if a["speedup"] is None or not a["speculate"] else f", {a['speedup']:.2f} times plain decoding"
        tied = f"; within its interval: {', '.join(a['tied'])}" if a["tied"] else ""
        console.print(f"[bold]batch {batch}: {a['choice']}{gain}[/bold]{tied}")
        console.print(f"  {a['what_would_change_it']}")
        console.print(f"  outrider generate {' '.join(a['options'])} PROMPT")
        if a["vllm"]:
            console.print(f"  vllm serve TARGET --speculative-config '{a['vllm']}'", soft_wrap=True)
