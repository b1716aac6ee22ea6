"""Measure arms against each other: interleaved on the same prompts and seeds, warm-up apart, raw records only."""

from __future__ import annotations

import platform
import random
import resource
import sys
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from time import perf_counter
from typing import Any

from outrider.build import Engine
from outrider.engine.prompts import Prompts
from outrider.errors import ConfigError, RequestError
from outrider.evaluate.energy import Meter
from outrider.evaluate.records import Key, Record, Timing
from outrider.moved import names_of
from outrider.noise import derive_seed
from outrider.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Arm:
    """One configuration under test."""

    name: str
    engine: Engine


def run_group(arm: Arm, prompts: list[list[int]], params: list[SamplingParams], place: tuple[int, int, int]) -> Record:
    """Decode one group of prompts together on one arm. A request that the engine refuses or fails is an outcome: `failed`."""
    engine = arm.engine
    engine.reset()
    before = _meter().read()
    outputs: dict[tuple[str, int], list[int]] = {}
    first: dict[tuple[str, int], float] = {}
    ends: dict[tuple[str, int], float] = {}
    failed, names, start = 0, [], perf_counter()
    try:
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            names.append(f"measured-{i}")
            try:
                engine.submit(prompt, p, request=names[-1])
            except RequestError:
                failed += 1
                outputs[names[-1], 0] = []
        while engine.busy:
            events, now = engine.step(), perf_counter() - start
            for e in events:
                key = (e.request, e.index)
                outputs.setdefault(key, []).extend(e.tokens)
                first.setdefault(key, now)
                ends[key] = now
                failed += e.finish_reason == "error"
    finally:
        for name in names:
            engine.abort(name)
    seconds, after = perf_counter() - start, _meter().read()
    counts, phases = engine.reset()
    joules = after.joules_since(before) if after is not None and before is not None else None
    texts = tuple(tuple(outputs[k]) for k in sorted(outputs, key=lambda k: (names.index(k[0]), k[1])))
    timings = tuple(Timing(first[k], ends[k], len(outputs[k])) for k in outputs if outputs[k])
    loops = sum(map(ends_in_a_loop, texts))
    total = sum(map(len, texts))
    return Record(
        arm.name, *place, total, seconds, phases, counts, failed, timings, loops, texts, None, joules, machine()
    )


def ends_in_a_loop(tokens: Seq[int], *, longest: int = 32, times: int = 4, least: int = 32) -> bool:
    """Whether a text ends in at least `times` copies of one piece of at most `longest` tokens, over at least `least` tokens.

    A repetition is what drafts guess best: without this guard the fastest arm may be the broken one.
    """
    for period in range(1, longest + 1):
        span = max(least, times * period)
        if len(tokens) >= span and all(tokens[-i] == tokens[-i - period] for i in range(1, span - period + 1)):
            return True
    return False


def text_seed(seed: int, repeat: int, prompt: int) -> int:
    """Sampling seed of a prompt's text, >= 0: another run seed draws other texts, so that two runs are two samples."""
    return derive_seed(derive_seed(seed, repeat + 1), prompt + 1) >> 1


def run_arms(
    arms: list[Arm],
    prompts: Prompts,
    params: SamplingParams,
    *,
    batch: int = 1,
    repeats: int = 3,
    warmup: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    known: Mapping[Key, Record] | None = None,
    keep: Callable[[Record], Record] | None = None,
) -> list[Record]:
    """Run every arm on every group of `batch` prompts `repeats` times, the arms of a group next to each other in random order.

    seed: of the run: it decides the texts that are drawn (`text_seed`, the same in every arm) and the order of arms. Warm-up runs
    are thrown away. A failed request is kept as an outcome (`Record.failed`) and its record enters no rate. known: records of an
    interrupted run, which are not run again.
    keep: called with every new record outside of any measured time; what it returns takes the record's place.
    """
    if not arms:
        raise ConfigError("nothing is measured without an arm: name at least one")
    if not (texts := arms[0].engine.encode_all(prompts)):
        raise ConfigError("nothing is measured without a prompt: give at least one")
    groups = [texts[i : i + batch] for i in range(0, len(texts), batch)]
    order, known = random.Random(seed), known or {}
    for arm in arms:
        if any((arm.name, g, r) not in known for g in range(len(groups)) for r in range(repeats)):
            for _ in range(warmup):
                run_group(arm, groups[0], [params] * len(groups[0]), (0, -1, 0))
    records: list[Record] = []
    for repeat in range(repeats):
        for g, group in enumerate(groups):
            seeds = [replace(params, seed=text_seed(seed, repeat, g * batch + i)) for i in range(len(group))]
            for place, arm in enumerate(order.sample(arms, len(arms))):
                record = known.get((arm.name, g, repeat))
                if record is None:
                    record = run_group(arm, group, seeds, (g, repeat, place))
                    record = keep(record) if keep else record
                records.append(record)
                if progress:
                    progress(arm.name)
    return records


@cache
def _meter() -> Meter:
    return Meter()


def energy_absent() -> str | None:
    """Why there is no energy in the records; None where there is."""
    return None if _meter().present else _meter().absent


def peak_memory() -> int:
    """Most resident memory of this process so far, in bytes: weights and caches of all its engines together."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@cache
def machine() -> dict[str, Any]:
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


__getattr__ = names_of(__name__)
