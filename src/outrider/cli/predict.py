"""`outrider predict`: what a draft is worth, without running speculative decoding."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli import paths
from outrider.errors import ConfigError


def predict(
    target: opt.Target = None,
    draft: opt.Draft = "auto",
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            callback=paths.file,
            help="JSONL with `prompt`, and if you like `completion` and `domain`, or text with one prompt per line.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=2, help="Prompts used, from the start of the set.")] = 32,
    samples: Annotated[int, typer.Option("--samples", min=1, max=64, help="Continuations of each prompt.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts sampled together.")] = 8,
    temperature: opt.Temperature = 1.0,
    top_p: opt.TopP = 1.0,
    max_tokens: opt.MaxTokens = 128,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--stop-at-eos", help="Whether texts go on behind the end-of-text token.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the continuations.")] = 0,
    drafting: Annotated[
        str, typer.Option("--drafting", help="How the run of --check drafted: sampled or greedy.")
    ] = "sampled",
    rows: Annotated[int, typer.Option("--rows", min=0, help="Positions kept in full, for several drafts.")] = 128,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time both models here, for speed-up and best length.")
    ] = False,
    draft_cost: Annotated[
        float | None,
        typer.Option("--draft-cost", min=0, help="One draft forward, in target forwards.", show_default=False),
    ] = None,
    verify_cost: Annotated[
        str | None,
        typer.Option(
            "--verify-cost",
            help="A verification in target forwards: one number, or one per length from 1 on, as 1.0,1.1,1.3.",
            show_default=False,
        ),
    ] = None,
    from_logs: Annotated[
        Path | None,
        typer.Option(
            "--from-logs",
            callback=paths.file,
            help="Predict from logged log-probabilities (JSONL); no model is loaded.",
            show_default=False,
        ),
    ] = None,
    save_logs: Annotated[
        Path | None,
        typer.Option("--save-logs", callback=paths.out_file, help="Write such logs to this file.", show_default=False),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            callback=paths.file,
            help="JSON of bench, demo or generate: compare its rejections.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", "-l", min=1, max=64, help="Draft length of --check, if its file lacks it.")
    ] = None,
    same_prompts: Annotated[
        bool, typer.Option("--same-prompts", help="--check: its run used these prompts; needs --samples 2 or more.")
    ] = False,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    quantize_draft: opt.Quantize = None,
    implementation: opt.Implementation = "auto",
    max_length: opt.MaxLength = None,
    json: opt.Json = False,
) -> None:
    """Acceptance length and rejections of a draft at every length, from one pass of both models over text of the target.

    Exit code 1 when --check finds that a run's rejections disagree with the prediction.
    """
    from outrider.evaluate.planning import predict_report as pr

    if drafting not in ("sampled", "greedy"):
        raise ConfigError(f"--drafting is sampled or greedy, got {drafting!r}")
    costs = parse_costs(draft_cost, verify_cost)
    if costs is not None and measure:
        raise ConfigError("--measure and --draft-cost are two ways to say the costs: use one")
    runs = None if check is None else pr.read_runs(check, length)
    if from_logs is not None:
        if measure:
            raise ConfigError("--measure needs the models and --from-logs loads none: say --draft-cost instead")
        document, at = of_logs(from_logs, costs), None
        texts = document.pop("_texts")
    else:
        engine_options: dict[str, Any] = {
            "target": target,
            "draft": draft,
            "length": 1,
            "dtype": dtype,
            "device": device,
            "draft_quantize": quantize_draft,
            "implementation": implementation,
            "max_length": max_length,
            "slots": 1,  # this engine only loads; what samples is its companion
        }
        sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "n": samples}
        at = temperature
        document = of_models(
            engine_options, {**sampling, "ignore_eos": ignore_eos}, prompts, count, batch, seed, rows, costs, measure
        )
        texts = document.pop("_texts")
    if save_logs is not None:
        write_logs(save_logs, texts)
    if runs is not None:
        document["check"] = pr.check(texts, runs, at, "greedy" if drafting == "greedy" else "sampled", same_prompts)
    if json:
        opt.print_json(document)
    else:
        from outrider.cli.predict_print import print_document

        print_document(document)
    if any(not c["agrees"] for c in document.get("check", ())):
        raise typer.Exit(1)


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


def of_logs(path: Path, costs: Any) -> dict[str, Any]:
    """The document of a log; no torch is needed for what it computes."""
    from outrider.evaluate.planning import predict_report as pr
    from outrider.theory.logs import read_log

    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a JSONL log of texts")
    try:
        with path.open(encoding="utf-8") as lines:
            texts = read_log(lines, str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with opt.loading(f"replaying {len(texts)} texts"):
        return {"source": str(path), **pr.report(texts, costs), "_texts": texts}


def of_models(
    engine_options: dict[str, Any],
    sampling: dict[str, Any],
    prompts: Path | None,
    count: int,
    batch: int,
    seed: int,
    rows: int,
    costs: Any,
    measure: bool,
) -> dict[str, Any]:
    """Sample, score, measure, report; the document says which share of the time was spent in models."""
    from outrider.cli.setup import engine_from_options
    from outrider.evaluate.measure import machine
    from outrider.evaluate.planning import predict_report as pr
    from outrider.evaluate.scoring import score as ev
    from outrider.evaluate.scoring.costs import measure_costs
    from outrider.params import SamplingParams

    params = SamplingParams(**sampling)
    items = ev.load_items(prompts, count)
    engine = engine_from_options(**engine_options)
    model, clock = ev.draft_model(engine), ev.Clock()
    start = perf_counter()
    with opt.loading(f"sampling {len(items)} prompts from the target alone") as progress:
        emitted = ev.sample(engine, items, params, clock, progress, batch=batch, seed=seed)
    with opt.loading(f"scoring {len(emitted)} texts under both models") as progress:
        scored = ev.score(engine, model, emitted, items, params, clock, progress, rows=rows, seed=seed)
    if measure:
        with opt.loading("timing both models"):
            longest = max(emitted, key=lambda e: len(e.prompt) + len(e.output))
            costs = measure_costs(engine.parts.target, model, [*longest.prompt, *longest.output], clock)
    with opt.loading("replaying"):
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
