"""A run: pairs, scenarios and prompts, workers that are asked in random order, and the result file that grows with every round."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import pool
from .arms import PLAIN, SPECULATIVE, Arm, Worker, arms

WARM = 8
SLOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """Prompts decoded together, and the temperature (0 = greedy). sizes: tokens of a prompt and new ones, None for the
    workload's. kinds: of the arms that take part."""

    batch: int
    temperature: float
    sizes: tuple[int, int] | None = None
    kinds: tuple[str, ...] = (PLAIN, SPECULATIVE)

    @property
    def name(self) -> str:
        name = f"batch {self.batch}, " + ("greedy" if self.temperature == 0 else f"temperature {self.temperature:g}")
        return name if self.sizes is None else f"{name}, {self.sizes[0]} + {self.sizes[1]} tokens"

    def takes(self, arm: Arm) -> bool:
        return (arm.batches or self.batch == 1) and arm.kind in self.kinds


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths in tokens, the vocabulary prompts are drawn from, and the seed of everything random."""

    prompt: int
    tokens: int
    vocab: int
    seed: int

    def command(self, arm: Arm, scenario: Scenario, turn: int) -> dict[str, Any]:
        """The same prompts for every arm of a turn, the arm's own setting. Turn -1 is short: it only warms up."""
        draw = random.Random(f"{self.seed} {scenario.name} {turn}")
        prompt, tokens = scenario.sizes or (self.prompt, self.tokens)
        if turn < 0:
            prompt, tokens = min(WARM, prompt), min(WARM, tokens)
        return {
            "prompts": [[draw.randrange(self.vocab) for _ in range(prompt)] for _ in range(scenario.batch)],
            "tokens": tokens,
            "temperature": scenario.temperature,
            "seed": draw.randrange(2**31),
            "setting": arm.setting,
        }


class Bench:
    """Started workers, and the samples by scenario and arm: one entry a round, None where it failed or sat out.

    An arm that takes n times SLOW_SECONDS takes part in every n-th round only, or nothing else would get a second one.
    """

    def __init__(self, wanted: Sequence[Arm], scenarios: Sequence[Scenario], workload: Workload) -> None:
        self.arms, self.scenarios, self.workload = list(wanted), list(scenarios), workload
        self.running: dict[str, pool.Running] = {}
        self.absent: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.samples = {s.name: {a.name: [] for a in wanted if s.takes(a)} for s in scenarios}
        self.rounds = 0

    def resume(self, record: dict[str, Any]) -> None:
        """Go on behind the rounds of an earlier run of the same arms and scenarios."""
        self.samples, self.rounds = record["samples"], record["rounds"]

    def start(self, load: dict[str, Any], threads: int, logs: Path, patience: float) -> None:
        """Start every worker whose engine is installed; the others are absent."""
        for worker in {arm.worker.name: arm.worker for arm in self.arms}.values():
            version = pool.installed(worker)
            if version is None:
                self.absent[worker.name] = f"{worker.needs} is not installed in {worker.python.parent.parent.name}"
                say(f"{worker.name}: absent")
                continue
            self._start(worker, load, threads, logs, patience)

    def _start(self, worker: Worker, load: dict[str, Any], threads: int, logs: Path, patience: float) -> None:
        try:
            running = self.running[worker.name] = pool.start(worker, load, threads, logs, patience)
        except pool.WorkerError as error:
            self.failed[worker.name] = str(error)
            say(f"{worker.name}: {error}")
        else:
            say(f"{worker.name}: loaded in {running.load_seconds:.0f} s, {running.rss_gb:.1f} GB")

    def round(self, turn: int) -> None:
        """Every arm once in every scenario, in random order. Turn -1 warms up: few tokens, nothing kept."""
        order = random.Random(f"{self.workload.seed} {turn}")
        for scenario in order.sample(self.scenarios, len(self.scenarios)):
            table = self.samples[scenario.name]
            for arm in order.sample(self.arms, len(self.arms)):
                if arm.name in table:
                    due = turn < 0 or turn % _period(table[arm.name]) == 0
                    sample = self._ask(arm, scenario, turn) if due else None
                    if turn >= 0:
                        table[arm.name].append(sample)
        self.rounds = turn + 1

    def _ask(self, arm: Arm, scenario: Scenario, turn: int) -> dict[str, Any] | None:
        running = self.running.get(arm.worker.name)
        if running is None:
            return None
        warm, timed = (self.workload.command(arm, scenario, t) for t in (-1, turn))
        try:
            return pool.ask(running, timed, warm)
        except pool.WorkerError as error:
            say(str(error))
            self.failed[arm.worker.name] = str(error)
            pool.end(self.running.pop(arm.worker.name))
            return None

    def end(self) -> None:
        """End every worker."""
        for running in self.running.values():
            pool.end(running)

    def record(self) -> dict[str, Any]:
        """Everything known so far, as JSON."""
        workers = {
            name: {"versions": r.versions, "load_seconds": round(r.load_seconds, 1), "rss_gb": round(r.rss_gb, 2)}
            for name, r in self.running.items()
        }
        kinds = {arm.name: [arm.engine, arm.kind] for arm in self.arms}
        return {
            "rounds": self.rounds,
            "workers": workers,
            "absent": self.absent,
            "failed": self.failed,
            "arms": kinds,
            "scenarios": {s.name: {"batch": s.batch, "temperature": s.temperature} for s in self.scenarios},
            "samples": self.samples,
        }


def _period(samples: Sequence[dict[str, Any] | None]) -> int:
    """In every how manieth round an arm takes part, by the fastest it was so far."""
    return max(1, round(min((s["seconds"] for s in samples if s), default=0.0) / SLOW_SECONDS))


def run(options: argparse.Namespace) -> None:
    """`peers.py run`: each pair for its share of the time."""
    import synthetic  # here: torch is slow to import, and `table` and `install` do without it

    for index, pair in enumerate(options.pair):
        size, _, acceptance = pair.partition("-")
        if size not in synthetic.SIZES or not acceptance:
            raise SystemExit(f"pair {pair!r}: write size-acceptance, such as 160m-0.8; sizes: {list(synthetic.SIZES)}")
        folder = synthetic.build(size, synthetic.SIZES[size], float(acceptance), [options.dtype])
        left = options.end - time.monotonic()
        deadline = time.monotonic() + left / (len(options.pair) - index)
        run_pair(pair, folder, deadline, options)


def run_pair(pair: str, folder: Path, deadline: float, options: argparse.Namespace) -> None:
    """Start, warm up, repeat rounds until the deadline, and keep the result file up to date after each."""
    cores = sorted(os.sched_getaffinity(0))
    measured = json.loads((folder / "measured.json").read_text())
    workload = Workload(options.prompt, options.tokens, measured["recipe"]["size"]["vocab"], options.seed)
    scenarios = [Scenario(batch, temperature) for batch in options.batch for temperature in options.temperature]
    bench = Bench(arms(options.engines, options.lengths, cores), scenarios, workload)
    load = {
        "target": str(folder / f"target-{options.dtype}"),
        "draft": str(folder / f"draft-{options.dtype}"),
        "dtype": options.dtype,
        "capacity": max(options.batch),
        "length": options.prompt + options.tokens,
    }
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(cores),
        "pair": {"name": pair, **measured},
        "dtype": options.dtype,
        "workload": {"prompt": options.prompt, "tokens": options.tokens, "seed": options.seed},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out / f"{pair}-{options.dtype}.json"
    try:
        bench.start(load, len(cores), options.out / "logs" / pair, options.patience)
        longest, turn = 0.0, -1
        while bench.running and turn < options.rounds and (turn < 1 or time.monotonic() + longest < deadline):
            start = time.monotonic()
            bench.round(turn)
            longest = max(longest, time.monotonic() - start) if turn >= 0 else 0.0
            say(f"{pair}: round {turn + 1} took {time.monotonic() - start:.0f} s")
            write_json(out, about | bench.record())
            turn += 1
    finally:
        bench.end()
    if not bench.rounds:
        raise SystemExit(f"nothing was measured: {bench.failed or bench.absent}")
    print(out)


def machine(cores: Sequence[int]) -> dict[str, Any]:
    """The processor, the cores used, the memory, the system."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "processor": name,
        "cores": len(cores),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def write_json(path: Path, content: object) -> None:
    """Replace a file in one step."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)
