"""`outrider bench`: arms on the same prompts, interleaved, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from outrider.cli import options as opt
from outrider.errors import ConfigError


def bench(
    target: opt.Target = None,
    draft: opt.Draft = "auto",
    lengths: Annotated[
        str, typer.Option("--lengths", help="Draft lengths to compare, as 0,2,4; 0 is plain decoding, the base.")
    ] = "0,2,4",
    rule: opt.Rule = "auto",
    allow_lossy: opt.AllowLossy = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="JSONL with a `prompt` per line, or a text file with one per line.", show_default=False
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=2, help="Prompts used, from the start of the set.")] = 16,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts decoded together.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 3,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Runs of each arm that are thrown away.")] = 1,
    temperature: opt.Temperature = 1.0,
    top_p: opt.TopP = 1.0,
    max_tokens: opt.MaxTokens = 128,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the order of arms and of the interval.")] = 0,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    quantize_draft: opt.Quantize = None,
    implementation: opt.Implementation = "auto",
    max_length: opt.MaxLength = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write the JSON document (records included) to this file.", show_default=False),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="Append every record to this store as it comes.", show_default=False),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="Name of the run in --store; an unfinished run of that name goes on.")
    ] = "bench",
    quality: Annotated[
        bool, typer.Option("--quality", help="Score every text under the target, outside of the measured time.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a self-contained report with plots.", show_default=False)
    ] = None,
    json: opt.Json = False,
) -> None:
    """Compare draft lengths on a prompt set. Ratios are paired by prompt and carry a 95% interval.

    Exit code 0; a failed request is reported and enters no rate.
    """
    from outrider.cli.setup import engine_from_options
    from outrider.engine.build import companion
    from outrider.evaluate.measure import Arm, run_arms, summarise
    from outrider.evaluate.quality import with_quality
    from outrider.evaluate.runlog import RunLog
    from outrider.evaluate.workloads import load_prompts
    from outrider.sampling.params import SamplingParams

    wanted = parse_lengths(lengths)
    engine = engine_from_options(
        target=target,
        draft=draft,
        length=max(wanted),
        rule=rule,
        allow_lossy=allow_lossy,
        dtype=dtype,
        device=device,
        draft_quantize=quantize_draft,
        implementation=implementation,
        max_length=max_length,
        slots=batch,
    )
    texts = [engine.encode(p) for p in load_prompts(prompts, count)]
    arms = [Arm(arm_name(n), companion(engine, "none" if n == 0 else None, length=n)) for n in wanted]
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, ignore_eos=True)
    groups = -(-len(texts) // batch)
    with opt.loading(f"measuring {len(arms)} arms on {len(texts)} prompts") as progress:
        total, done = groups * repeats * len(arms), [0]

        def tick(_: str) -> None:
            done[0] += 1
            progress(done[0] / total)

        groups_of = [texts[i : i + batch] for i in range(0, len(texts), batch)]

        def scored(record: Any) -> Any:
            return with_quality(engine.parts.target, groups_of[record.group], record) if quality else record

        plan = {"batch": batch, "repeats": repeats, "warmup": warmup, "seed": seed}
        config = {**plan, "target": target, "draft": draft, "lengths": wanted, "rule": rule, "dtype": dtype}
        config |= {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "quality": quality}
        log = RunLog(store, name, {**config, "quantize_draft": quantize_draft, "prompts": texts})
        known = log.known()

        def keep(record: Any) -> Any:
            return log.keep(scored(record))

        records = run_arms(arms, texts, params, **plan, progress=tick, known=known, keep=keep)
    summaries = summarise(records, arms[0].name, seed=seed)
    document = to_document(summaries, engine, params, batch, repeats)
    log.finish(document)
    if html is not None:
        from outrider.evaluate.report import write_html

        write_html(html, document, records)
    if out is not None:
        write_document(out, document, records)
    opt.print_json(document) if json else print_table(document)


def parse_lengths(text: str) -> list[int]:
    """ "0,2,4" -> [0, 2, 4]; plain decoding comes first, as the base, and is added if missing."""
    try:
        numbers = [int(x) for x in text.split(",") if x.strip()]
    except ValueError:
        raise ConfigError(f"--lengths takes whole numbers separated by commas, such as 0,2,4; got {text!r}") from None
    if not numbers or any(not 0 <= n <= 64 for n in numbers):
        raise ConfigError(f"--lengths takes numbers from 0 to 64, got {text!r}")
    return sorted({0, *numbers})


def arm_name(length: int) -> str:
    return "plain" if length == 0 else f"length {length}"


def to_document(summaries: list[Any], engine: Any, params: Any, batch: int, repeats: int) -> dict[str, Any]:
    """One JSON document: the arms with raw counts, ratios, ledger and the speed-up that counts and clock predict."""
    import sys

    from outrider.evaluate.measure import as_json, machine
    from outrider.telemetry.ledger import predicted_speedup, summary

    base = summaries[0]
    arms = []
    for s in summaries:
        predicted = predicted_speedup(s.counts, s.phases, base.counts, base.phases) if s.phases else None
        arms.append({**as_json(s), **summary(s.counts), "predicted_speedup": predicted})
    return {
        "command": "outrider " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "drafter": engine.parts.drafter.name,
        "rule": engine.parts.rule.name,
        "lossless": engine.parts.rule.lossless,
        "dtype": str(engine.parts.target.dtype).removeprefix("torch."),
        "temperature": params.temperature,
        "max_tokens": params.max_tokens,
        "batch": batch,
        "repeats": repeats,
        "arms": arms,
    }


def write_document(path: Path, document: dict[str, Any], records: list[Any]) -> None:
    """The document with one raw record per (group, arm, repeat)."""
    import json
    from dataclasses import asdict

    raw = [{k: v for k, v in asdict(r).items() if k != "outputs"} | {"outputs": []} for r in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**document, "records": raw}, indent=1), encoding="utf-8")


def print_table(d: dict[str, Any]) -> None:
    """The document for people."""
    from outrider.cli.demo import phase_bar

    how = f"{d['drafter']} / {d['rule']}, {d['dtype']}, temperature {d['temperature']:g}"
    title = f"{how}, batch {d['batch']}, {d['repeats']} repeats"
    table = Table(title=title, title_justify="left")
    for column in (
        "arm",
        "tokens/s",
        "p10 to p90",
        "speed-up (95%)",
        "predicted",
        "tokens/step",
        "rejections: predicted, observed",
        "step's time",
    ):
        table.add_column(column, overflow="fold")
    for arm in d["arms"]:
        s, book = arm["speedup"], arm["ledger"]
        table.add_row(
            arm["name"],
            f"{arm['tokens_per_second']:.1f}",
            f"{arm['low']:.1f} to {arm['high']:.1f}",
            "base" if s is None else f"{s['value']:.2f} ({s['low']:.2f} to {s['high']:.2f}) {s['verdict']}",
            "" if s is None else f"{arm['predicted_speedup']:.2f}",
            "" if arm["acceptance_length"] is None else f"{arm['acceptance_length']:.2f}",
            ""
            if s is None
            else f"{book['predicted']:.1f}, {book['observed']} {'agree' if book['agrees'] else 'DISAGREE'}",
            phase_bar(arm["phases"], width=10),
        )
    console = opt.Console(highlight=False)
    console.print(table)
    failed = sum(arm["failed"] for arm in d["arms"])
    if failed:
        console.print(f"[bold red]{failed} requests failed; their groups enter no rate[/bold red]")
