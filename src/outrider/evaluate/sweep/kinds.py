"""What the kinds of cells do. Each function is a measurement of `bench`, `predict`, `audit` or `ab`, from fields to an answer."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from outrider.assets import chat_prompts_file, prompts_file, shipped
from outrider.build import Engine, build_engine, companion
from outrider.errors import ConfigError
from outrider.evaluate.experiments.experiment import Experiment
from outrider.evaluate.measure import Arm, run_arms
from outrider.evaluate.records import Record
from outrider.evaluate.store.store import Store, canonical
from outrider.evaluate.sweep.cells import Answer, Kind, folders_in
from outrider.evaluate.sweep.fields import Ab, Audit, Bench, Decoding, Drafted, Predict
from outrider.evaluate.workloads import Ready, load_rows, ready
from outrider.models.folder import resolve_folder
from outrider.params import SamplingParams

COUNTED = ("steps", "judged", "rejected", "risk", "spread", "bias")


@lru_cache(maxsize=1)
def base_engine(target: str | None, dtype: str, slots: int, allow_lossy: bool) -> Engine:
    """A loaded target, kept from cell to cell of a worker; every cell decodes with engines of its own on these weights."""
    # without what is kept of prompts, as `bench`: the same prompts come again, and no arm shall find those of another repeat
    return build_engine(target, "none", dtype=dtype, slots=slots, allow_lossy=allow_lossy, prefix_cache=False)


def sampling_of(f: Decoding) -> SamplingParams:
    """As `bench` samples: texts go on after the end-of-text token, so that all have one length."""
    return SamplingParams(temperature=f.temperature, top_p=f.top_p, max_tokens=f.max_tokens, ignore_eos=True)


def prompts_of(engine: Engine, f: Decoding | Experiment, *, whole: bool = False) -> Ready:
    """The prompts of a cell or an experiment, as its target takes them. whole: with all their turns."""
    file = None if f.prompts is None else Path(f.prompts)
    return ready(engine, file, load_rows(file, f.count), f.chat_template, whole=whole)


def reads(f: Decoding) -> list[Path]:
    """The files and folders that decide what a cell of decoding finds."""
    target = shipped("target") if f.target is None else resolve_folder(f.target)
    beside = [shipped("draft")] if f.target is None else []
    specs = [str(o.get("draft", "")) for o in f.configurations.values()] if isinstance(f, Bench) else []
    specs += [f.draft] if isinstance(f, Drafted | Predict) else []
    drafts = [folder for spec in specs for folder in folders_in(spec)]
    shipped_files = [prompts_file(), chat_prompts_file()]
    return [target, *beside, *drafts, *(shipped_files if f.prompts is None else [Path(f.prompts)])]


def row_of(record: Record) -> dict[str, Any]:
    """What a record says that is the same on every machine of one kind: its counts and a digest of its tokens."""
    counts = {name: getattr(record.counts, name) for name in COUNTED}
    text = hashlib.sha256(canonical(record.outputs).encode()).hexdigest()
    place = {"arm": record.arm, "group": record.group, "repeat": record.repeat}
    return {**place, "tokens": record.counts.tokens, "emitted": record.tokens, **counts} | {
        "failed": record.failed,
        "loops": record.loops,
        "outputs": text,
    }


def summed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of the ledger of a cell: sums over its rows."""
    return {name: sum(row[name] for row in rows) for name in COUNTED}


def answer_of(records: list[Record], timed: bool, **more: Any) -> Answer:
    """The answer of records: what is the same everywhere, and seconds apart from it where they count."""
    rows = [row_of(r) for r in sorted(records, key=lambda r: r.key)]
    measured = None
    if timed:
        keys = ("arm", "group", "repeat", "order", "seconds", "phases", "joules")
        measured = {"rows": [{k: asdict(r)[k] for k in keys} for r in sorted(records, key=lambda r: r.key)]}
    return Answer({"rows": rows, **more}, summed(rows), measured)


# ----------------------------------------------------------------- bench
def perform_bench(f: Bench) -> Answer:
    """Every arm on every group of prompts, interleaved."""
    configurations = f.configurations
    lossy = any(o.get("allow_lossy") for o in configurations.values())
    engine = base_engine(f.target, f.dtype, f.batch, lossy)
    wanted: dict[str, dict[str, Any]] = {name: {"draft": "auto", **o} for name, o in configurations.items()}
    arms = [Arm(name, companion(engine, **options)) for name, options in wanted.items()]
    found = prompts_of(engine, f, whole=True)
    warmup, later = f.warmup if f.metric == "speed" else 0, found.later
    records = run_arms(
        arms, found.ids, sampling_of(f), batch=f.batch, repeats=f.repeats, warmup=warmup, seed=f.seed, later=later
    )
    drafters = {arm.name: f"{arm.engine.parts.drafter.name} / {arm.engine.parts.rule.name}" for arm in arms}
    return answer_of(records, f.metric == "speed", drafters=drafters, data=found.data)


def bench_headline(record: Mapping[str, Any]) -> str:
    """Tokens per step of every arm."""
    rows = record["result"]["rows"]
    parts = []
    for arm in dict.fromkeys(r["arm"] for r in rows):
        mine = [r for r in rows if r["arm"] == arm and not r["failed"]]
        steps = sum(r["steps"] for r in mine)
        said = f"{sum(r['tokens'] for r in mine) / steps:.3f} tokens/step" if steps else "nothing"
        parts.append(said if arm == "arm" else f"{arm} {said}")
    return ", ".join(parts)


# ----------------------------------------------------------------- predict
def perform_predict(f: Predict) -> Answer:
    """Texts of the target scored by both models."""
    from outrider.evaluate.planning.predict_report import report
    from outrider.evaluate.scoring import score as ev

    engine = companion(base_engine(f.target, f.dtype, 1, False), f.draft, length=1)
    file = None if f.prompts is None else Path(f.prompts)
    items, data = ev.ready_items(engine, file, load_rows(file, f.count), f.chat_template)
    params = SamplingParams(
        temperature=f.temperature, top_p=f.top_p, max_tokens=f.max_tokens, n=f.samples, ignore_eos=True
    )
    clock, silent = ev.Clock(), lambda _: None
    emitted = ev.sample(engine, items, params, clock, silent, batch=f.batch, seed=f.seed)
    scored = ev.score(engine, ev.draft_model(engine), emitted, items, params, clock, silent, rows=f.rows, seed=f.seed)
    return Answer(report(scored.texts, None, scored) | {"moved_by_rounding": scored.moved, "data": data}, {})


def predict_headline(record: Mapping[str, Any]) -> str:
    """Rejections per token and tokens per call at the common lengths."""
    rows = record["result"]["drafting"]["sampled"]["lengths"]
    parts = [f"{r['acceptance_length']['value']:.3f} at {r['length']}" for r in rows if r["length"] in (1, 2, 4)]
    return f"predicted tokens/step {', '.join(parts)}"


# ----------------------------------------------------------------- audit
def perform_audit(f: Audit) -> Answer:
    """The engine's own texts under its target."""
    from outrider.evaluate.audit import answer, sources

    base = base_engine(f.target, f.dtype, 8, f.allow_lossy)
    engine = companion(base, **f.options)
    found = prompts_of(engine, f)
    params = SamplingParams(temperature=f.temperature, top_p=f.top_p, max_tokens=f.max_tokens)
    asked = {name: getattr(f, name) for name in ("samples", "level", "tolerance", "detect", "seed")}
    document, code = answer.document_of(engine, sources.of_engine(engine, params), found.ids, params, asked, ours=True)
    document.pop("machine", None)
    counts = asdict(engine.counts)
    return Answer({**document, "verdict": code, "data": found.data}, {name: counts[name] for name in COUNTED})


# ----------------------------------------------------------------- ab
def experiment_of(f: Ab) -> Any:
    """The experiment of a cell."""
    from outrider.evaluate.experiments.experiment import experiment_from

    seed = {} if f.seed is None else {"seed": f.seed}
    return experiment_from({**f.experiment, **seed}, "ab", "experiment")


def reads_ab(f: Ab) -> list[Path]:
    """As `reads`."""
    e = experiment_of(f)
    arms = {name: dict(options) for name, options in e.arms.items()}
    return reads(Bench(kind="bench", target=e.target, prompts=e.prompts, arms=arms))


def perform_ab(f: Ab) -> Answer:
    """An experiment from its first to its last prompt, in a store that is thrown away: the driver alone writes to the sweep's."""
    from outrider.evaluate.experiments.experiment import build_arms, run_experiment

    e = experiment_of(f)
    engine = base_engine(e.target, e.dtype, e.batch, any(a.get("allow_lossy") for a in e.arms.values()))
    prompts = prompts_of(engine, e, whole=not e.replay)
    if len(prompts.ids) < e.batch * 5:
        raise ConfigError(f"{len(prompts.ids)} prompts make fewer than five groups of {e.batch}: add prompts")
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "ab.db") as store:
        state = run_experiment(e, build_arms(engine, e), prompts.ids, store, later=prompts.later, data=prompts.data)
        run = store.runs()[0].id
        records = [Record.from_dict(data) for data in store.records(run).values()]
    found = {"groups": state.groups, "comparisons": [asdict(c) | {"ratio": list(c.ratio)} for c in state.comparisons]}
    if e.metric == "speed":  # how many groups it took, and so every record, is the clock's doing
        answer = answer_of(records, True)
        return Answer(
            {"base": e.base, "data": prompts.data}, answer.counts, {**(answer.measured or {}), **answer.result, **found}
        )
    return answer_of(records, False, base=e.base, data=prompts.data, **found)


def ab_headline(record: Mapping[str, Any]) -> str:
    """The decisions."""
    found = (record.get("measured") or record["result"])["comparisons"]
    return ", ".join(f"{c['arm']} {c['decision']} ({c['ratio'][0]:.3f}x)" for c in found)


KINDS: dict[str, Kind] = {
    "bench": Kind("bench", Bench, lambda f: f.metric == "speed", reads, perform_bench, bench_headline),
    "predict": Kind("predict", Predict, lambda f: False, reads, perform_predict, predict_headline),
    "audit": Kind("audit", Audit, lambda f: False, reads, perform_audit, lambda r: r["result"]["sentence"]),
    "ab": Kind("ab", Ab, lambda f: experiment_of(f).metric == "speed", reads_ab, perform_ab, ab_headline),
}
"""The kinds of cells of this floor, by name."""
