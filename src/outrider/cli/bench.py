"""`outrider bench`: arms on the same prompts, interleaved, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli import paths
from outrider.cli.bench_print import print_table
from outrider.errors import ConfigError


def bench(
    target: opt.Target = None,
    draft: opt.Draft = "auto",
    lengths: Annotated[
        str, typer.Option("--lengths", help="Draft lengths to compare, as 0,2,4; 0 is plain decoding, the base.")
    ] = "0,2,4",
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="chart: plain, draft model, Medusa, EAGLE, block diffusion and n-gram in one run, with charts; replaces "
            "--lengths. --draft then names the draft model.",
            show_default=False,
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures",
            callback=paths.writable,
            help="With --preset: folder of the charts (SVG and PNG). Default: runs/chart.",
            show_default=False,
        ),
    ] = None,
    hardware: Annotated[
        str, typer.Option("--hardware", help="With --preset: machine of the predicted chart, as h100 or m4-max.")
    ] = "h100",
    rule: opt.Rule = "auto",
    allow_lossy: opt.AllowLossy = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            callback=paths.file,
            help="JSONL with a `prompt` per line, or a text file with one per line.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=2, help="Prompts used, from the start of the set.")] = 16,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts decoded together.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 3,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs of each arm that are thrown away.")] = 1,
    temperature: opt.Temperature = 1.0,
    top_p: opt.TopP = 1.0,
    max_tokens: opt.MaxTokens = 128,
    seed: Annotated[int, typer.Option("--seed", help="Of the texts that are drawn and of the order of arms.")] = 0,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    quantize_draft: opt.Quantize = None,
    implementation: opt.Implementation = "auto",
    max_length: opt.MaxLength = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=paths.out_file,
            help="Write the JSON document (records included) to this file.",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            help="Append every record to this store (a file, or a postgresql:// URL) as it comes.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="Name of the run in --store; an unfinished run of that name goes on.")
    ] = "bench",
    quality: Annotated[
        bool, typer.Option("--quality", help="Score every text under the target, outside of the measured time.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", callback=paths.out_file, help="Write a self-contained report with plots.", show_default=False
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour", min=0, help="Price of this machine: adds cost per million tokens.", show_default=False
        ),
    ] = None,
    compat: Annotated[
        str | None,
        typer.Option("--compat", help="spec-bench: that harness's own numbers beside ours.", show_default=False),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers",
            callback=paths.writable,
            help="With --compat: folder for its answer files, one an arm.",
            show_default=False,
        ),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Compare draft lengths, or the arms of a preset, on a prompt set. Ratios are paired by prompt and carry a 95% interval.

    Exit code 0; a failed request is reported and enters no rate.
    """
    from outrider.cli.setup import engine_from_options, tell
    from outrider.evaluate.bench import presets
    from outrider.evaluate.records import summarise
    from outrider.evaluate.store.runlog import RunLog
    from outrider.evaluate.store.store import fingerprint
    from outrider.evaluate.workloads import load_prompts
    from outrider.params import SamplingParams

    specs = presets.by_length(parse_lengths(lengths)) if preset is None else presets.preset(preset)
    machine = chart_machine(preset, figures, hardware)
    check_compat(compat, answers, batch)
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, ignore_eos=True)
    asked = load_prompts(prompts, count)
    engine = engine_from_options(
        target=target,
        draft=draft if preset is None else "none",
        length=max(s.length for s in specs),
        rule=rule,
        allow_lossy=allow_lossy,
        dtype=dtype,
        device=device,
        draft_quantize=quantize_draft,
        implementation=implementation,
        max_length=max_length,
        slots=batch,
    )
    texts = engine.encode_all(asked)
    arms, absent = presets.arms_of(engine, specs, draft)
    for missing, why in absent.items():
        opt.err.print(f"outrider: {missing}: absent ({why})")
    tell(n for arm in arms for n in arm.engine.notices if n not in engine.notices)
    plan = {"batch": batch, "repeats": repeats, "warmup": warmup, "seed": seed}
    sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "quality": quality}
    named = {"target": target, "draft": draft, "rule": rule, "dtype": dtype, "quantize_draft": quantize_draft}
    named |= {"implementation": implementation, "device": device, "max_length": max_length}
    which = {"arms": [(s.name, s.draft, s.length) for s in specs], "prompts": texts}
    log = RunLog(store, name, {**plan, **sampling, **named, **which})
    records = measure(arms, texts, params, plan, log, engine.parts.target if quality else None)
    document = to_document(summarise(records, arms[0].name), engine, params, batch, repeats, price_per_hour)
    document |= {"prompts": fingerprint(texts), "absent": absent, "seed": seed}
    name_parts(document, arms)
    files: list[Path] = []
    if machine is not None:
        document["drafter"] = f"preset {preset}"
        files = draw_charts(document, records, engine, arms, specs, machine, figures or Path("runs/chart"))
    if compat is not None:
        document["spec_bench"] = spec_bench(records, engine, prompts, count, answers)
    log.finish(document)
    if html is not None:
        from outrider.evaluate.bench.chart import inline
        from outrider.evaluate.bench.report import write_html

        write_html(html, document, records, inline(files))
    if out is not None:
        write_document(out, document, records)
    opt.print_json(document) if json else print_table(document)


def check_compat(compat: str | None, answers: Path | None, batch: int) -> None:
    """ConfigError for another harness than those that are known, and for what it does not do."""
    if compat not in (None, "spec-bench") or (answers is not None and compat is None):
        raise ConfigError("--compat knows spec-bench, and --answers needs it")
    if compat is not None and batch != 1:
        raise ConfigError("Spec-Bench runs one question at a time: use --batch 1")


def measure(
    arms: list[Any], texts: list[list[int]], params: Any, plan: dict[str, int], log: Any, judge: Any
) -> list[Any]:
    """Records of every arm on every group of prompts, kept in `log` as they come. judge: a target that scores them, or None."""
    from outrider.evaluate.measure import run_arms
    from outrider.evaluate.scoring.quality import with_quality

    batch = plan["batch"]
    groups = [texts[i : i + batch] for i in range(0, len(texts), batch)]
    total, done = len(groups) * plan["repeats"] * len(arms), [0]

    def keep(record: Any) -> Any:
        return log.keep(record if judge is None else with_quality(judge, groups[record.group], record))

    with opt.loading(f"measuring {len(arms)} arms on {len(texts)} prompts") as progress:

        def tick(_: str) -> None:
            done[0] += 1
            progress(done[0] / total)

        return run_arms(arms, texts, params, **plan, progress=tick, known=log.known(), keep=keep)


def name_parts(document: dict[str, Any], arms: list[Any]) -> None:
    """Rows in the order of the arms, each with its drafter and rule."""
    parts = {a.name: a.engine.parts for a in arms}
    document["arms"].sort(key=lambda row: list(parts).index(row["name"]))
    for row in document["arms"]:
        mine = parts[row["name"]]
        row |= {
            "drafter": mine.drafter.name,
            "rule": mine.rule.name,
            "lossless": mine.rule.lossless or not mine.drafter.max_nodes,
        }


def draw_charts(
    document: dict[str, Any],
    records: list[Any],
    engine: Any,
    arms: list[Any],
    specs: Any,
    machine: Any,
    folder: Path,
) -> list[Path]:
    """The measured and the predicted chart of a preset, as files and in the document."""
    from outrider.evaluate.bench import chart

    rows = chart.measured(specs, records)
    bars = chart.predicted(specs, records, chart.shares_of(engine, arms, specs), machine)
    files = chart.save(rows, bars, document, machine, folder)
    document["chart"] = {**chart.to_json(rows, bars, machine), "files": [str(f) for f in files]}
    return files


def parse_lengths(text: str) -> list[int]:
    """ "0,2,4" -> [0, 2, 4]; plain decoding comes first, as the base, and is added if missing."""
    try:
        numbers = [int(x) for x in text.split(",") if x.strip()]
    except ValueError:
        raise ConfigError(f"--lengths takes whole numbers separated by commas, such as 0,2,4; got {text!r}") from None
    if not numbers or any(not 0 <= n <= 64 for n in numbers):
        raise ConfigError(f"--lengths takes numbers from 0 to 64, got {text!r}")
    return sorted({0, *numbers})


def chart_machine(preset: str | None, figures: Path | None, hardware: str) -> Any:
    """The machine of a preset's predicted chart; None without a preset. Raises ConfigError for one that is not in the table."""
    from outrider.theory.hardware import hardware as find

    if preset is None:
        if figures is not None:
            raise ConfigError("--figures draws the charts of a preset: add --preset chart")
        return None
    paths.needs("plot", ("matplotlib",))
    try:
        return find(hardware)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def spec_bench(
    records: list[Any], engine: Any, prompts: Path | None, count: int, folder: Path | None
) -> dict[str, list[dict[str, Any]]]:
    """Spec-Bench's numbers for every arm but plain decoding, and its answer files if a folder is given."""
    import json
    from dataclasses import asdict

    from outrider.evaluate.bench import spec_bench as sb
    from outrider.evaluate.workloads import load_questions
    from outrider.files import write_whole

    questions = load_questions(prompts, count)
    decode = lambda ids: engine.tokenizer.decode(list(ids))  # noqa: E731
    if folder is not None:
        for arm in dict.fromkeys(r.arm for r in records):
            rows = sb.answers([r for r in records if r.arm == arm], questions, decode, arm)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_whole(folder / f"{arm.replace(' ', '-')}.jsonl", text.encode())
    found = sb.report(records, "plain", questions, decode, lambda text: len(engine.encode(text)))
    return {arm: [asdict(s) for s in rows] for arm, rows in found.items()}


def to_document(
    summaries: list[Any], engine: Any, params: Any, batch: int, repeats: int, price: float | None = None
) -> dict[str, Any]:
    """One JSON document: the arms with raw counts, ratios, ledger and the speed-up that counts and clock predict.

    price: per hour; cost per million emitted tokens is price / 3600 / (tokens per second) * 1e6.
    """
    import sys

    from outrider.evaluate.measure import energy_absent, machine, peak_memory
    from outrider.evaluate.records import as_json
    from outrider.telemetry.ledger import predicted_speedup, summary

    base = summaries[0]
    arms = []
    for s in summaries:
        predicted = predicted_speedup(s.counts, s.phases, base.counts, base.phases) if s.phases else None
        cost = None if price is None or not s.tokens_per_second else price / 3600 / s.tokens_per_second * 1e6
        energy = None if s.joules is None or not s.tokens else s.joules / s.tokens
        more = {"predicted_speedup": predicted, "cost_per_million_tokens": cost, "joules_per_token": energy}
        arms.append({**as_json(s), **summary(s.counts), **more})
    return {
        "command": "outrider " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "drafter": engine.parts.drafter.name,
        "rule": engine.parts.rule.name,
        "lossless": engine.parts.rule.lossless,
        "dtype": str(engine.parts.target.dtype).removeprefix("torch."),
        "temperature": params.temperature,
        "max_tokens": params.max_tokens,
        "top_p": params.top_p,
        "batch": batch,
        "repeats": repeats,
        "price_per_hour": price,
        "peak_memory_bytes": peak_memory(),
        "energy_absent": energy_absent(),
        "arms": arms,
    }


def write_document(path: Path, document: dict[str, Any], records: list[Any]) -> None:
    """The document with one raw record per (group, arm, repeat)."""
    import json
    from dataclasses import asdict

    raw = [{k: v for k, v in asdict(r).items() if k != "outputs"} | {"outputs": []} for r in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**document, "records": raw}, indent=1), encoding="utf-8")
