"""`outrider plan`: which drafter, length and batch to run here, or whether not to speculate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from outrider.cli import paths, plan_contexts, plan_fleet, plan_launch, plan_paper, terminal
from outrider.cli.engine_options import ENGINE, load_engine
from outrider.cli.options import Json, parse_acceptance, parse_batches, parse_lengths
from outrider.cli.plan_options import PlanOptions, check_together
from outrider.cli.plan_print import markdown, print_document
from outrider.cli.sampling_options import SAMPLING
from outrider.cli.takes import takes
from outrider.errors import ConfigError
from outrider.options import EngineOptions

TEXTS = 3
"""Texts of every prompt on which acceptance is predicted: what one text says varies more than prompts do."""


@takes(
    ENGINE,
    "options",
    leave_out=("target", "draft", "length", "lengths", "allow_lossy", "slots"),
    slots=1,
    prefix_cache=False,
)
@takes(PlanOptions, "asked")
@takes(SAMPLING, "sampling", only=("temperature", "max_tokens"), max_tokens=64, ignore_eos=True)
def plan(options: EngineOptions, asked: PlanOptions, sampling: Any, json: Json = False) -> None:
    """Rank configurations by expected tokens per second on this machine, with intervals, and say what would change the answer.

    Exit code with --check: 0, every prediction holds and the first choice is the measured best or tied with it; 1, one does not;
    3, too few prompts to tell.

    --vllm and --ray print the first choice for others to start. --traffic simulates replicas of this machine under a traffic, and
    says how many a target on latency needs. --gpus plans on paper, from data sheets, for a target that is not here.

    Example: outrider plan --lengths 0,2,4 --count 8 --max-tokens 32

    For vLLM and Ray Serve: outrider plan --batches 1,4,16 --vllm 0.33 --ray --out serve.yaml

    A fleet: outrider plan --traffic poisson:4 --ttft 0.5 --itl 0.02 --price 0.20

    Long contexts: outrider plan --contexts 256,512,960 --batches 1,4 --acceptance 0.9

    On paper: outrider plan --gpus 8 --target 70b --draft 1b --batches 1,8,64
    """
    check_together(asked)
    if asked.gpus is not None:
        on_paper(options, asked, sampling, json)
        return
    options = options.changed(target=paths.model(asked.target))
    if asked.contexts is not None:
        long_contexts(options, asked, json)
        return
    paths.drafter(asked.draft)  # what leads nowhere is said before anything heavy is imported
    raise typer.Exit(measured(options, asked, sampling, json))


def on_paper(options: EngineOptions, asked: PlanOptions, sampling: Any, json: bool) -> None:
    """`--gpus`: from data sheets. Raises ConfigError for the options of an engine, which say nothing there."""
    if options != EngineOptions(slots=options.slots, prefix_cache=False):
        raise ConfigError("--gpus plans on paper: the options of an engine (--rule, --dtype, ...) say nothing there")
    document = plan_paper.paper_document(asked.target, sampling.max_tokens, asked)
    show(document, asked.out, json, plan_paper.print_paper)


def long_contexts(options: EngineOptions, asked: PlanOptions, json: bool) -> None:
    """`--contexts`: passes are timed, and acceptance is given."""
    plan_contexts.parse_contexts(asked.contexts or "")  # what is wrong is said before a model is loaded
    parse_acceptance(asked.acceptance, len(plan_contexts.drafts_of(list(asked.draft or []))))
    lengths, batches = parse_lengths(asked.lengths), parse_batches(asked.batches)
    engine = load_engine(options.changed(draft="none"))
    document = plan_contexts.contexts_document(engine, lengths, batches, asked)
    show(document, asked.out, json, plan_contexts.print_contexts)


def measured(options: EngineOptions, asked: PlanOptions, sampling: Any, json: bool) -> int:
    """A ranking, or with `--traffic` a fleet, from prompts and times of this machine; the exit code."""
    from outrider.evaluate.workloads import load_rows

    rows = load_rows(asked.prompts, asked.count)
    drafts, lengths = list(asked.draft or ["auto"]), parse_lengths(asked.lengths)
    most = max(parse_batches(asked.batches))
    from outrider.evaluate.scoring.score import VERIFICATION, ready_items

    if options.rule not in ("auto", *VERIFICATION):
        raise ConfigError(f"plan predicts {', '.join(VERIFICATION)}; rule {options.rule!r} can be measured with bench")
    if asked.check and len(rows) < 2 * most:
        raise ConfigError(f"--check at batch {most} needs at least {2 * most} prompts: raise --count")
    plan_launch.check_options(asked)
    engine = load_engine(options.changed(draft=drafts[0], length=max(lengths)))
    items, data = ready_items(engine, asked.prompts, rows, asked.chat_template)
    if asked.traffic is not None:
        document = plan_fleet.fleet_document(engine, drafts[0], lengths, items, sampling, asked) | {"data": data}
        show(document, asked.out, json, plan_fleet.print_fleet)
        return 0
    document, code = ranked(engine, drafts, lengths, items, sampling, asked)
    show(document | {"data": data}, asked.out, json, print_document)
    return code


def ranked(
    engine: Any, drafts: list[str], lengths: list[int], items: Any, sampling: Any, asked: PlanOptions
) -> tuple[dict[str, Any], int]:
    """The document of a ranking, and the exit code of its check."""
    from outrider.evaluate.measure import machine
    from outrider.evaluate.planning import plan as pl

    rule, sizes = engine.loaded.options.rule, parse_batches(asked.batches)
    calls, models = predicted_calls(engine, drafts, lengths, items, sampling, asked.seed)
    timings = timed(engine, drafts, lengths, sizes, items, sampling, asked)
    choices, path = pl.rank(timings, calls), engine.loaded.path
    document = document_of(choices, sizes, asked.price, models, rule, path)
    document |= {"predicted": sorted(calls), "machine": machine()}
    document |= {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
    code = 0
    if asked.check:
        document["check"], code = checked(choices, timings, asked.within)
    if asked.vllm is not None or asked.ray:
        document["launch"] = plan_launch.launch_document(choices, models, path, engine, rule, asked)
    return document, code


def show(document: dict[str, Any], out: Path | None, json: bool, printer: Callable[[dict[str, Any]], None]) -> None:
    """The answer into the file that was asked for, and on the terminal: as JSON, or by its printer."""
    if out is not None:
        write(out, document)
    terminal.print_json(document) if json else printer(document)


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
    """The document as JSON, its tables as Markdown, or its Ray Serve file."""
    import json

    from outrider.files import write_whole

    text = markdown(document) if path.suffix == ".md" else json.dumps(terminal.clean(document), indent=1)
    text = document["launch"]["ray"] if path.suffix in (".yaml", ".yml") else text
    write_whole(path, text.encode())


def document_of(
    choices: list[Any],
    sizes: list[int],
    price: float | None,
    models: dict[str, str],
    rule: str,
    target: str | None = None,
) -> dict[str, Any]:
    """The ranking and the advice for every batch size."""
    from dataclasses import asdict

    from outrider.evaluate.planning.plan import advice

    rows = []
    for c in choices:
        cost = None if price is None else price / 3600 / c.tokens_per_second * 1e6
        rows.append({"name": c.name, **asdict(c), "cost_per_million_tokens": cost})
    return {"choices": rows, "advice": {str(b): advice(choices, b, models, rule, target) for b in sizes}}
