"""`outrider plan`: which drafter, length and batch to run here, or whether not to speculate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from outrider.cli import options as opt
from outrider.cli import paths
from outrider.cli.bench import parse_lengths
from outrider.errors import ConfigError

TEXTS = 3
"""Texts of every prompt on which acceptance is predicted: what one text says varies more than prompts do."""


def plan(
    target: opt.Target = None,
    draft: Annotated[
        list[str] | None,
        typer.Option("--draft", "-d", callback=paths.drafter, help="Drafter to consider (repeatable). Default: auto."),
    ] = None,
    lengths: Annotated[
        str, typer.Option("--lengths", help="Draft lengths; 0, plain decoding, is always among them.")
    ] = "0,1,2,3,4,6",
    batches: Annotated[str, typer.Option("--batches", help="Prompts decoded together, as 1,4.")] = "1",
    rule: opt.Rule = "auto",
    prompts: Annotated[
        Path | None, typer.Option("--prompts", callback=paths.file, help="Prompts of your traffic.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option("--count", min=4, help="Prompts used to predict acceptance.")] = 24,
    temperature: opt.Temperature = 1.0,
    max_tokens: opt.MaxTokens = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Timed runs of each configuration.")] = 4,
    price: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour", "--price", min=0, help="Price of this machine per hour: adds cost.", show_default=False
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Measure every configuration on all prompts, in between, and hold the plan to it."
        ),
    ] = False,
    within: Annotated[float, typer.Option("--within", min=0.01, max=1, help="Error --check allows, as a share.")] = 0.1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=paths.out_file,
            help="Write the document (.json) or the table (.md) to this file.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    implementation: opt.Implementation = "auto",
    max_length: opt.MaxLength = None,
    json: opt.Json = False,
) -> None:
    """Rank configurations by expected tokens per second on this machine, with intervals, and say what would change the answer.

    Exit code with --check: 0, every prediction holds and the first choice is the measured best or tied with it; 1, one does not;
    3, too few prompts to tell.
    """
    from outrider.cli.setup import engine_from_options
    from outrider.evaluate.measure import machine
    from outrider.evaluate.planning import plan as pl
    from outrider.evaluate.scoring.score import VERIFICATION, load_items
    from outrider.params import SamplingParams

    drafts, wanted, sizes = draft or ["auto"], parse_lengths(lengths), parse_batches(batches)
    if rule not in ("auto", *VERIFICATION):
        raise ConfigError(f"plan predicts {', '.join(VERIFICATION)}; rule {rule!r} can be measured with bench")
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
    items = load_items(prompts, count)
    if check and len(items) < 2 * max(sizes):
        raise ConfigError(f"--check at batch {max(sizes)} needs at least {2 * max(sizes)} prompts: raise --count")
    engine = engine_from_options(
        target=target, draft=drafts[0], length=max(wanted), rule=rule, dtype=dtype, device=device,
        implementation=implementation, max_length=max_length, slots=1,
    )  # fmt: skip
    calls, models = predicted_calls(engine, drafts, wanted, items, params, seed)
    texts = [engine.encode(i.prompt) for i in items]
    keys = pl.configurations(drafts, wanted, sizes, pl.idle_drafters(engine, drafts))
    with opt.loading(f"timing {len(keys)} configurations") as progress:
        timings = pl.time_steps(engine, texts, keys, params, rounds=rounds, check=check, seed=seed, progress=progress)
    for key in pl.never_drafted(timings):
        opt.say(
            f"{key[0]}, length {key[1]}, batch {key[2]} proposed nothing on these prompts: plain decoding, left out"
        )
        del timings[key]
    choices = pl.rank(timings, calls)
    document = document_of(choices, sizes, price, models, rule)
    document |= {"predicted": sorted(calls), "machine": machine(), "temperature": temperature, "max_tokens": max_tokens}
    code = 0
    if check:
        document["check"], code = checked(choices, timings, within)
    if out is not None:
        write(out, document)
    opt.print_json(document) if json else print_document(document)
    raise typer.Exit(code)


def predicted_calls(
    engine: Any, drafts: list[str], lengths: list[int], items: Any, params: Any, seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Tokens per call of every drafter whose law can be replayed, by length; and the model behind its name.

    Each length is predicted for the rule that an engine with it uses: "auto" is one rule for one draft and another for more.
    """
    from dataclasses import replace

    from outrider.build import assemble, companion
    from outrider.evaluate.planning import plan as pl
    from outrider.evaluate.scoring.score import VERIFICATION

    calls: dict[str, Any] = {}
    models: dict[str, str] = {}
    for name in drafts:
        one = assemble(replace(engine.loaded, models={}), replace(engine.loaded.options, draft=name))
        if len(one.loaded.models) != 1 or "+" in name or ":" in name or name in ("none", "ngram", "prediction"):
            continue  # no law of its own to replay, or not a plain chain of it: its own counts are taken
        models[name] = next(iter(one.loaded.models)).name
        with opt.loading(f"predicting acceptance of {name}") as progress:
            texts = pl.read_texts(one, items, replace(params, n=TEXTS), progress, seed=seed)
        rules = {n: companion(engine, name, length=n).parts.rule.name for n in lengths if n}
        used: set[Any] = {VERIFICATION[r] for r in rules.values()}
        kinds = {v: pl.tokens_per_call(texts, lengths, v) for v in used}
        calls[name] = {n: kinds[VERIFICATION[r]][n] for n, r in rules.items()}
    return calls, models


def checked(choices: list[Any], timings: Any, within: float) -> tuple[dict[str, Any], int]:
    """The plan beside its measurement: the part of the document, and the exit code."""
    from dataclasses import asdict

    from outrider.evaluate.planning import plan_check as pc

    rows = pc.check(choices, timings)
    firsts = pc.first_choices(choices, timings)
    outcomes = [pc.outcome(r, within) for r in rows]
    code = 1 if "off" in outcomes or any(f.verdict == "slower" for f in firsts) else 3 if "open" in outcomes else 0
    shown = [{**asdict(r), "error": r.error, "outcome": o} for r, o in zip(rows, outcomes, strict=True)]
    best = [{**asdict(f), "verdict": f.verdict} for f in firsts]
    return {"within": within, "held": outcomes.count("within"), "rows": shown, "first_choice": best}, code


def write(path: Path, document: dict[str, Any]) -> None:
    """The document as JSON, or its tables as Markdown."""
    import json

    from outrider.files import write_whole

    text = markdown(document) if path.suffix == ".md" else json.dumps(document, indent=1)
    write_whole(path, text.encode())


def markdown(d: dict[str, Any]) -> str:
    """The check's table, or the ranking where nothing was checked."""
    lines = []
    if "check" not in d:
        lines += ["| configuration | tokens/s | tokens per call | ms per step | bottleneck |", "|---|---|---|---|---|"]
        for c in d["choices"]:
            rate = f"{c['tokens_per_second']:.1f} ({c['low']:.1f} to {c['high']:.1f})"
            step = 1e3 * sum(c["seconds"].values())
            lines.append(f"| {c['name']} | {rate} | {c['tokens_per_call']:.2f} | {step:.2f} | {c['bottleneck']} |")
        return "\n".join(lines) + "\n"
    lines += [
        "| configuration | predicted tokens/s | measured tokens/s (95%) | error | tokens per call: predicted, measured | "
        "ms per step: predicted, measured |",
        "|---|---|---|---|---|---|",
    ]
    for r in d["check"]["rows"]:
        lines.append("| " + " | ".join(cells(r)) + " |")
    return "\n".join(lines) + "\n"


def cells(r: dict[str, Any]) -> list[str]:
    """One row of the check."""
    return [
        r["name"],
        f"{r['predicted']:.1f}",
        f"{r['measured']:.1f} ({r['low']:.1f} to {r['high']:.1f})",
        f"{100 * r['error']:+.1f}%",
        f"{r['tokens_per_call']:.2f}, {r['measured_tokens_per_call']:.2f}",
        f"{1e3 * r['step']:.2f}, {1e3 * r['measured_step']:.2f}",
    ]


def parse_batches(text: str) -> list[int]:
    """ "1,4" -> [1, 4]."""
    try:
        sizes = sorted({int(x) for x in text.split(",") if x.strip()})
    except ValueError:
        sizes = []
    if not sizes or not all(1 <= n <= 1024 for n in sizes):
        raise ConfigError(f"--batches takes whole numbers from 1 to 1024 separated by commas, got {text!r}")
    return sizes


def document_of(
    choices: list[Any], sizes: list[int], price: float | None, models: dict[str, str], rule: str
) -> dict[str, Any]:
    """The ranking and the advice for every batch size."""
    from dataclasses import asdict

    from outrider.evaluate.planning.plan import advice

    rows = []
    for c in choices:
        cost = None if price is None else price / 3600 / c.tokens_per_second * 1e6
        rows.append({"name": c.name, **asdict(c), "cost_per_million_tokens": cost})
    return {"choices": rows, "advice": {str(b): advice(choices, b, models, rule) for b in sizes}}


def print_document(d: dict[str, Any]) -> None:
    """The document for people."""
    console = opt.console()
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
    opt.show(table, console)
    for batch, a in d["advice"].items():
        gain = "" if a["speedup"] is None or not a["speculate"] else f", {a['speedup']:.2f} times plain decoding"
        tied = f"; within its interval: {', '.join(a['tied'])}" if a["tied"] else ""
        console.print(f"[bold]batch {batch}: {a['choice']}{gain}[/bold]{tied}")
        console.print(f"  {a['what_would_change_it']}")
        console.print(f"  outrider generate {' '.join(a['options'])} PROMPT")
        if a["vllm"]:
            console.print(f"  vllm serve TARGET --speculative-config '{a['vllm']}'", soft_wrap=True)
    if "check" in d:
        print_check(console, d["check"])


def print_check(console: Any, d: dict[str, Any]) -> None:
    """Predicted beside measured."""
    table = Table(title=f"{d['held']} of {len(d['rows'])} within {d['within']:.0%}", title_justify="left")
    for column in (
        "configuration", "predicted tokens/s", "measured (95%)", "error", "tokens per call: predicted, measured",
        "ms per step: predicted, measured",
    ):  # fmt: skip
        table.add_column(column, overflow="fold")
    for r in d["rows"]:
        table.add_row(*cells(r))
    opt.show(table, console)
    for f in d["first_choice"]:
        x = f["ratio"]
        beside = f" {f['best']} ({x['value']:.3f} of its speed, {x['low']:.3f} to {x['high']:.3f})"
        console.print(
            f"batch {f['batch']}: first choice {f['choice']} is {f['verdict']}"
            + ("" if f["choice"] == f["best"] else f":{beside}")
        )
