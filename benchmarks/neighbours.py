"""How much speed do busy neighbours take? Outrider and its peers beside processes that spin.

    python benchmarks/neighbours.py run --pair shipped --minutes 4 [--before ../checkout] [--peers]
    python benchmarks/neighbours.py table runs/neighbours/*.json

`run` starts one process per arm and measures them in turn, in random order, beside 0, 1 and 2 neighbours that it starts and
stops itself. Arms of ours: what a user gets, and one thread; of an earlier commit's checkout: one thread and all threads, bound
to cores (if that was its default) and not. A sample is taken again, and in the end left out, if others computed meanwhile. Every
call adds its rounds to the pair's file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from peers import keeper, pool
from peers.arms import ROOT, VENVS, Arm, Worker
from peers.run import machine, say, write_json
from peers.stats import Speeds, describe_machine, ratio, speeds, table

OUT = Path("runs/neighbours")
NEIGHBOURS = (0, 1, 2)
WARM = 16
DISTURBED = 0.1
PLAIN, SPECULATIVE = "plain", "speculative"
USERS = {"OMP_NUM_THREADS": "", "OMP_PROC_BIND": "", "OMP_PLACES": ""}  # a user sets none of these
FREE = {"OMP_PROC_BIND": "false", "OMP_PLACES": ""}
Samples = dict[str, dict[str, list[dict[str, float] | None]]]


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that never sleep."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2 if count else 0.0)  # until they spin
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def core_seconds(pids: Sequence[int] | None = None) -> float:
    """What processes and everything they started have computed so far, in seconds of a core; None: everyone."""
    if pids is None:
        ticks = sum(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4]))
    else:
        family = {member for pid in pids for member in keeper.descendants(pid)}
        ticks = sum(int(t) for pid in family for t in keeper.stat_of(pid)[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def arms(length: int, before: Path | None, peers: bool) -> list[tuple[Arm, bool]]:
    """Every arm, and whether it has one thread."""
    made: list[tuple[Arm, bool]] = []

    def add(name: str, worker: Worker, one: bool, settings: Mapping[str, dict[str, Any]]) -> None:
        engine = name.split(",", maxsplit=1)[0]
        made.extend((Arm(f"{name}, {kind}", engine, kind, worker, setting), one) for kind, setting in settings.items())

    lengths = {PLAIN: {"length": 0}, SPECULATIVE: {"length": length}}
    fixed = {"one thread": FREE, "all threads": FREE, "all threads bound": {}}
    for engine, root, settings in (
        ("ours", ROOT, {"default": USERS, "one thread": FREE}),
        ("before", before, fixed),
    ):
        if root is None:
            continue
        for how, env in settings.items():
            name = f"{engine}, {how}"
            path = {"PYTHONPATH": str(root / "src")}
            worker = Worker(name, "worker_ours.py", Path(sys.executable), "torch", {"lengths": [0, length]}, path | env)
            add(name, worker, how == "one thread", lengths)
    if peers:
        assistant = {PLAIN: {"assistant_tokens": 0}, SPECULATIVE: {"assistant_tokens": 3}}
        for how in ("all threads", "one thread"):
            name, python = f"transformers, {how}", Path(sys.executable)
            add(name, Worker(name, "worker_transformers.py", python, "transformers", {}, FREE), "one" in how, assistant)
            name, python = f"llama.cpp, {how}", VENVS / "llama" / "bin" / "python"
            worker = Worker(name, "worker_llama.py", python, "llama-cpp-python", {}, FREE)
            add(name, worker, "one" in how, {PLAIN: {}})
    return made


def shipped_texts() -> list[list[int]]:
    """Held-out prompts of the shipped pair as tokens."""
    from tokenizers import Tokenizer

    from outrider.assets import shipped, shipped_prompts

    tokenizer = Tokenizer.from_file(str(shipped("target") / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in shipped_prompts()]


def load_of(pair: str) -> tuple[dict[str, Any], list[list[int]]]:
    """What a worker is told to load, and the prompts."""
    if pair == "shipped":
        from outrider.assets import shipped

        parts, prompts = {part: str(OUT / "pair" / part) for part in ("target", "draft")}, shipped_texts()
        for part, folder in parts.items():  # copied: llama.cpp's file is written beside it
            shutil.copytree(shipped(part), folder, dirs_exist_ok=True)
    else:
        folder = Path("runs/synthetic") / pair
        size = json.loads((folder / "measured.json").read_text())["recipe"]["size"]
        draw = random.Random(pair)
        prompts = [[draw.randrange(size["vocab"]) for _ in range(64)] for _ in range(16)]
        parts = {part: str(folder / f"{part}-bfloat16") for part in ("target", "draft")}
    return {**parts, "dtype": "bfloat16", "capacity": 1}, prompts


class Bench:
    """Started workers and the samples by number of neighbours and arm."""

    def __init__(
        self, wanted: Sequence[tuple[Arm, bool]], load: dict[str, Any], prompts: Sequence[list[int]], tokens: int
    ):
        self.prompts, self.tokens = prompts, tokens
        self.load = load | {"length": tokens + max(map(len, prompts)) + 16}
        self.running: dict[str, pool.Running] = {}
        self.arms: list[Arm] = []
        for arm, one in wanted:
            if self._start(arm.worker, 1 if one else len(os.sched_getaffinity(0))):
                self.arms.append(arm)
        self.samples: Samples = {str(n): {arm.name: [] for arm in self.arms} for n in NEIGHBOURS}

    def _start(self, worker: Worker, threads: int) -> bool:
        if worker.name in self.running:
            return True
        if pool.installed(worker) is None:
            say(f"{worker.name}: {worker.needs} is not installed")
            return False
        self.running[worker.name] = pool.start(worker, self.load, threads, OUT / "logs")
        return True

    def round(self, turn: int, order: random.Random) -> None:
        """Every arm once beside every number of neighbours. Turn -1 warms up alone and keeps nothing."""
        prompt, seed = self.prompts[turn % len(self.prompts)], order.randrange(2**31)
        for count in order.sample(NEIGHBOURS, len(NEIGHBOURS)) if turn >= 0 else (0,):
            with busy(count):
                for arm in order.sample(self.arms, len(self.arms)):
                    command = {"prompts": [prompt], "temperature": 1.0, "seed": seed, "setting": arm.setting}
                    found = self._ask(arm, command)
                    if turn >= 0:
                        self.samples[str(count)][arm.name].append(found)

    def _ask(self, arm: Arm, command: dict[str, Any], tries: int = 4) -> dict[str, Any] | None:
        """A sample, or None if every time others than the neighbours took more than DISTURBED of a core meanwhile."""
        running = self.running[arm.worker.name]
        ours = [os.getpid()]  # with its workers and neighbours
        for _ in range(tries):
            start, before = time.monotonic(), core_seconds() - core_seconds(ours)
            found = pool.ask(running, command | {"tokens": self.tokens}, command | {"tokens": WARM})
            others = core_seconds() - core_seconds(ours) - before
            if others <= DISTURBED * (time.monotonic() - start):
                return found
        return None

    def end(self) -> None:
        """End every worker."""
        for running in self.running.values():
            with suppress(pool.WorkerError):
                pool.end(running)


def run(options: argparse.Namespace) -> None:
    """Rounds until the time is up; what was measured is added to the file after each."""
    deadline = time.monotonic() + 60 * options.minutes
    load, prompts = load_of(options.pair)
    out = OUT / f"{options.pair}{'-peers' if options.peers else ''}.json"
    kept = json.loads(out.read_text()) if out.exists() else {"samples": {}}
    bench = Bench(arms(options.length, options.before, options.peers), load, prompts, options.tokens)
    about = {
        "pair": options.pair,
        "tokens": options.tokens,
        "length": options.length,
        "machine": machine(sorted(os.sched_getaffinity(0))),
        "versions": {name: r.versions for name, r in bench.running.items()},
    }
    done = max((len(rounds) for rounds in kept["samples"].get("0", {}).values()), default=0)
    order, longest, turn = random.Random(f"{options.pair} {done}"), 0.0, -1
    try:
        while turn < 1 or time.monotonic() + longest < deadline:
            start = time.monotonic()
            bench.round(turn if turn < 0 else done + turn, order)
            turn += 1
            longest = max(longest, time.monotonic() - start)
            say(f"{options.pair}: round {done + turn} took {time.monotonic() - start:.0f} s")
            write_json(out, about | {"samples": joined(kept["samples"], bench.samples)})
    finally:
        bench.end()
    print(out)


def joined(first: Samples, second: Samples) -> Samples:
    """Rounds of one call behind those of an earlier one; arms that took no part there are missing from it."""
    out: Samples = {}
    for count, found in second.items():
        old = first.get(count, {})
        rounds = max(map(len, old.values()), default=0)
        out[count] = {
            name: [*old.get(name, []), *[None] * (rounds - len(old.get(name, []))), *found.get(name, [None] * added)]
            for added in [max(map(len, found.values()), default=0)]
            for name in {**old, **found}
        }
    return out


def report(files: Sequence[Path]) -> str:
    """Speeds by number of neighbours, and the ratios the defaults are judged by."""
    parts = []
    for file in files:
        kept = json.loads(file.read_text())
        by_count = {count: {name: speeds(s) for name, s in found.items()} for count, found in kept["samples"].items()}
        head = ["tokens/s (rounds)", *(f"{count} busy" for count in by_count)]
        names = list(next(iter(by_count.values())))
        rows = [[name, *(_speed(found[name]) for found in by_count.values())] for name in names]
        parts += [f"**{kept['pair']}**: {kept['tokens']} tokens, drafts of {kept['length']}", "", table(head, rows), ""]
        rows = [row for kind in (PLAIN, SPECULATIVE) for row in _ratios(by_count, kind)]
        parts += [table(["ratio (95% interval)", *head[1:]], rows), "", describe_machine(kept["machine"]), ""]
    return "\n".join(parts)


def _speed(values: np.ndarray) -> str:
    values = values[~np.isnan(values)]
    return f"{np.median(values):.0f} ({len(values)})" if len(values) else ""


def measured(values: np.ndarray | None) -> bool:
    """Whether there are rounds enough for an interval."""
    return values is not None and int((~np.isnan(values)).sum()) > 1


def _ratios(by_count: Mapping[str, Speeds], kind: str) -> list[list[str]]:
    """The default over the best fixed choice of each engine, and over the default before."""
    ours, rows = f"ours, default, {kind}", []
    compared = {
        "ours / one thread": ("ours, one",),
        "ours / the better of one and all threads before": ("before,",),
        "ours / all threads before": ("before, all threads,",),
        "ours / all threads bound before": ("before, all threads bound",),
        "ours / the better of transformers": ("transformers",),
        "ours / the better of llama.cpp": ("llama.cpp",),
    }
    for title, starts in compared.items():
        row = [f"{title}, {kind}"]
        for found in by_count.values():
            others = {n: v for n, v in found.items() if n.endswith(kind) and n.startswith(starts) and measured(v)}
            got = ratio({ours: found[ours]}, others) if others and measured(found.get(ours)) else None
            row.append(f"{got.value:.2f} ({got.low:.2f} to {got.high:.2f})" if got else "")
        if any(row[1:]):
            rows.append(row)
    return rows


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="measure")
    measure.add_argument("--pair", default="shipped", help="shipped, or a pair of synthetic.py such as 160m-0.8")
    measure.add_argument("--minutes", type=float, default=4.0)
    measure.add_argument("--tokens", type=int, default=128, help="new tokens of a sample")
    measure.add_argument("--length", type=int, default=3, help="draft length")
    measure.add_argument("--before", type=Path, help="a checkout of an earlier commit, to measure beside this one")
    measure.add_argument("--peers", action="store_true", help="beside transformers and llama.cpp")
    written = commands.add_parser("table", help="result files as Markdown")
    written.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    print(report(options.files)) if options.command == "table" else run(options)


if __name__ == "__main__":
    main()
