"""What drafting over a view of the target's own cache gains by context and by sequences, decoded by the engine (MagicDec).

    python benchmarks/magicdec.py --contexts 2048,4096,8192,16384 --batches 1,4 --rounds 6 --out magicdec.jsonl
    python benchmarks/magicdec.py --report magicdec.jsonl --figure magicdec.svg

A target of the shipped pair's shape with random weights in bfloat16. Prompts are random tokens; their keys and values are random
numbers that were put among the known pages beforehand, so no prompt is read and every sequence has a cache of its own. Acceptance
is that of the engine's own drafter and rule. It says nothing of real models: `--temperature` sets it, since hotter distributions
differ less. Times do not depend on it. `int8` sees all tokens in a copy of the cache, so its own acceptance and gain count, not
those at the acceptance of windows, and the model, which is that of a view, says nothing of it.

All arms decode from the same cache in turn, in random order within a round; a run is some steps behind the first token of all
sequences. Gains are ratios of tokens per second to plain decoding in the same rounds, with a 95% interval over rounds. The model
(`theory.context_times`): constants from passes timed alone, of 512 cached tokens, the least and the greatest context; the host's
share of a step and of a level from the cell of the least context with the fewest sequences; all other steps are predicted.
`--cpu-time`: seconds of one thread, for machines that others use too.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from native import random_weights, shipped_config
from peers.run import say

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.registry import load_drafter
from outrider.engine.room import root_of
from outrider.evaluate.planning.contexts import SHAPES, time_passes
from outrider.evaluate.statistics.ratios import Ratio, paired_ratio
from outrider.models.lean import LeanTarget
from outrider.nn.kv import PagedKV
from outrider.params import SamplingParams
from outrider.theory.context_times import ContextTimes, TimedPass
from outrider.theory.speedup import tokens_per_call
from outrider.verify import best_exact

VIEW = 512
KINDS = {
    "window": f"sparse:window:16+{VIEW - 16}", "snap": f"sparse:snap:{VIEW}", "pillar": f"sparse:pillar:{VIEW}",
    "int8": "sparse:int8",
}  # fmt: skip
VALUES = 0.3
"""Standard deviation of the cached values: attention then says about as much as tokens do."""
Cell = tuple[int, int, str, int]
"""Context, sequences, arm, draft length."""


class OneCache(LeanTarget):
    """A target whose engines all decode from one cache, one after the other."""

    kv: PagedKV

    def new_kv(self, slots: int, length: int, *, memory: int | None = None) -> PagedKV:
        """The cache, whatever is asked for; a drafter's copy in another type is its own."""
        return self.kv if self.stored == self.kv.stored else super().new_kv(slots, length, memory=memory)


class Bench:
    """The target, its cache, and prompts whose keys and values are known."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.clock: Callable[[], float] = time.thread_time if args.cpu_time else time.perf_counter
        self.temperature: float = args.temperature
        config = replace(shipped_config("target"), max_length=max(args.contexts) + 512)
        self.target, self.slots = OneCache(config, random_weights(config, torch.bfloat16)), max(args.batches)
        if self.target.native is None:
            raise SystemExit("no native decoder here: " + " ".join(self.target.notices))
        self.native, self.length = self.target.native, config.max_length
        self.kv = self.target.kv = LeanTarget.new_kv(self.target, self.slots, self.length + 80)
        rng, size = torch.Generator().manual_seed(0), max(args.contexts)
        self.tokens = [torch.randint(config.vocab_size, (size,), generator=rng).tolist() for _ in range(self.slots)]
        for slot in range(self.slots):
            self.kv.make_room(slot, size)
            self.kv.length[slot] = size
        self.kv.k.normal_(), self.kv.v.normal_(std=VALUES)
        for slot, tokens in enumerate(self.tokens):
            self.kv.publish(slot, tokens, root_of(self.target))
        self.kv.release(range(self.slots))

    def engine(self, kind: str, length: int, slots: int) -> Engine:
        drafter = load_drafter(KINDS.get(kind, "none"), target=self.target, length=length)
        return Engine(self.target, drafter, best_exact(drafter), Fixed(length), slots=slots, max_length=self.length)

    def run(self, engine: Engine, kind: str, context: int, steps: int, seed: int) -> dict[str, Any]:
        """Some steps of an arm: seconds, tokens, and what the drafts came to."""
        batch = engine.options.slots
        self.kv.attended = {} if kind in ("snap", "pillar") else None  # others do not pay for it
        params = [
            SamplingParams(temperature=self.temperature, max_tokens=400, seed=seed + i, ignore_eos=True)
            for i in range(batch)
        ]
        names = [engine.submit(t[:context], p) for t, p in zip(self.tokens, params, strict=False)]
        while engine.counts.steps < 2 * batch:  # each prompt's last token, and the first draft
            engine.step()
        if any(s.reused < context - self.kv.page for name in names for s in engine.sequences(name)):
            raise SystemExit(
                "a prompt was read though its keys and values are in the cache: the times would be of reading it"
            )
        engine.reset()
        began = self.clock()
        for _ in range(steps):
            engine.step()
        seconds = self.clock() - began
        counts, _ = engine.reset()
        for name in names:
            engine.abort(name)
        return {
            "seconds": seconds, "tokens": counts.tokens, "steps": steps, "accepted": counts.accepted, "judged": counts.judged,
        }  # fmt: skip

    def passes(self, context: int, rounds: int) -> list[TimedPass]:
        """Passes of the target alone over about `context` cached tokens; the median of the rounds."""
        self.kv.attended = None
        for slot, tokens in enumerate(self.tokens):
            self.kv.share(slot, tokens[: context + 1], root_of(self.target))
            self.kv.make_room(slot, self.kv.length[slot] + 16)
        shapes = [(n, b) for n, b in SHAPES if b <= self.slots]
        found = time_passes(self.target, self.kv, shapes, rounds, self.clock)
        self.kv.release(range(self.slots))
        return found


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of a run: timed passes, then every cell's rounds."""
    bench = Bench(args)
    yield {"machine": bench.native.kind, "threads": torch.get_num_threads(), "cpu_time": args.cpu_time}
    for context in sorted({VIEW, min(args.contexts), max(args.contexts)}):
        say(f"passes over {context} tokens")
        for p in bench.passes(context, 2 * args.rounds):
            yield {"pass": [p.sequences, p.rows, p.cached, p.seconds]}
    for context in args.contexts:
        for batch in args.batches:
            arms = [("plain", 0)]
            arms += [(k, n) for k in args.kinds for n in (args.lengths if k == "window" else args.lengths[-1:])]
            engines = {arm: bench.engine(*arm, batch) for arm in arms}
            steps: dict[tuple[str, int], int] = dict.fromkeys(arms, int(args.steps))
            for number in range(-1, args.rounds):
                doing = "warms up" if number < 0 else f"round {number + 1} of {args.rounds}"
                say(f"{context} tokens, {batch} at a time: {doing}")
                for arm in random.sample(arms, len(arms)):
                    found = bench.run(engines[arm], arm[0], context, steps[arm], 1000 * number + 7)
                    if number < 0:  # warms up, and says how many steps fill a run
                        steps[arm] = max(args.steps, min(60, round(args.seconds * args.steps / found["seconds"])))
                        continue
                    yield {
                        "context": context,
                        "batch": batch,
                        "arm": arm[0],
                        "length": arm[1],
                        "round": number,
                        **found,
                    }


class Report:
    """Cells of a run beside the model."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.cells: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
        for r in rows:
            if "arm" in r:
                self.cells[r["context"], r["batch"], r["arm"], r["length"]].append(r)
        times = ContextTimes.fit(TimedPass(*r["pass"]) for r in rows if "pass" in r)
        context, batch = min((c, b) for c, b, _, _ in self.cells)
        step = self.step((context, batch, "plain", 0)) - times.plain(batch, context)
        times = times.with_host(step, 0.0)
        levels = [
            (self.step(cell) - times.drafted(batch, context, VIEW, cell[3])) / cell[3]
            for cell in self.cells
            if cell[:3] == (context, batch, "window")
        ]
        self.times = times.with_host(step, median(levels) if levels else 0.0)
        pooled = [r for c in self.cells if c[2] == "window" for r in self.cells[c]]
        self.pooled = sum(r["accepted"] for r in pooled) / max(1, sum(r["judged"] for r in pooled))

    def step(self, cell: Cell) -> float:
        """Seconds of a step: the median of the rounds."""
        return median(r["seconds"] / r["steps"] for r in self.cells[cell])

    def acceptance(self, cell: Cell) -> float:
        """Of a judged token."""
        mine = self.cells[cell]
        return sum(r["accepted"] for r in mine) / max(1, sum(r["judged"] for r in mine))

    def gain(self, cell: Cell) -> Ratio:
        """Tokens per second over plain decoding."""
        base = self.cells[cell[0], cell[1], "plain", 0]
        columns = [
            np.array([r[f] for r in rows], float) for rows in (self.cells[cell], base) for f in ("tokens", "seconds")
        ]
        return paired_ratio(*columns)

    def timed_gain(self, cell: Cell) -> Ratio:
        """The same with the tokens of steps at the pooled acceptance of windows in place of those that a few steps brought: only
        times are left to chance."""
        base = self.cells[cell[0], cell[1], "plain", 0]
        steps, seconds, ones, others = (
            np.array([r[f] for r in rows], float) for rows in (self.cells[cell], base) for f in ("steps", "seconds")
        )
        return paired_ratio(steps * tokens_per_call(self.pooled, cell[3]), seconds, ones, others)

    def predicted(self, cell: Cell) -> float:
        """Seconds of a step by the model."""
        context, batch, _, length = cell
        return self.times.drafted(batch, context, VIEW, length) if length else self.times.plain(batch, context)

    def print(self) -> None:
        """A line for each cell, then how far the model is off and what its choices lose."""
        t = self.times
        print(
            f"model: {1e3 * t.whole:.2f} ms a pass, {1e6 * t.row:.1f} us a row, {1e6 * t.token:.3f} us a cached token, "
            f"{100 * t.pair / t.token:.1f}% of that for each further row; host {1e3 * t.step:.2f} ms a step, "
            f"{1e3 * t.level:.2f} a level"
        )
        for cell in self.cells:
            took, said = self.step(cell), self.predicted(cell)
            line = (
                f"{cell[0]:6} x {cell[1]} {cell[2]:6} {cell[3]:2}: step {1e3 * took:7.2f} ms, model {said / took:.2f}"
            )
            if cell[3]:
                gain, timed = self.gain(cell), self.timed_gain(cell)
                line += f"; gain {gain.value:.2f} ({gain.low:.2f} to {gain.high:.2f}), acceptance {self.acceptance(cell):.2f}; "
                line += f"at {self.pooled:.2f}: {timed.value:.2f} ({timed.low:.2f} to {timed.high:.2f}), "
                line += f"model {self.times.gain(cell[1], cell[0], VIEW, cell[3], self.pooled):.2f}"
            print(line)
        off = [abs(self.predicted(c) / self.step(c) - 1) for c in self.cells if c[2] in ("plain", "window")]
        print(
            f"steps of plain decoding and windows: {sum(x <= 0.15 for x in off)} of {len(off)} within 15%, worst {max(off):.0%}"
        )
        print(f"what the model's choice of length loses, at most: {max(self.regrets().values()):.1%}")

    def regrets(self) -> dict[tuple[int, int], float]:
        """By context and sequences, how much slower the length that the model chooses is than the best; at the pooled acceptance of
        windows, so that only times decide."""
        mine, alpha = [c for c in self.cells if c[2] == "window"], self.pooled
        out: dict[tuple[int, int], float] = {}
        for context, batch in dict.fromkeys(c[:2] for c in mine):
            lengths = [0, *(c[3] for c in mine if c[:2] == (context, batch))]
            cell = lambda n: (context, batch, "window" if n else "plain", n)  # noqa: E731, B023
            speed = {n: tokens_per_call(alpha, n) / self.step(cell(n)) for n in lengths}
            chosen = self.times.best(batch, context, VIEW, alpha, lengths)[0]
            out[context, batch] = max(speed.values()) / speed[chosen] - 1
        return out


def draw(report: Report, path: Path) -> None:
    """Gains by context beside the model's, as a figure."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    length = max(c[3] for c in report.cells)
    for colour, batch in zip(
        ("tab:blue", "tab:orange", "tab:green"), sorted({c[1] for c in report.cells}), strict=False
    ):
        for kind, mark in (("window", "o"), ("snap", "^"), ("pillar", "s")):
            cells = sorted(c for c in report.cells if c[1:] == (batch, kind, length))
            if not cells:
                continue
            gains = [report.timed_gain(c) for c in cells]
            bars = [[g.value - g.low for g in gains], [g.high - g.value for g in gains]]
            axes.errorbar(
                [c[0] for c in cells], [g.value for g in gains], bars, fmt=mark, color=colour, capsize=2,
                label=f"{kind}, {batch} at a time", alpha=1.0 if kind == "window" else 0.5,
            )  # fmt: skip
            if kind == "window":
                line = np.geomspace(VIEW, 2 * cells[-1][0], 80)
                model = [report.times.gain(batch, s, VIEW, length, report.pooled) for s in line]
                axes.plot(line, model, color=colour, label=f"model, {batch} at a time")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="cached tokens of a sequence",
        ylabel=f"speed over plain, drafts of {length}, acceptance {report.pooled:.2f}",
    )
    axes.set_xticks([512, 1024, 2048, 4096, 8192, 16384, 32768], ["512", "1k", "2k", "4k", "8k", "16k", "32k"])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=numbers, default=[2048, 4096, 8192, 16384])
    parser.add_argument("--batches", type=numbers, default=[1, 4])
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--lengths", type=numbers, default=[2, 5], help="of windows; the other kinds take the last")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6, help="fewest of a run")
    parser.add_argument("--seconds", type=float, default=0.3, help="that a run of more steps may take")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=Path, help="append what was measured")
    parser.add_argument("--report", type=Path, help="print what was measured before")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if args.report is not None:
        rows = [json.loads(line) for line in args.report.read_text().splitlines()]
    else:
        for row in measure(args):
            rows.append(row)
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    report = Report(rows)
    report.print()
    if args.figure is not None:
        draw(report, args.figure)


if __name__ == "__main__":
    main()
