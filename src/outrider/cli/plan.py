"""`outrider plan`: which drafter, length and batch to run here, or whether not to speculate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import paths, terminal
from outrider.cli.engine_options import ENGINE, load_engine
from outrider.cli.options import Json, Traffic, parse_batches, parse_lengths
from outrider.cli.plan_print import markdown, print_document
from outrider.cli.sampling_options import SAMPLING
from outrider.cli.takes import takes
from outrider.errors import ConfigError
from outrider.options import EngineOptions

TEXTS = 3
"""Texts of every prompt on which acceptance is predicted: what one text says varies more than prompts do."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What is compared, on how much, and whether the plan is held to a measurement. As on the command line."""

    draft: Annotated[
        list[str] | None,
        typer.Option("--draft", "-d", callback=paths.drafter, help="Drafter to consider (repeatable). Default: auto."),
    ] = None
    lengths: Annotated[
        str,
        typer.Option("--lengths", help="Draft lengths to consider; 0, plain decoding, is always among them."),
    ] = "0,1,2,3,4,6"
    batches: Annotated[str, typer.Option("--batches", help="Numbers of prompts decoded at the same time, as 1,4.")] = (
        "1"
    )
    prompts: Traffic = None
    count: Annotated[int, typer.Option("--count", min=4, help="Prompts used to predict acceptance.")] = 24
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Timed runs of each configuration.")] = 4
    price: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour", "--price", min=0, help="Price of this machine per hour: adds cost.", show_default=False
        ),
    ] = None
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Also measure every configuration on all prompts, between the other runs, and compare with the plan.",
        ),
    ] = False
    within: Annotated[
        float, typer.Option("--within", min=0.01, max=1, help="Error that --check allows, as a share.")
    ] = 0.1
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=paths.out_file,
            help="Write the document (.json) or the table (.md) to this file.",
            show_default=False,
        ),
    ] = None
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampled texts and of the order of the runs.")] = 0


@takes(ENGINE, "options", leave_out=("draft", "length", "allow_lossy", "slots"), slots=1)
@takes(PlanOptions, "asked")
@takes(SAMPLING, "sampling", only=("temperature", "max_tokens"), max_tokens=64, ignore_eos=True)
def plan(options: EngineOptions, asked: PlanOptions, sampling: Any, json: Json = False) -> None:
    """Rank configurations by expected tokens per second on this machine, with intervals, and say what would change the answer.

    Exit code with --check: 0, every prediction holds and the first choice is the measured best or tied with it; 1, one does not;
    3, too few prompts to tell.

    Example: outrider plan --lengths 0,2,4 --count 8 --max-tokens 32
    """
    from outrider.evaluate.measure import machine
    from outrider.evaluate.planning import plan as pl
    from outrider.evaluate.scoring.score import VERIFICATION, load_items

    drafts, wanted, sizes = asked.draft or ["auto"], parse_lengths(asked.lengths), parse_batches(asked.batches)
    if options.rule not in ("auto", *VERIFICATION):
        raise ConfigError(f"plan predicts {', '.join(VERIFICATION)}; rule {options.rule!r} can be measured with bench")
    items = load_items(asked.prompts, asked.count)
    if asked.check and len(items) < 2 * max(sizes):
        raise ConfigError(f"--check at batch {max(sizes)} needs at least {2 * max(sizes)} prompts: raise --count")
    engine = load_engine(options.changed(draft=drafts[0], length=max(wanted)))
    calls, models = predicted_calls(engine, drafts, wanted, items, sampling, asked.seed)
    timings = timed(engine, drafts, wanted, sizes, items, sampling, asked)
    choices = pl.rank(timings, calls)
    document = document_of(choices, sizes, asked.price, models, options.rule)
    document |= {"predicted": sorted(calls), "machine": machine()}
    document |= {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
    code = 0
    if asked.check:
        document["check"], code = checked(choices, timings, asked.within)
    if asked.out is not None:
        write(asked.out, document)
    terminal.print_json(document) if json else print_document(document)
    raise typer.Exit(code)


def timed(
    engine: Any, drafts: list[str], lengths: list[int], sizes: list[int], items: Any, sampling: Any, asked: PlanOptions
) -> Any:
    """Times of every configuration by its key, but for those that could have drafted and never did, which are said."""
    from outrider.evaluate.planning import plan as pl

    texts = [engine.encode(i.prompt) for i in items]
    keys = pl.configurations(drafts, lengths, sizes, pl.idle_drafters(engine, drafts))
    with terminal.loading(f"timing {len(keys)} configurations") as progress:
        timings = pl.time_steps(
            engine, texts, keys, sampling, rounds=asked.rounds, check=asked.check, seed=asked.seed, progress=progress
        )
    for key in pl.never_drafted(timings):
        terminal.say(
            f"{key[0]}, length {key[1]}, batch {key[2]} proposed nothing on these prompts: plain decoding, left out"
        )
        del timings[key]
    return timings


def predicted_calls(
    engine: Any, drafts: list[str], lengths: list[int], items: Any, params: Any, seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Tokens per call of every drafter whose draft distributions can be replayed, by length; and the model behind its name.

    Each length is predicted for the rule that an engine with it uses: "auto" is one rule for one draft and another for more.
    """
    from dataclasses import replace

    from outrider.build import assemble, companion
    from outrider.evaluate.planning import plan as pl
    from outrider.evaluate.scoring.score import VERIFICATION
    from outrider.options import WITHOUT_MODEL

    calls: dict[str, Any] = {}
    models: dict[str, str] = {}
    for name in drafts:
        one = assemble(replace(engine.loaded, models={}), replace(engine.loaded.options, draft=name))
        loaded = one.loaded.models if one.loaded is not None else {}
        if len(loaded) != 1 or "+" in name or ":" in name or name in ("none", *WITHOUT_MODEL):
            continue  # no distributions of its own to replay, or not a plain chain of it: its own counts are taken
        models[name] = next(iter(loaded)).name
        with terminal.loading(f"predicting acceptance of {name}") as progress:
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
