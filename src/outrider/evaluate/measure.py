"""Measure arms against each other: interleaved on the same prompts and seeds, warm-up apart, raw records only."""

from __future__ import annotations

import platform
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from time import perf_counter

import numpy as np

from outrider.engine.engine import Engine, Result
from outrider.evaluate.stats import Ratio, paired_ratio
from outrider.sampling.params import SamplingParams
from outrider.types import PHASES, Counts


@dataclass(frozen=True, slots=True)
class Arm:
    """One configuration under test."""

    name: str
    engine: Engine


@dataclass(frozen=True, slots=True)
class Record:
    """One run of one arm on one group of prompts. Seconds are wall clock; `counts` are the engine's raw sums."""

    arm: str
    group: int
    repeat: int
    order: int
    tokens: int
    seconds: float
    phases: dict[str, float]
    counts: Counts
    failed: int
    results: tuple[Result, ...] = field(repr=False, default=())


def run_group(arm: Arm, prompts: list[list[int]], params: list[SamplingParams], place: tuple[int, int, int]) -> Record:
    """Decode one group of prompts together on one arm."""
    engine = arm.engine
    engine.reset()
    start = perf_counter()
    results = engine.generate(prompts, params)
    seconds = perf_counter() - start
    outputs = [o for r in results for o in r.outputs]
    failed = sum(o.finish_reason == "error" for o in outputs)
    tokens = sum(len(o.token_ids) for o in outputs)
    counts, phases = engine.reset()
    return Record(arm.name, *place, tokens, seconds, phases, counts, failed, tuple(results))


def run_arms(
    arms: list[Arm],
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    batch: int = 1,
    repeats: int = 3,
    warmup: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Record]:
    """Run every arm on every group of `batch` prompts `repeats` times, the arms of a group next to each other in random order.

    Sampled runs use the same per-prompt seed in every arm. Warm-up runs are thrown away. A failed request is kept as an
    outcome (`Record.failed`) and its record enters no rate.
    """
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    order = random.Random(seed)
    for arm in arms:
        for _ in range(warmup):
            run_group(arm, groups[0], [params] * len(groups[0]), (0, -1, 0))
    records: list[Record] = []
    for repeat in range(repeats):
        for g, group in enumerate(groups):
            seeds = [replace(params, seed=(repeat * 1_000_003 + g * batch + i)) for i in range(len(group))]
            for place, arm in enumerate(order.sample(arms, len(arms))):
                records.append(run_group(arm, group, seeds, (g, repeat, place)))
                if progress:
                    progress(arm.name)
    return records


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """One arm over all its records: rates as ratios of sums, the spread over records, and the ratio to the base arm."""

    name: str
    tokens: int
    seconds: float
    tokens_per_second: float
    low: float
    median: float
    high: float
    phases: dict[str, float]
    counts: Counts
    failed: int
    speedup: Ratio | None


def summarise(records: list[Record], base: str, *, seed: int = 0) -> list[ArmSummary]:
    """Per arm, in order of first appearance with the base first. low and high: 10th and 90th percentile over records."""
    names = sorted(
        {r.arm for r in records}, key=lambda n: (n != base, next(i for i, r in enumerate(records) if r.arm == n))
    )
    failed_groups = {(r.group, r.repeat) for r in records if r.failed}
    per_arm = {n: [r for r in records if r.arm == n and (r.group, r.repeat) not in failed_groups] for n in names}
    out: list[ArmSummary] = []
    for name in names:
        mine = per_arm[name]
        if not mine:
            out.append(ArmSummary(name, 0, 0.0, 0.0, 0.0, 0.0, 0.0, {}, Counts(), sum(r.failed for r in records), None))
            continue
        counts = Counts()
        for r in mine:
            counts.merge(r.counts)
        rates = [r.tokens / r.seconds for r in mine]
        speedup = None if name == base else paired_ratio(*_by_group(mine), *_by_group(per_arm[base]), seed=seed)
        low, median, high = np.quantile(rates, [0.1, 0.5, 0.9])
        tokens, seconds = sum(r.tokens for r in mine), sum(r.seconds for r in mine)
        phases = {p: sum(r.phases[p] for r in mine) for p in PHASES}
        failed = sum(r.failed for r in records if r.arm == name)
        out.append(
            ArmSummary(
                name,
                tokens,
                seconds,
                tokens / seconds,
                float(low),
                float(median),
                float(high),
                phases,
                counts,
                failed,
                speedup,
            )
        )
    return out


def _by_group(records: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    groups = sorted({r.group for r in records})
    tokens = np.array([sum(r.tokens for r in records if r.group == g) for g in groups], dtype=float)
    seconds = np.array([sum(r.seconds for r in records if r.group == g) for g in groups], dtype=float)
    return tokens, seconds


def machine() -> dict[str, object]:
    """What a reader needs to know about where numbers were taken."""
    import torch

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            model = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), model)
    except OSError:
        pass
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "transformers", "outrider")},
    }


def as_json(summary: ArmSummary) -> dict[str, object]:
    """One arm as plain data."""
    out = asdict(summary)
    if summary.speedup is not None:
        out["speedup"]["verdict"] = summary.speedup.verdict
    return out
