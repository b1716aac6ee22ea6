"""Is the simulated fleet right? Its latencies and throughput beside those of real servers on this machine, at several loads.

    python benchmarks/fleet.py                              # the shipped pair, one and two replicas, four loads
    python benchmarks/fleet.py --replicas 1 --loads 0.3 0.6 --rounds 2

A round measures the step table on the engine (in a process with a replica's cores, and its neighbours as busy as they will be), on
the servers what text and HTTP add to a request and to a step, and then sends the same Poisson traffic to the real servers, load
after load; rounds follow each other, so what slows the machine slows both. On a machine that others use, its speed may still
change in between: `corrected` is the simulation with all step times multiplied by one number, which makes the engines' seconds
those that the servers counted in that very run.

Loads are shares of the throughput at which the simulated replicas are always busy. Client and router are this process: a request
goes to the server with the fewest open requests, as in the simulation. Printed: p50 and p95 of the time to the first token and of
the time per token, and tokens per second, as medians over rounds. A run in which a request was refused or cut off is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from scipy.optimize import brentq
from serve import Arm, Start
from serve_load import Outcome, Sender, Traffic, one, percentile

from outrider.assets import shipped_prompts
from outrider.evaluate.planning.step_table import StepTable
from outrider.records import Counts
from outrider.theory import fleet

TABLE = """
import json, sys
from dataclasses import asdict
from outrider import Engine, SamplingParams
from outrider.evaluate.planning.step_table import measure
import torch
o = json.loads(sys.argv[1])
torch.set_num_threads(o["threads"])
engine = Engine.build(draft=o["draft"], slots=o["slots"])
params = SamplingParams(max_tokens=o["tokens"], temperature=1.0, ignore_eos=True)
t = measure(engine, o["prompts"], o["draft"], o["lengths"], o["loads"], params, rounds=o["rounds"], seed=o["seed"])
counts = {n: asdict(c) for n, c in t.counts.items()}
rows = [t.prompts[False], t.prompts[True]]
print("TABLE" + json.dumps([t.decode, rows, counts, t.spread, [len(engine.encode(p)) for p in o["prompts"]]]))
"""


def environment(cores: list[int]) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(len(cores)), "OMP_PROC_BIND": "false"}


def pinned(command: list[str], cores: list[int]) -> list[str]:
    return ["taskset", "-c", ",".join(map(str, cores)), *command]


def tables(
    shares: list[list[int]], options: argparse.Namespace, prompts: list[str], seed: int
) -> tuple[StepTable, list[int]]:
    """The step table of one replica while all are as busy as it is, and the prompts' lengths: the first process's."""
    loads = sorted({1, 2, 4, options.slots} & set(range(1, options.slots + 1)))
    wish = {
        "draft": options.draft, "slots": options.slots, "tokens": options.tokens, "prompts": prompts, "loads": loads,
        "lengths": [options.length], "rounds": options.table_rounds,
    }  # fmt: skip
    running = [
        subprocess.Popen(
            pinned([sys.executable, "-c", TABLE, json.dumps(wish | {"threads": len(cores), "seed": seed + i})], cores),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment(cores),
        )
        for i, cores in enumerate(shares)
    ]
    said, errors = zip(*[p.communicate() for p in running], strict=True)
    if any(p.returncode for p in running):
        sys.exit("no step table:\n" + "\n".join(e[-2000:] for e in errors))
    decode, rows, counts, spread, sizes = json.loads(said[0].split("TABLE")[1])
    return StepTable(
        {int(n): {int(b): s for b, s in row.items()} for n, row in decode.items()},
        {bool(i): [(float(r), float(s)) for r, s in row] for i, row in enumerate(rows)},
        {int(n): Counts(**c) for n, c in counts.items()},
        spread,
    ), sizes


async def drive(arms: list[Arm], traffic: Traffic, arrivals: np.ndarray) -> list[Outcome]:
    """Send a request at each arrival to the server with the fewest open requests."""
    sender, opened, tasks, start = Sender(traffic, 0), [0] * len(arms), [], perf_counter()

    async def ask(which: int, body: bytes) -> Outcome:
        try:
            return await one(arms[which].address, body)
        finally:
            opened[which] -= 1

    turn = 0
    for at in arrivals:
        await asyncio.sleep(max(0.0, start + at - perf_counter()))
        which = min(range(len(arms)), key=lambda r: (opened[r], (r - turn) % len(arms)))
        turn, opened[which] = turn + 1, opened[which] + 1
        tasks.append(asyncio.create_task(ask(which, sender.next()[0])))
    return list(await asyncio.gather(*tasks))


def measured(out: list[Outcome], arrivals: np.ndarray) -> dict[str, float]:
    """Latencies and throughput as the clients saw them."""
    good = [o for o in out if o.kind == "ok" and o.first is not None]
    first = [o.first or 0.0 for o in good]
    per = [(o.last - (o.first or 0.0)) / (o.tokens - 1) for o in good if o.tokens > 1]
    span = max(a + o.last for a, o in zip(arrivals, out, strict=True)) - arrivals[0]
    return _row(first, per, sum(o.tokens for o in good) / span)


def _row(first: Any, per: Any, speed: float) -> dict[str, float]:
    out = {f"ttft p{q}": percentile(list(first), q / 100) or 0.0 for q in (50, 95)}
    return out | {f"itl p{q}": percentile(list(per), q / 100) or 0.0 for q in (50, 95)} | {"tokens/s": speed}


def idle_overhead(arms: list[Arm], traffic: Traffic, table: StepTable, sizes: list[int], count: int = 6) -> float:
    """Seconds of HTTP, text and queue per request: lone requests' time to first token, minus that of their prompt step."""
    late = []
    for _ in range(count):
        out = asyncio.run(drive(arms[:1], traffic, np.zeros(1)))[0]
        late.append((out.first or 0.0) - _prompt_seconds(table, sizes[0]))
    return max(0.0, statistics.median(late))


@dataclass(frozen=True, slots=True)
class Serving:
    """Seconds of text and HTTP: of a request, and in a step and for each of its sequences."""

    request: float
    step: float
    sequence: float


def serving(
    arms: list[Arm], traffic: Traffic, table: StepTable, sizes: list[int], loads: list[int], length: int
) -> Serving:
    """Of the servers, which all decode alike meanwhile, so what the client takes from their cores is in it. In a step: a straight
    line through what the pauses between pieces of a stream are longer than the table's steps."""
    more = []
    for load in loads:
        out = [o for _ in range(2) for o in asyncio.run(drive(arms, traffic, np.zeros(load * len(arms))))]
        middle = [g for o in out for g in o.gaps[len(o.gaps) // 4 : 3 * len(o.gaps) // 4]]
        more.append(statistics.median(middle) - table.seconds(load, length, 0))
    sequence = max(0.0, float(np.polyfit(loads, more, 1)[0]))
    step = max(0.0, statistics.mean(more) - sequence * statistics.mean(loads))
    return Serving(idle_overhead(arms, traffic, table, sizes), step, sequence)


def _prompt_seconds(table: StepTable, rows: int, chunk: int = 256) -> float:
    return sum(table.seconds(0, 1, min(chunk, rows - at)) for at in range(0, rows, chunk))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.85])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table-rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=60, help="per load and round")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--length", type=int, default=3)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--cores", type=int, default=1, help="of each replica")
    parser.add_argument("--characters", type=int, default=600, help="of a prompt, its last ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, default=None)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    prompts = [p[-options.characters :] for p in shipped_prompts() if p][:24]
    every, document = sorted(os.sched_getaffinity(0)), {}
    for replicas in options.replicas:
        shares = [[every[(r * options.cores + c) % len(every)] for c in range(options.cores)] for r in range(replicas)]
        arms: list[Arm] = []
        try:
            for cores in shares:
                command = pinned([sys.executable, "-m", "outrider.cli.main", "serve", "--hang-timeout", "3600"], cores)
                command += ["--slots", str(options.slots), "--length", str(options.length), "--fixed-length"]
                command += ["--no-prefix-cache"]  # prompts come again, and the simulation reads all of them
                command += ["--draft", options.draft, "--served-model-name", "pycode"]
                arms.append(Arm("fixed", Start(command, "/ready", "pycode", environment(cores), ours=True)))
                arms[-1].wait()
            document[replicas] = compare(arms, shares, prompts, options)
        finally:
            for arm in arms:
                arm.end()
    if options.write:
        options.write.write_text(json.dumps(document, indent=1, default=float) + "\n", encoding="utf-8")


def compare(
    arms: list[Arm], shares: list[list[int]], prompts: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """All rounds of one number of replicas: prints and returns simulated beside measured."""
    order = random.Random(options.seed)
    rows: dict[float, list[tuple[dict[str, float], ...]]] = {load: [] for load in options.loads}
    traffic = Traffic("pycode", prompts, options.tokens)
    for turn in range(options.rounds):
        for arm in arms:
            arm.pause(True)
        table, sizes = tables(shares, options, prompts, options.seed + 100 * turn)
        for arm in arms:
            arm.pause(False)
        besides = serving(arms, traffic, table, sizes, [1, 2, options.slots], options.length)
        most = capacity(table.served(besides.step, besides.sequence), sizes, options) * len(arms)
        for load in order.sample(options.loads, len(options.loads)):
            rng = np.random.default_rng([options.seed, turn, int(1000 * load)])
            arrivals = np.cumsum(rng.exponential(1.0 / (load * most), options.requests))
            before = sum(sum(arm.phases().values()) for arm in arms)
            out = asyncio.run(drive(arms, traffic, arrivals))
            busy = sum(sum(arm.phases().values()) for arm in arms) - before
            bad = Counter(o.kind for o in out if o.kind != "ok")
            if bad:
                print(f"  load {load:g}, round {turn + 1} is left out: {dict(bad)}", file=sys.stderr)
                continue
            found = Simulation(table, besides, sizes, options, arrivals, len(arms))
            speed = found.speed(busy)
            run = (found.row(), found.row(speed), measured(out, arrivals))
            rows[load].append(run)
            near = ", ".join(f"{k} {run[0][k] / run[2][k]:.2f}, {run[1][k] / run[2][k]:.2f}" for k in run[0])
            print(
                f"  load {load:g}, round {turn + 1}: steps took {speed:.2f} times the table's; {near}", file=sys.stderr
            )
        print(
            f"{len(arms)} replicas, round {turn + 1}: text and HTTP {1e3 * besides.request:.1f} ms a request, "
            f"{1e3 * besides.step:.2f} a step and {1e3 * besides.sequence:.2f} a sequence in it, most {most:.2f} requests/s",
            file=sys.stderr,
        )
    return report(rows, len(arms))


def capacity(table: StepTable, sizes: list[int], options: argparse.Namespace) -> float:
    """Requests per second at which a replica's batch is always full, on average."""
    tokens = 1 + float(np.cumprod(table.acceptance(options.length)).sum())
    decode = options.tokens * table.seconds(options.slots, options.length, 0) / (options.slots * tokens)
    return 1.0 / (decode + float(np.mean([_prompt_seconds(table, n) for n in sizes])))


@dataclass(frozen=True, slots=True)
class Simulation:
    """The arrivals of one run, simulated: with the table's step times, or all of them times a number."""

    table: StepTable
    besides: Serving
    sizes: list[int]
    options: argparse.Namespace
    arrivals: np.ndarray
    replicas: int

    def runs(self, speed: float, count: int) -> list[fleet.Outcome]:
        """`count` simulations with other draws."""
        n, table, length = len(self.arrivals), self.table, self.options.length
        prompts = np.array([self.sizes[i % len(self.sizes)] for i in range(n)])
        besides = self.besides

        def seconds(b: int, d: int, rows: int) -> float:
            return speed * table.seconds(b, d, rows) + (besides.step + besides.sequence * b if b else 0.0)

        replica = fleet.Replica(
            seconds, self.options.slots, [length], table.acceptance(length), jitter=tuple(table.spread),
            overhead=besides.request,
        )  # fmt: skip
        traffic = fleet.Traffic(self.arrivals, prompts, np.full(n, self.options.tokens))
        return [fleet.simulate(traffic, replica, self.replicas, seed=s) for s in range(count)]

    def row(self, speed: float = 1.0) -> dict[str, float]:
        """The median of each number over forty simulations."""
        each = [_row(o.ttft(), o.itl(), o.throughput()) for o in self.runs(speed, 40)]
        return {k: statistics.median(r[k] for r in each) for k in each[0]}

    def speed(self, busy: float) -> float:
        """The number that makes the seconds of the replicas' engines `busy`."""

        def engines(o: fleet.Outcome) -> float:
            return o.busy - self.besides.step * o.steps - self.besides.sequence * float(o.weights.sum())

        def excess(speed: float) -> float:
            return statistics.mean(engines(o) for o in self.runs(speed, 8)) - busy

        if not excess(0.05) < 0 < excess(20.0):
            return 1.0
        return float(brentq(excess, 0.05, 20.0, xtol=0.005))  # pyright: ignore[reportArgumentType]


def report(rows: dict[float, list[tuple[dict[str, float], ...]]], replicas: int) -> dict[str, Any]:
    """Medians over rounds, and how many of the numbers are within 15%."""
    print(
        f"\n{replicas} replica{'s' * (replicas > 1)}: simulated / corrected / measured, and ratios of the first two to the third"
    )
    out: dict[str, Any] = {"rounds": {f"{k:g}": v for k, v in rows.items()}}
    near, count = [0, 0], 0
    for load, found in rows.items():
        cells = []
        for name in found[0][0] if found else ():
            values = [statistics.median(f[i][name] for f in found) for i in range(3)]
            ratios = [statistics.median(f[i][name] / f[2][name] for f in found) for i in range(2)]
            unit = 1.0 if name == "tokens/s" else 1e3
            shown = " / ".join(f"{unit * v:.1f}" for v in values)
            cells.append(f"{name} {shown} ({ratios[0]:.2f}, {ratios[1]:.2f})")
            near, count = [n + (abs(r - 1) <= 0.15) for n, r in zip(near, ratios, strict=True)], count + 1
            out[f"{load:g} {name}"] = (*values, *ratios)
        print(f"  load {load:g}, {len(found)} rounds: " + "   ".join(cells))
    print(f"  within 15%: simulated {near[0]} of {count}, corrected {near[1]} of {count}")
    return out | {"within": near, "of": count}


if __name__ == "__main__":
    main()
