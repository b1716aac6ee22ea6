"""`outrider bench`: arms on the same prompts, interleaved, with intervals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.cli import bench_document as doc
from outrider.cli import terminal
from outrider.cli.bench_options import BenchOptions
from outrider.cli.bench_print import print_table
from outrider.cli.engine_options import ENGINE, load_engine, tell
from outrider.cli.options import Json, parse_lengths
from outrider.cli.sampling_options import SAMPLING
from outrider.cli.takes import takes
from outrider.options import EngineOptions

if TYPE_CHECKING:
    from outrider.evaluate.workloads import Ready


@takes(ENGINE, "options", leave_out=("length", "lengths", "slots"), prefix_cache=False)  # the same prompts come again
@takes(BenchOptions, "asked")
@takes(SAMPLING, "sampling", only=("temperature", "top_p", "max_tokens"), ignore_eos=True)
def bench(options: EngineOptions, asked: BenchOptions, sampling: Any, json: Json = False) -> None:
    """Compare draft lengths, or the arms of a preset, on a prompt set. Ratios are paired by prompt and have a 95% interval.

    Exit code 0; a failed request is reported and is part of no rate.

    Example: outrider bench --lengths 0,4 --store outrider.db --name monday
    """
    from outrider.evaluate.workloads import load_rows, ready

    rows = load_rows(asked.prompts, asked.count)  # what cannot be read or used is said before PyTorch is imported
    lengths = parse_lengths(asked.lengths) if asked.preset is None else ()
    machine = asked.machine()
    asked.check()
    from outrider.evaluate.bench import presets
    from outrider.evaluate.records import summarise
    from outrider.evaluate.store.runlog import RunLog
    from outrider.evaluate.store.store import fingerprint

    specs = presets.by_length(lengths) if asked.preset is None else presets.preset(asked.preset)
    rivals = presets.rivals(specs, asked.against)
    draft = options.draft if asked.preset is None else "none"
    engine = load_engine(replace(options, draft=draft, length=max(s.length for s in specs), slots=asked.batch))
    prompts = ready(engine, asked.prompts, rows, asked.chat_template, whole=True)
    arms, absent = presets.arms_of(engine, specs, options.draft)
    tell_absent(engine, arms, absent)
    presets.present(asked.against or (), absent)
    log = RunLog(asked.store, asked.name, configuration(options, asked, sampling, specs, prompts))
    records = measure(arms, prompts, sampling, asked.plan, log, engine.parts.target if asked.quality else None)
    document = doc.to_document(
        summarise(records, arms[0].name, rivals), engine, sampling, asked.batch, asked.repeats, asked.price_per_hour
    )
    document |= {"prompts": fingerprint(prompts.ids), "absent": absent, "seed": asked.seed, "data": prompts.data}
    doc.name_parts(document, arms)
    files: list[Path] = []
    if machine is not None:
        document["drafter"] = f"preset {asked.preset}"
        folder = asked.figures or Path("runs/chart")
        files = doc.draw_charts(document, records, engine, arms, specs, machine, folder)
    if asked.compat is not None:
        document["spec_bench"] = doc.spec_bench(records, engine, prompts.rows, asked.answers)
    log.finish(document)
    hand_out(document, records, files, asked, json)


def tell_absent(engine: Any, arms: list[Any], absent: dict[str, str]) -> None:
    """Say which arms of a preset cannot be had and why, and what keeps the others from being faster."""
    for missing, why in absent.items():
        terminal.err.print(f"outrider: {missing}: absent ({why})")
    tell(n for arm in arms for n in arm.engine.notices if n not in engine.notices)


def configuration(
    options: EngineOptions, asked: BenchOptions, sampling: Any, specs: Any, prompts: Ready
) -> dict[str, Any]:
    """What a run in a store is known by: an unfinished one goes on only with the same."""
    drawn = {k: getattr(sampling, k) for k in ("temperature", "top_p", "max_tokens")} | {"quality": asked.quality}
    named = {k: getattr(options, k) for k in ("target", "draft", "rule", "dtype")}
    named["quantize_draft"] = options.draft_quantize
    named |= {} if options.draft_vocabulary is None else {"draft_vocabulary": options.draft_vocabulary}
    named |= {} if options.target_quantize is None else {"quantize_target": options.target_quantize}
    named |= {} if options.kv_dtype == "auto" else {"kv_dtype": options.kv_dtype}
    named |= {} if options.input_bits == 8 else {"input_bits": options.input_bits}
    named |= {k: getattr(options, k) for k in ("implementation", "device", "max_length")}
    turns = [list(row.turns) for row in prompts.rows if row.turns]
    named |= {"turns": turns} if turns else {}
    return {
        **asked.plan,
        **drawn,
        **named,
        "arms": [(s.name, s.draft, s.length) for s in specs],
        "prompts": prompts.ids,
    }


def hand_out(document: dict[str, Any], records: list[Any], files: list[Path], asked: BenchOptions, json: bool) -> None:
    """The document to where it was asked for."""
    if asked.html is not None:
        from outrider.evaluate.bench.chart import inline
        from outrider.evaluate.bench.report import write_html

        write_html(asked.html, document, records, inline(files))
    if asked.out is not None:
        doc.write_document(asked.out, document, records)
    terminal.print_json(document) if json else print_table(document)


def measure(arms: list[Any], prompts: Ready, params: Any, plan: dict[str, int], log: Any, judge: Any) -> list[Any]:
    """Records of every arm on every group of prompts, kept in `log` as they come. judge: a target that scores them, or None."""
    from outrider.evaluate.measure import grouped, run_arms
    from outrider.evaluate.scoring.quality import with_quality

    texts, groups = prompts.ids, grouped(prompts.ids, plan["batch"])

    def keep(record: Any) -> Any:
        return log.keep(record if judge is None else with_quality(judge, groups[record.group], record))

    with terminal.loading(f"measuring {len(arms)} arms on {len(texts)} prompts") as progress:
        tick = terminal.counter(progress, len(groups) * plan["repeats"] * len(arms))
        return run_arms(arms, texts, params, **plan, later=prompts.later, progress=tick, known=log.known(), keep=keep)
