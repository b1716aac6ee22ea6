"""Draft lengths of each sequence beside one for all, on requests of which half copy and half are free.

    python benchmarks/lengths.py --loads 4 8 16 --rounds 6
    python benchmarks/lengths.py --out lengths.jsonl             # append the rounds; --report lengths.jsonl prints the table
    python benchmarks/lengths.py --model                         # steps and rows counted, with times of a model: no clock is read

A round gives every arm the same requests, in shuffled order of the arms: three for each of the sequences that run at a time, a copy
(a function given twice and begun a third time, greedy) and a free text (temperature 1) in turn. Printed: tokens per second of all
requests, as the ratio to plain decoding and to other arms within a round, with a bootstrap interval over rounds. The best common
length of a round is the one that was best in the others. Arms that follow measurements first learn for some rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from outrider.assets import shipped_prompts
from outrider.build import Engine, assemble, build_engine
from outrider.control.registry import FOLLOWING, load_controller
from outrider.params import SamplingParams
from outrider.protocols import Controller
from outrider.records import StepRecord
from outrider.types import SequenceView

COMMON = (1, 2, 3, 4, 6)
FIRST, LONGEST = 3, 12
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"draft": "none"},
    **{f"common {n}": {"length": n} for n in COMMON},
    **{name: {"length": FIRST, "lengths": f"{name}:{LONGEST}"} for name in FOLLOWING},
}
"""Arm -> the options of its engine."""
EACH = 3
"""Requests of a round for each sequence that runs at a time."""
TIMES: dict[str, tuple[float, float, float, float]] = {
    "bound by memory": (1.0, 0.002, 64.0, 0.05),
    "two cores": (1.0, 0.01, 8.0, 0.1),
    "bound by arithmetic": (1.0, 0.02, 4.0, 0.25),
}
"""Modelled machines: time of a pass of one row; of each further row while rows are cheap; rows from which each costs the last
number in place of that. Drafting costs 0.06 of a pass for each level."""
LEVEL = 0.06


class Modelled:
    """A controller that is told modelled seconds in place of measured ones."""

    def __init__(self, inner: Controller, machine: tuple[float, float, float, float]) -> None:
        self._inner, self._machine, self.seconds = inner, machine, 0.0
        self._deepest = 0

    def budget(self, sequences: Sequence[SequenceView]) -> list[int]:
        """The inner controller's lengths."""
        out = self._inner.budget(sequences)
        self._deepest = max(
            (x for v, x in zip(sequences, out, strict=True) if len(v.tokens) - v.cached == 1), default=0
        )
        return out

    def observe(self, record: StepRecord) -> None:
        """Tell what the step would have taken: prompts are free, every machine reads them alike."""
        one, cheap, free, dear = self._machine
        rows = record.scored + record.counts.proposed
        target = one + cheap * min(rows - 1, free) + dear * max(0.0, rows - 1 - free) if rows else 0.0
        seconds = {"target": target, "rule": 0.0, "draft": LEVEL * self._deepest, "host": 0.0}
        self.seconds += sum(seconds.values())
        counts, each = record.counts, record.each
        self._inner.observe(StepRecord(rows, record.scored, record.running, record.waiting, seconds, counts, each=each))


def requests(load: int, number: int) -> tuple[list[str], list[SamplingParams]]:
    """The requests of a round."""
    chosen = random.Random(number).sample(shipped_prompts(), k=EACH * load)
    prompts, params = [], []
    for i, text in enumerate(chosen):
        head = text[:400]
        prompts.append(f"{head}\n\n\n{head}\n\n\n{head[:40]}" if i % 2 == 0 else text[:300])
        params.append(SamplingParams(max_tokens=96, temperature=i % 2, ignore_eos=True))
    return prompts, params


def run(engine: Engine, load: int, number: int, clock: Callable[[], float]) -> dict[str, float]:
    """One arm's round: seconds, tokens and steps."""
    prompts, params = requests(load, number)
    steps, rows, began = engine.state.steps, engine.counts.proposed + engine.counts.steps, clock()
    results = engine.generate(prompts, params)
    return {
        "seconds": clock() - began,
        "tokens": sum(len(r.outputs[0].token_ids) for r in results),
        "steps": engine.state.steps - steps,
        "rows": engine.counts.proposed + engine.counts.steps - rows,
    }


def engines(base: Engine, load: int, machine: str | None) -> dict[str, tuple[Engine, Callable[[], float]]]:
    """An engine for each arm, on one target, and its clock."""
    assert base.loaded is not None
    out: dict[str, tuple[Engine, Callable[[], float]]] = {}
    for name, changes in ARMS.items():
        options = base.loaded.options.changed(slots=load, **changes)
        if machine is None:
            out[name] = assemble(base.loaded, options), time.perf_counter
            continue
        deep = 0 if name == "plain" else options.longest
        told = Modelled(load_controller(options.follows, min(options.length, deep), deep), TIMES[machine])
        out[name] = (
            assemble(base.loaded, options, controller=lambda *_, told=told: told),
            lambda told=told: told.seconds,
        )
    return out


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median of ratios with a 95% bootstrap interval over rounds."""
    draws = np.random.default_rng(0).choice(np.asarray(ratios), (4000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(median(ratios)), float(low), float(high)


def report(rows: list[dict[str, Any]]) -> None:
    """A table for each load and machine."""
    for machine, load in dict.fromkeys((r["machine"], r["load"]) for r in rows):
        here = [r for r in rows if (r["machine"], r["load"]) == (machine, load) and r["round"] >= 0]
        speed = {(r["round"], r["arm"]): r["tokens"] / r["seconds"] for r in here}
        numbers = [n for n in sorted({r["round"] for r in here}) if all((n, arm) in speed for arm in ARMS)]
        if not numbers:
            continue
        common = ["plain", *(f"common {n}" for n in COMMON)]
        best: dict[int, str] = {}
        for n in numbers:
            others = [m for m in numbers if m != n] or numbers
            best[n] = max(common, key=lambda arm, o=others: median(speed[m, arm] / speed[m, "plain"] for m in o))
        print(
            f"{load} at a time, {machine or 'this machine'}, {len(numbers)} rounds; ratios with 95% intervals over rounds"
        )
        for arm in ARMS:
            mine = [r for r in here if r["arm"] == arm]
            steps, tokens = sum(r["steps"] for r in mine), sum(r["tokens"] for r in mine)
            shown = "{:.3f} [{:.3f}, {:.3f}]".format(*interval([speed[n, arm] / speed[n, "plain"] for n in numbers]))
            rows_a_step = sum(r["rows"] for r in mine) / steps
            print(f"  {arm:13} {shown} of plain, {tokens / steps:5.1f} tokens and {rows_a_step:5.1f} rows a step")
        for other in ("adaptive", "bass", "best common"):
            found = [speed[n, "per_sequence"] / speed[n, best[n] if other == "best common" else other] for n in numbers]
            print("  per_sequence over {}: {:.3f} [{:.3f}, {:.3f}]".format(other, *interval(found)))
        print(f"  best common: {', '.join(sorted(set(best.values())))}", flush=True)


def main() -> None:
    """Rounds, then tables."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--loads", type=int, nargs="+", default=[4, 8, 16], help="sequences at a time")
    ask.add_argument("--rounds", type=int, default=6)
    ask.add_argument("--learn", type=int, default=3, help="rounds before the first that counts, of arms that learn")
    ask.add_argument("--seconds", type=float, default=1e9, help="of a load, after which no round is begun")
    ask.add_argument("--model", action="store_true", help="modelled step times in place of the clock's")
    ask.add_argument("--out", type=Path, help="append every measurement to this file")
    ask.add_argument("--report", type=Path, help="print the tables of such a file, and measure nothing")
    asked = ask.parse_args()
    if asked.report:
        report([json.loads(line) for line in asked.report.read_text("utf-8").splitlines()])
        return
    base = build_engine(draft="auto", length=FIRST, max_length=640, slots=1)
    rows: list[dict[str, Any]] = []
    for machine in TIMES if asked.model else (None,):
        for load in asked.loads:
            began, arms = time.monotonic(), engines(base, load, machine)
            for number in range(-asked.learn, asked.rounds):
                if time.monotonic() - began > asked.seconds:
                    break
                turns = [arm for arm in arms if number >= 0 or arm in FOLLOWING or number == -1]
                random.Random(number).shuffle(turns)
                for arm in turns:
                    engine, clock = arms[arm]
                    row = {
                        "machine": machine,
                        "load": load,
                        "round": number,
                        "arm": arm,
                        **run(engine, load, number, clock),
                    }
                    rows.append(row)
                    if asked.out:
                        with asked.out.open("a", encoding="utf-8") as lines:
                            lines.write(json.dumps(row) + "\n")
            del arms
    report(rows)


if __name__ == "__main__":
    main()
