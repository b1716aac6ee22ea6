"""`outrider ab`: experiments between configurations, with answers that may be read at any time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import live_experiment as live
from outrider.cli import paths, terminal
from outrider.cli.engine_options import ENGINE, load_engine
from outrider.cli.experiment_print import document_of, finite, show, show_live
from outrider.cli.options import STORE, Json, StorePath
from outrider.cli.sampling_options import SAMPLING
from outrider.cli.takes import takes
from outrider.errors import ConfigError
from outrider.options import EngineOptions

ab_app = typer.Typer(help="A/B experiments between decoding configurations.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(callback=paths.file, help="Experiment file (YAML).")]
Replay = Annotated[
    int | None,
    typer.Option(
        "--replay",
        min=0,
        max=64,
        help="Continuations of each prompt along which all arms are replayed; replaces the file's number.",
        show_default=False,
    ),
]
Metric = Annotated[
    str | None,
    typer.Option("--metric", help="speed or acceptance; replaces the file's metric.", show_default=False),
]


def prepare(e: Any, path: Path) -> tuple[list[Any], Any]:
    """The arms of an experiment on one set of weights, and its prompts (`workloads.Ready`). path: the file it is from."""
    from outrider.evaluate.experiments.experiment import build_arms
    from outrider.evaluate.workloads import load_rows, ready

    lossy = any(a.get("allow_lossy") for a in e.arms.values())
    prompts = Path(e.prompts) if e.prompts else None
    rows = load_rows(prompts, e.count)
    if len(rows) < e.batch * 5:
        raise ConfigError(f"{path}: {len(rows)} prompts make fewer than five groups of {e.batch}: add prompts")
    options = EngineOptions(target=paths.model(e.target), dtype=e.dtype, slots=e.batch, allow_lossy=lossy)
    engine = load_engine(
        options.changed(prefix_cache=False)
    )  # as `bench`: prompts that come again cost what they cost first
    # replay follows continuations of the first turn: no reply of an arm's own comes into them
    return build_arms(engine, e), ready(engine, prompts, rows, e.chat_template, whole=not e.replay)


@ab_app.command("design", short_help="How many prompts an effect needs.")
def design(
    file: File,
    pilot: Annotated[
        int, typer.Option("--pilot", min=5, help="Prompt groups that are run to estimate the spread.")
    ] = 8,
    power: Annotated[
        float, typer.Option("--power", help="Probability of detecting the smallest effect that matters.")
    ] = 0.8,
    json: Json = False,
) -> None:
    """Say how many prompts `min_effect` needs, from the file's `sd` or a short pilot, and which effect `count` can show.

    Example: outrider ab design ab.yaml --pilot 5
    """
    from dataclasses import asdict

    from outrider.evaluate.experiments.experiment import read_experiment
    from outrider.evaluate.statistics.sequential import design as plan
    from outrider.evaluate.statistics.sequential import half_width_factor

    e = read_experiment(file)
    sd = e.sd if e.sd is not None else run_pilot(e, file, pilot)
    # speed and quality of every arm share the level, as `Experiment.share` does: as many comparisons as that
    d = plan(math.log1p(e.min_effect), sd, level=e.level, power=power, arms=1 + round(e.level / e.share))
    groups = e.count // e.batch
    reach = half_width_factor(groups, e.share, d.g) if groups >= 5 else math.inf
    shown = finite(math.expm1((reach + 0.84) * sd / math.sqrt(max(1, groups))))
    document = {**asdict(d), "groups": groups, "detectable_with_count": shown, "enough": groups >= d.sequential}
    if json:
        terminal.print_json(document)
        return
    console = terminal.console()
    console.print(f"spread of a paired log ratio   {sd:.3f}" + ("" if e.sd else f" (pilot of {pilot} prompt groups)"))
    console.print(
        f"to see {e.min_effect:.1%} with power {power:.0%}   {d.sequential} prompt groups, looked at after each"
    )
    console.print(f"                               {d.fixed} if looked at once, at the end")
    console.print(f"the file's {groups} groups show      " + ("too few" if shown is None else f"{shown:.1%} or more"))
    console.print(f"put into the file              sd: {sd:.3f}, g: {d.g:.3g}")


def run_pilot(e: Any, file: Path, groups: int) -> float:
    """Largest standard deviation over the arms of the paired log ratio, from the first groups of the prompts."""
    import numpy as np

    from outrider.evaluate.measure import run_arms
    from outrider.params import SamplingParams

    arms, prompts = prepare(e, file)
    many = groups * e.batch
    params = SamplingParams(temperature=e.temperature, top_p=e.top_p, max_tokens=e.max_tokens, ignore_eos=True)
    with terminal.loading(f"pilot: {groups} prompt groups"):
        records = run_arms(
            arms, prompts.ids[:many], params, batch=e.batch, repeats=1, seed=e.seed + 1, later=prompts.later[:many]
        )
    rate = {(r.arm, r.group): math.log(r.tokens / r.seconds) for r in records if r.tokens and not r.failed}
    seen = sorted({g for _, g in rate})
    diffs = {
        a: [rate[a, g] - rate[e.base, g] for g in seen if (a, g) in rate and (e.base, g) in rate] for a in e.others
    }
    if any(len(d) < 3 for d in diffs.values()):
        raise ConfigError("the pilot has fewer than three complete prompt groups: raise --pilot or `count`")
    return max(float(np.std(d, ddof=1)) for d in diffs.values())


@ab_app.command("run", short_help="Run an experiment, or continue it.")
def run(
    file: File,
    store: StorePath = STORE,
    all_prompts: Annotated[
        bool, typer.Option("--all", help="Use all prompts, also when every arm is decided.")
    ] = False,
    replay: Replay = None,
    metric: Metric = None,
    json: Json = False,
) -> None:
    """Run an experiment, or continue it. Exit code 0: every arm is decided and none vetoed; 1: an arm is vetoed; 3: undecided.

    Example: outrider ab run ab.yaml
    """
    from outrider.evaluate.experiments.experiment import changed, read_experiment, run_experiment
    from outrider.evaluate.store.store import Store

    e = changed(read_experiment(file), replay=replay, metric=metric)
    arms, prompts = prepare(e, file)
    with Store(store) as db, terminal.loading(f"{e.name}: {len(arms)} arms") as progress:
        state = run_experiment(
            e,
            arms,
            prompts.ids,
            db,
            later=prompts.later,
            data=prompts.data,
            stop_early=not all_prompts,
            progress=lambda s: progress(s.groups / max(1, s.total)),
        )
    raise typer.Exit(show(document_of(e, state, state.data), json))


@ab_app.command("status", short_help="What an experiment says now.")
def status(
    name: Annotated[str, typer.Argument(help="Name of the experiment.")],
    store: StorePath = STORE,
    json: Json = False,
) -> None:
    """Show what an experiment says now, finished or running, on prompts or on live traffic. Exit codes as of `run`.

    Example: outrider ab status ab
    """
    if live.is_live(name, store):
        raise typer.Exit(show_live(live.document(name, store), json))
    from outrider.evaluate.experiments.experiment import analyse

    e, records, state = stored(name, store)
    found = analyse(e, records, state["total"])
    raise typer.Exit(show(document_of(e, found, state.get("data")), json))


def stored(name: str, store: str) -> tuple[Any, list[Any], dict[str, Any]]:
    """An experiment of a store, its records, and its state as it was saved."""
    from outrider.evaluate.experiments.experiment import Experiment
    from outrider.evaluate.records import Record
    from outrider.evaluate.store.store import Store

    with Store(store, read_only=True) as db:
        run_id, config, state = db.experiment(name)
        records = [Record.from_dict(d) for d in db.records(run_id).values()]
    return Experiment(**{**config, "prompts": None}), records, state


@ab_app.command("rehearse", short_help="Try an experiment for live traffic.")
@takes(ENGINE, "options", only=("length",), length=4)
@takes(SAMPLING, "sampling", only=("max_tokens",), max_tokens=32)
def rehearse(
    file: File,
    options: EngineOptions,
    sampling: Any,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests to send.")] = 200,
    users: Annotated[int, typer.Option("--users", min=1, help="Users who send them, in turn.")] = 100,
    store: StorePath = STORE,
    json: Json = False,
) -> None:
    """Try an experiment for live traffic: a server in this process, the file's prompts, simulated users. Exit codes as of `run`.

    Example: outrider ab rehearse live.yaml --requests 20 --users 10
    """
    name = live.run_rehearsal(file, store, requests, users, options, sampling.max_tokens)
    raise typer.Exit(show_live(live.document(name, store), json))


@ab_app.command("end", short_help="Close an experiment on live traffic.")
def end(
    name: Annotated[str, typer.Argument(help="Name of an experiment on live traffic.")], store: StorePath = STORE
) -> None:
    """Close an experiment on live traffic once its server has stopped. Its name is then free for another configuration.

    Example: outrider ab end "live rehearsal"
    """
    live.end(name, store)
    terminal.err.print(f"outrider: {name} has ended")


@ab_app.command("report", short_help="A self-contained page of an experiment.")
def report(
    name: Annotated[str, typer.Argument(help="Name of the experiment.")],
    out: Annotated[Path, typer.Option("--out", callback=paths.out_file, help="HTML file to write.")],
    store: StorePath = STORE,
) -> None:
    """Write a self-contained page: the intervals as they shrank, and the decisions.

    Example: outrider ab report ab --out ab.html
    """
    if live.is_live(name, store):
        raise ConfigError(f"{name!r} is on live traffic: `outrider ab status {name}` says how it stands")
    from outrider.evaluate.experiments.experiment import analyse
    from outrider.evaluate.experiments.report import write_experiment

    e, records, state = stored(name, store)
    states = [
        analyse(e, [r for r in records if r.group <= g], state["total"]) for g in sorted({r.group for r in records})
    ]
    write_experiment(out, document_of(e, states[-1], state.get("data")), states, e)
    terminal.err.print(f"outrider: wrote {out}")
