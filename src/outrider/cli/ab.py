"""`outrider ab`: experiments between configurations, with answers that may be read at any time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from outrider.cli import options as opt
from outrider.cli import paths
from outrider.cli.runs import DEFAULT, StorePath
from outrider.errors import ConfigError

ab_app = typer.Typer(help="A/B experiments between decoding configurations.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(callback=paths.file, help="Experiment file (YAML).")]
Replay = Annotated[
    int | None,
    typer.Option(
        "--replay",
        min=0,
        max=64,
        help="Continuations per prompt along which all arms are replayed; instead of the file's.",
        show_default=False,
    ),
]
Metric = Annotated[
    str | None,
    typer.Option("--metric", help="speed or acceptance; instead of the file's.", show_default=False),
]
METRICS = {"speed": "speed over base", "acceptance": "tokens per call over base"}


def prepare(path: Path, replay: int | None = None, metric: str | None = None) -> tuple[Any, list[Any], list[list[int]]]:
    """The experiment of a file, its arms on one set of weights, and its prompts. replay, metric: instead of the file's."""
    from outrider.cli.setup import engine_from_options
    from outrider.evaluate.experiments.experiment import build_arms, changed, read_experiment
    from outrider.evaluate.workloads import load_prompts

    e = changed(read_experiment(path), replay=replay, metric=metric)
    lossy = any(a.get("allow_lossy") for a in e.arms.values())
    texts = load_prompts(Path(e.prompts) if e.prompts else None, e.count)
    if len(texts) < e.batch * 5:
        raise ConfigError(f"{path}: {len(texts)} prompts make fewer than five groups of {e.batch}: add prompts")
    engine = engine_from_options(target=paths.model(e.target), dtype=e.dtype, slots=e.batch, allow_lossy=lossy)
    return e, build_arms(engine, e), engine.encode_all(texts)


@ab_app.command("design", short_help="How many prompts an effect needs.")
def design(
    file: File,
    pilot: Annotated[int, typer.Option("--pilot", min=5, help="Prompt groups run to learn the spread.")] = 8,
    power: Annotated[
        float, typer.Option("--power", help="Probability of seeing the smallest effect that matters.")
    ] = 0.8,
    json: opt.Json = False,
) -> None:
    """Prompts needed to see `min_effect`, from the file's `sd` or a short pilot; and the effect that `count` can show."""
    from dataclasses import asdict

    from outrider.evaluate.experiments.experiment import read_experiment
    from outrider.evaluate.statistics.sequential import design as plan
    from outrider.evaluate.statistics.sequential import half_width_factor

    e = read_experiment(file)
    sd = e.sd if e.sd is not None else run_pilot(file, pilot)
    # speed and quality of every arm share the level, as `Experiment.share` does: as many comparisons as that
    d = plan(math.log1p(e.min_effect), sd, level=e.level, power=power, arms=1 + round(e.level / e.share))
    groups = e.count // e.batch
    reach = half_width_factor(groups, e.share, d.g) if groups >= 5 else math.inf
    shown = _finite(math.expm1((reach + 0.84) * sd / math.sqrt(max(1, groups))))
    document = {**asdict(d), "groups": groups, "detectable_with_count": shown, "enough": groups >= d.sequential}
    if json:
        opt.print_json(document)
        return
    console = opt.console()
    console.print(f"spread of a paired log ratio   {sd:.3f}" + ("" if e.sd else f" (pilot of {pilot} prompt groups)"))
    console.print(
        f"to see {e.min_effect:.1%} with power {power:.0%}   {d.sequential} prompt groups, looked at after each"
    )
    console.print(f"                               {d.fixed} if looked at once, at the end")
    console.print(f"the file's {groups} groups show      " + ("too few" if shown is None else f"{shown:.1%} or more"))
    console.print(f"put into the file              sd: {sd:.3f}, g: {d.g:.3g}")


def run_pilot(file: Path, groups: int) -> float:
    """Largest standard deviation over the arms of the paired log ratio, from the first groups of the prompts."""
    from dataclasses import replace

    import numpy as np

    from outrider.evaluate.measure import run_arms
    from outrider.params import SamplingParams

    e, arms, prompts = prepare(file)
    params = SamplingParams(temperature=e.temperature, top_p=e.top_p, max_tokens=e.max_tokens, ignore_eos=True)
    with opt.loading(f"pilot: {groups} prompt groups"):
        records = run_arms(
            arms, prompts[: groups * e.batch], replace(params), batch=e.batch, repeats=1, seed=e.seed + 1
        )
    rate = {(r.arm, r.group): math.log(r.tokens / r.seconds) for r in records if r.tokens and not r.failed}
    seen = sorted({g for _, g in rate})
    diffs = {
        a: [rate[a, g] - rate[e.base, g] for g in seen if (a, g) in rate and (e.base, g) in rate] for a in e.others
    }
    if any(len(d) < 3 for d in diffs.values()):
        raise ConfigError("the pilot has fewer than three complete prompt groups: raise --pilot or `count`")
    return max(float(np.std(d, ddof=1)) for d in diffs.values())


@ab_app.command("run", short_help="Run, or go on with, an experiment.")
def run(
    file: File,
    store: StorePath = DEFAULT,
    all_prompts: Annotated[
        bool, typer.Option("--all", help="Use all prompts even when everything is decided.")
    ] = False,
    replay: Replay = None,
    metric: Metric = None,
    json: opt.Json = False,
) -> None:
    """Run, or go on with, an experiment. Exit code 0: every arm decided and none vetoed; 1: an arm vetoed; 3: undecided."""
    from outrider.evaluate.experiments.experiment import run_experiment
    from outrider.evaluate.store.store import Store

    e, arms, prompts = prepare(file, replay, metric)
    with Store(store) as db, opt.loading(f"{e.name}: {len(arms)} arms") as progress:
        state = run_experiment(
            e, arms, prompts, db, stop_early=not all_prompts, progress=lambda s: progress(s.groups / max(1, s.total))
        )
    raise typer.Exit(show(document_of(e, state), json))


@ab_app.command("status", short_help="What an experiment says now.")
def status(
    name: Annotated[str, typer.Argument(help="Name of the experiment.")],
    store: StorePath = DEFAULT,
    json: opt.Json = False,
) -> None:
    """What an experiment says now, finished or running, of prompts or on live traffic. Exit codes as `run`."""
    from outrider.cli import trial
    from outrider.evaluate.experiments.experiment import Experiment, analyse
    from outrider.evaluate.records import Record
    from outrider.evaluate.store.store import Store

    if trial.is_live(name, store):
        raise typer.Exit(trial.show(trial.document(name, store), json))
    with Store(store, read_only=True) as db:
        run_id, config, state = db.experiment(name)
        records = [Record.from_dict(d) for d in db.records(run_id).values()]
    e = Experiment(**{**config, "prompts": None})
    raise typer.Exit(show(document_of(e, analyse(e, records, state["total"])), json))


@ab_app.command("rehearse", short_help="Try an experiment for live traffic.")
def rehearse(
    file: File,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests to send.")] = 200,
    users: Annotated[int, typer.Option("--users", min=1, help="Users who send them, in turn.")] = 100,
    length: opt.Length = 4,
    max_tokens: opt.MaxTokens = 32,
    store: StorePath = DEFAULT,
    json: opt.Json = False,
) -> None:
    """Try an experiment for live traffic: a server in this process, the file's prompts, made-up users. Exit codes as `run`."""
    from outrider.cli import trial

    name = trial.run_rehearsal(file, store, requests, users, length, max_tokens)
    raise typer.Exit(trial.show(trial.document(name, store), json))


@ab_app.command("end", short_help="Close an experiment on live traffic.")
def end(
    name: Annotated[str, typer.Argument(help="Name of an experiment on live traffic.")], store: StorePath = DEFAULT
) -> None:
    """Close an experiment on live traffic, once its server has stopped: the name is free for another configuration."""
    from outrider.cli import trial

    trial.end(name, store)
    opt.err.print(f"outrider: {name} has ended")


@ab_app.command("report", short_help="A self-contained page of an experiment.")
def report(
    name: Annotated[str, typer.Argument(help="Name of the experiment.")],
    out: Annotated[Path, typer.Option("--out", callback=paths.out_file, help="HTML file to write.")],
    store: StorePath = DEFAULT,
) -> None:
    """A self-contained page: the intervals as they shrank, and the decisions."""
    from outrider.cli import trial
    from outrider.evaluate.experiments.experiment import Experiment, analyse
    from outrider.evaluate.experiments.report import write_experiment
    from outrider.evaluate.records import Record
    from outrider.evaluate.store.store import Store

    if trial.is_live(name, store):
        raise ConfigError(f"{name!r} is on live traffic: `outrider ab status {name}` says how it stands")
    with Store(store, read_only=True) as db:
        run_id, config, state = db.experiment(name)
        records = [Record.from_dict(d) for d in db.records(run_id).values()]
    e = Experiment(**{**config, "prompts": None})
    states = [
        analyse(e, [r for r in records if r.group <= g], state["total"]) for g in sorted({r.group for r in records})
    ]
    write_experiment(out, document_of(e, states[-1]), states, e)
    opt.err.print(f"outrider: wrote {out}")


def document_of(e: Any, state: Any) -> dict[str, Any]:
    """A state as plain data; unbounded intervals become null."""
    from dataclasses import asdict

    comparisons = []
    for c in state.comparisons:
        quality = None if c.quality is None else {k: _finite(v) for k, v in asdict(c.quality).items()}
        comparisons.append(
            {
                "arm": c.arm,
                "decision": c.decision,
                "speedup": ratio_of(c.speed),
                "quality": quality,
                "vetoes": list(c.vetoes),
                "reduction": None if c.reduction is None else reduction_of(c.reduction),
            }
        )
    head = {"experiment": e.name, "metric": e.metric, "groups": state.groups, "total": state.total, "lossy": e.lossy}
    return head | {"comparisons": comparisons}


def ratio_of(log: Any) -> dict[str, float | None]:
    """The interval of a log ratio as one of the ratio."""
    return {
        "value": _finite(math.exp(log.mean)),
        "low": None if log.low == -math.inf else math.exp(log.low),
        "high": None if log.high == math.inf else math.exp(min(log.high, 700)),
    }


def reduction_of(found: Any) -> dict[str, Any]:
    """What replay has done for a comparison."""
    gap = {"mean": _finite(found.gap.mean), "low": _finite(found.gap.low), "high": _finite(found.gap.high)}
    return {
        "without": ratio_of(found.without),
        "factor": _finite(found.factor),
        "gap": gap,
        "agrees": found.agrees,
    }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def code_of(decisions: list[str]) -> int:
    """Exit code: 1 if an arm is vetoed, 3 if one is undecided, otherwise 0."""
    return 1 if "vetoed" in decisions else 3 if "undecided" in decisions or not decisions else 0


def show(document: dict[str, Any], json: bool) -> int:
    """Print a document; its exit code."""
    code = code_of([c["decision"] for c in document["comparisons"]])
    if json:
        opt.print_json(document)
        return code
    table = Table(
        title=f"{document['experiment']}: {document['groups']} of {document['total']} prompt groups",
        title_justify="left",
    )
    from outrider.evaluate.experiments.report import mark_lossy

    replayed = any(c["reduction"] for c in document["comparisons"])
    sharper = ("without replay", "groups needed") if replayed else ()
    for column in ("arm", METRICS[document["metric"]], *sharper, "quality lost (nats/token)", "decision"):
        table.add_column(column, overflow="fold")
    for c in document["comparisons"]:
        s, q, r = c["speedup"], c["quality"], c["reduction"]
        cells = ["", ""] if r is None else [span(**r["without"]), _factor(r["factor"])]
        table.add_row(
            mark_lossy(c["arm"], document["lossy"]),
            span(**s),
            *(cells if replayed else ()),
            "" if q is None else span(q["mean"], q["low"], q["high"]),
            c["decision"] + "".join(f"\n{v}" for v in c["vetoes"]),
        )
    opt.show(table)
    return code


def span(value: float | None, low: float | None, high: float | None) -> str:
    """A value with its interval."""
    show = lambda x: "open" if x is None else f"{x:.3f}"  # noqa: E731
    return f"{show(value)} ({show(low)} to {show(high)})"


def _factor(x: float | None) -> str:
    """Groups that give the same interval as one without replay, as a share of those it needs."""
    return "" if not x else f"{1 / x:.0%}"
