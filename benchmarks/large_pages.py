"""Forwards with weights and cache in pages of 2 MiB beside the same in pages of 4 KiB: the same bits, another time.

    python benchmarks/large_pages.py --pair 160m-0.8 --types bf16,q8_0,q4_k
    python benchmarks/large_pages.py --target FOLDER_OR_FILE --threads 1,2 --cached 64

Two processes (OUTRIDER_LARGE_PAGES=1 and 0), one stopped while the other works. A round asks both for every number of rows in
random order; each answer is the median of --count forwards, and a ratio is formed within a round. Where the system puts a process's
pages is luck, so there are several pairs of processes, one after another.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from gguf_files import pair_files
from peers import pool
from peers.arms import ROOT, Worker
from peers.run import say

LOGS = Path("runs/large_pages")


def files(pair: str, kinds: list[str]) -> dict[str, Path]:
    """The target of a synthetic pair by type; bf16 is a folder, and not converted."""
    blocks = [kind for kind in kinds if kind != "bf16"]
    made = dict(zip(blocks, (target for target, _ in pair_files(pair, blocks)), strict=True))
    folder = Path("runs/synthetic") / pair / "target-bfloat16"
    return {kind: made.get(kind, folder) for kind in kinds}


def measure(target: Path, threads: int, o: argparse.Namespace) -> dict[int, list[tuple[float, float]]]:
    """By number of rows: seconds with large pages and without, of every round of every pair of processes."""
    took: dict[int, list[tuple[float, float]]] = {rows: [] for rows in o.rows}
    load = {"target": str(target.resolve()), "draft": "none", "dtype": "auto", "capacity": 1, "length": o.cached}
    for start in range(o.starts):
        running: dict[str, pool.Running] = {}
        try:
            for setting in "10":
                env = {"PYTHONPATH": str(ROOT / "src"), "OUTRIDER_LARGE_PAGES": setting}
                worker = Worker(f"pages-{setting}", "worker_rows_ours.py", Path(sys.executable), "torch", {}, env)
                running[setting] = pool.start(worker, load, threads, LOGS / "logs")
            for turn in range(-1, o.rounds):
                asked = [(rows, setting) for rows in o.rows for setting in "10"]
                random.Random(f"{start} {turn}").shuffle(asked)
                found = {(rows, setting): _ask(running[setting], rows, o.count) for rows, setting in asked}
                for rows in o.rows if turn >= 0 else ():
                    took[rows].append((found[rows, "1"], found[rows, "0"]))
        finally:
            for worker in running.values():
                with suppress(pool.WorkerError):
                    pool.end(worker)
    return took


def _ask(worker: pool.Running, rows: int, count: int) -> float:
    command: dict[str, Any] = {"prompts": [], "tokens": 0, "temperature": 0.0, "seed": 0}
    timed, warm = ({**command, "setting": {"part": "target", "rows": rows, "count": n}} for n in (count, 3))
    return pool.ask(worker, timed, warm)["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--pair", default="160m-0.8", help="a synthetic pair, size-acceptance")
    parser.add_argument("--types", default="bf16,q8_0,q4_k", help="of its target")
    parser.add_argument("--target", type=Path, help="a folder or file instead")
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=numbers, default=[len(os.sched_getaffinity(0))])
    parser.add_argument("--cached", type=int, default=64, help="tokens before the rows")
    parser.add_argument("--starts", type=int, default=3, help="pairs of processes")
    parser.add_argument("--rounds", type=int, default=4, help="with each")
    parser.add_argument("--count", type=int, default=12, help="forwards of an answer")
    o = parser.parse_args()
    targets = {o.target.name: o.target} if o.target else files(o.pair, o.types.split(","))
    say("time with pages of 2 MiB over the time with pages of 4 KiB, median (least to most) of the rounds")
    for name, target in targets.items():
        for threads in o.threads:
            told = []
            for rows, times in measure(target, threads, o).items():
                ratios = sorted(large / small for large, small in times)
                spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                told.append(f"{rows} rows {1e3 * statistics.median(t for t, _ in times):.2f} ms, {spread}")
            print(f"{name}, {threads} threads: {'; '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
