"""`outrider predict`: what a draft is worth, without running speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from outrider.cli import paths, terminal
from outrider.cli.engine_options import ENGINE, load_engine
from outrider.cli.options import ChatTemplate, Json, refuse_beside
from outrider.cli.sampling_options import SAMPLING
from outrider.cli.takes import takes
from outrider.errors import ConfigError
from outrider.options import EngineOptions


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """The texts, the costs, and a run to compare with. As on the command line."""

    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            callback=paths.file,
            help="JSONL with `prompt` (or `messages`, as in bench) and, if you like, `completion` and `domain`; or text with one "
            "prompt per line.",
            show_default=False,
        ),
    ] = None
    chat_template: ChatTemplate = True
    count: Annotated[int, typer.Option("--count", min=2, help="Prompts used, from the start of the set.")] = 32
    samples: Annotated[int, typer.Option("--samples", min=1, max=64, help="Continuations of each prompt.")] = 1
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts sampled at the same time.")] = 8
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--stop-at-eos", help="Whether texts go on after the end-of-text token.")
    ] = True
    seed: Annotated[int, typer.Option("--seed", help="Seed of the continuations.")] = 0
    drafting: Annotated[str, typer.Option("--drafting", help="How the run of --check drafted: sampled or greedy.")] = (
        "sampled"
    )
    rows: Annotated[
        int,
        typer.Option("--rows", min=0, help="Positions kept with both full distributions, to predict several drafts."),
    ] = 128
    measure: Annotated[
        bool, typer.Option("--measure", help="Time both models here, to predict speed-up and the best length.")
    ] = False
    draft_cost: Annotated[
        float | None,
        typer.Option(
            "--draft-cost", min=0, help="Cost of one draft forward pass, in target forward passes.", show_default=False
        ),
    ] = None
    verify_cost: Annotated[
        str | None,
        typer.Option(
            "--verify-cost",
            help="Cost of a verification in target forward passes: one number, or one per length from 1 on, as 1.0,1.1,1.3.",
            show_default=False,
        ),
    ] = None
    from_logs: Annotated[
        Path | None,
        typer.Option(
            "--from-logs",
            callback=paths.file,
            help="Predict from logged log-probabilities (JSONL); no model is loaded.",
            show_default=False,
        ),
    ] = None
    save_logs: Annotated[
        Path | None,
        typer.Option("--save-logs", callback=paths.out_file, help="Write such logs to this file.", show_default=False),
    ] = None
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            callback=paths.file,
            help="JSON of bench, demo or generate: compare its rejections with the prediction.",
            show_default=False,
        ),
    ] = None
    length: Annotated[
        int | None,
        typer.Option("--length", "-l", min=1, max=64, help="Draft length of --check, if its file does not say."),
    ] = None
    same_prompts: Annotated[
        bool, typer.Option("--same-prompts", help="The run of --check used these prompts; needs --samples 2 or more.")
    ] = False


@takes(ENGINE, "options", leave_out=("length", "lengths", "rule", "allow_lossy", "slots"), length=1, slots=1)
@takes(PredictOptions, "asked")
@takes(SAMPLING, "sampling", only=("temperature", "top_p", "max_tokens"))
def predict(options: EngineOptions, asked: PredictOptions, sampling: Any, json: Json = False) -> None:
    """Predict a draft's acceptance length and rejections at every length, from one pass of both models over texts of the target.

    Exit code 1 when --check finds that a run's rejections disagree with the prediction.

    Example: outrider predict --count 8 --max-tokens 32 --measure
    """
    from outrider.evaluate.workloads import load_rows

    check_together(options, asked, sampling)
    # what cannot be read is said before PyTorch is imported, and is read once: it may be a pipe
    logged = None if asked.from_logs is None else read_texts(asked.from_logs)
    rows = load_rows(asked.prompts, asked.count) if logged is None else []
    from outrider.evaluate.planning import predict_report as pr

    costs = parse_costs(asked.draft_cost, asked.verify_cost)
    if costs is not None and asked.measure:
        raise ConfigError("--measure and --draft-cost are two ways to give the costs: use one")
    runs = None if asked.check is None else pr.read_runs(asked.check, asked.length)
    if logged is not None:
        document, at = of_logs(str(asked.from_logs), logged, costs), None
    else:
        document, at = of_models(options, sampling, asked, rows, costs), sampling.temperature
    texts = document.pop("_texts")
    if asked.save_logs is not None:
        write_logs(asked.save_logs, texts)
    if runs is not None:
        how = "greedy" if asked.drafting == "greedy" else "sampled"
        document["check"] = pr.check(texts, runs, at, how, asked.same_prompts)
    if json:
        terminal.print_json(document)
    else:
        from outrider.cli.predict_print import print_document

        print_document(document)
    if any(not c["agrees"] for c in document.get("check", ())):
        raise typer.Exit(1)


MODELS = ("prompts", "chat_template", "count", "samples", "batch", "ignore_eos", "seed", "rows")
"""Options of a prediction for which models write texts: a log has its texts."""


def check_together(options: EngineOptions, asked: PredictOptions, sampling: Any) -> None:
    """Raises ConfigError, before anything is read, for what a log would leave without effect."""
    from outrider.params import SamplingParams

    if asked.drafting not in ("sampled", "greedy"):
        raise ConfigError(f"--drafting is sampled or greedy, got {asked.drafting!r}")
    if asked.from_logs is None:
        return
    if asked.measure:
        raise ConfigError("--measure needs the models and --from-logs loads none: give --draft-cost instead")
    refuse_beside("from_logs", asked, MODELS)
    if options != EngineOptions(length=options.length, slots=options.slots) or sampling != SamplingParams():
        raise ConfigError("--from-logs loads no model: the options of an engine and of sampling say nothing beside it")


def parse_costs(draft_cost: float | None, verify_cost: str | None) -> Any:
    """The costs given on the command line, or None."""
    from outrider.evaluate.scoring.costs import Costs
    from outrider.theory.forecast import LENGTHS

    if draft_cost is None:
        if verify_cost is not None:
            raise ConfigError("--verify-cost needs --draft-cost beside it")
        return None
    try:
        verify = [float(x) for x in (verify_cost or "1").split(",")]
    except ValueError:
        raise ConfigError(f"--verify-cost takes numbers separated by commas, got {verify_cost!r}") from None
    if any(not 0 < v < 1e6 for v in verify):
        raise ConfigError(f"--verify-cost takes positive numbers, got {verify_cost!r}")
    if len(verify) == 1:
        verify *= max(LENGTHS)
    return Costs(draft_cost, (1.0, *verify), "given")


def read_texts(path: Path) -> list[Any]:
    """The texts of a log."""
    from outrider.theory.logs import read_log

    try:
        with path.open(encoding="utf-8-sig") as lines:
            return read_log(lines, str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give a JSONL log of texts") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def of_logs(source: str, texts: list[Any], costs: Any) -> dict[str, Any]:
    """The document of a log."""
    from outrider.evaluate.planning import predict_report as pr

    with terminal.loading(f"replaying {len(texts)} texts"):
        return {"source": source, **pr.report(texts, costs), "_texts": texts}


def of_models(
    options: EngineOptions, sampling: Any, asked: PredictOptions, rows: list[Any], costs: Any
) -> dict[str, Any]:
    """Sample, score, measure, report; the document says which share of the time was spent in models.

    The engine only loads; what samples is its companion.
    """
    from dataclasses import replace

    from outrider.evaluate.measure import machine
    from outrider.evaluate.planning import predict_report as pr
    from outrider.evaluate.scoring import score as ev
    from outrider.evaluate.scoring.costs import measure_costs

    params = replace(sampling, n=asked.samples, ignore_eos=asked.ignore_eos)
    engine = load_engine(options)
    items, data = ev.ready_items(engine, asked.prompts, rows, asked.chat_template)
    model, clock = ev.draft_model(engine), ev.Clock()
    start = perf_counter()
    with terminal.loading(f"sampling {len(items)} prompts from the target alone") as progress:
        emitted = ev.sample(engine, items, params, clock, progress, batch=asked.batch, seed=asked.seed)
    with terminal.loading(f"scoring {len(emitted)} texts under both models") as progress:
        scored = ev.score(engine, model, emitted, items, params, clock, progress, rows=asked.rows, seed=asked.seed)
    if asked.measure:
        with terminal.loading("timing both models"):
            longest = max(emitted, key=lambda e: len(e.prompt) + len(e.output))
            costs = measure_costs(engine.parts.target, model, [*longest.prompt, *longest.output], clock)
    with terminal.loading("replaying"):
        document = pr.report(scored.texts, costs, scored)
    total = perf_counter() - start
    return {
        **document,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_tokens,
        "moved_by_rounding": scored.moved,
        "time": {"seconds": total, "in_models": clock.seconds, "share_in_models": clock.seconds / total},
        "machine": machine(),
        "data": data,
        "_texts": scored.texts,
    }


def write_logs(path: Path, texts: Any) -> None:
    """One line per text, as `outrider.theory.logs` reads them."""
    import json

    from outrider.theory.logs import to_json

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(to_json(t)) + "\n" for t in texts), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the logs ({error.strerror})") from None
