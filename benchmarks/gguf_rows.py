"""The time of one to eight rows of a GGUF file in Outrider and in llama.cpp: what a step of speculative decoding verifies.

    python benchmarks/peers.py install llama          llama.cpp, compiled for this machine, in .venvs/llama
    python benchmarks/gguf_rows.py --pair 160m-0.8 --types q8_0,q6_k,q5_k,q4_k,q4_0 --minutes 8
    python benchmarks/peers.py table runs/gguf/*.json --write docs/peers.md

A forward of rows of one sequence behind 64 cached tokens, with the logits of all rows; llama.cpp with weights rearranged at load
and as they are stored. A round asks every engine for every number of rows, in random order, with a process per engine that is
stopped while another works; each answer is the median of --count forwards, and a ratio is formed within a round. The draft's own
forward is timed too. Each round is kept in runs/gguf/NAME-rows.json.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gguf_files import OUT, pair_files
from peers import pool
from peers.arms import ROOT, VENVS, Worker
from peers.rows import PARTS, ROWS, section
from peers.run import machine, say, write_json

CACHED = 64


def workers() -> dict[str, Worker]:
    """One of ours, and llama.cpp with both layouts of weights."""
    llama = VENVS / "llama" / "bin" / "python"
    env = {"PYTHONPATH": str(ROOT / "src")}
    return {
        "ours": Worker("rows-ours", "worker_rows_ours.py", Path(sys.executable), "torch", {}, env),
        "llama.cpp": Worker("rows-llama", "worker_rows_llama.py", llama, "llama-cpp-python"),
        "llama.cpp, as stored": Worker(
            "rows-llama-stored", "worker_rows_llama.py", llama, "llama-cpp-python", {"repack": False}
        ),
    }


def measure(name: str, target: Path, draft: Path, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds until the time is up, at least one."""
    load = {
        "target": str(target.resolve()),
        "draft": str(draft.resolve()),
        "dtype": "auto",
        "capacity": 1,
        "length": CACHED,
    }
    running: dict[str, pool.Running] = {}
    asked = [
        (engine, part, rows) for engine in workers() for part in PARTS for rows in ROWS if part == "target" or rows == 1
    ]
    samples: dict[str, list[float]] = {f"{engine} {part} {rows}": [] for engine, part, rows in asked}
    deadline = time.monotonic() + seconds
    found: dict[str, Any] = {
        "kind": "rows", "name": name, "command": shlex.join(["python", *sys.argv]), "threads": options.threads,
        "machine": machine(sorted(os.sched_getaffinity(0))), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "megabytes": target.stat().st_size / 1e6, "samples": samples,
    }  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        for engine, worker in workers().items():
            if pool.installed(worker) is None:
                raise SystemExit(f"{worker.needs} is not installed: python benchmarks/peers.py install llama")
            running[engine] = pool.start(worker, load, options.threads, OUT / "logs" / f"{name}-rows")
        found["versions"] = {k: v for worker in running.values() for k, v in worker.versions.items()}
        for turn in range(-1, options.rounds):
            start = time.monotonic()
            for engine, part, rows in random.Random(turn).sample(asked, len(asked)):
                command = {"prompts": [], "tokens": 0, "temperature": 0.0, "seed": 0}
                warm, timed = (
                    {**command, "setting": {"part": part, "rows": rows, "count": n}} for n in (3, options.count)
                )
                took = pool.ask(running[engine], timed, warm)["seconds"]
                if turn >= 0:
                    samples[f"{engine} {part} {rows}"].append(took)
            say(f"{name}: round {turn + 1} took {time.monotonic() - start:.1f} s")
            write_json(OUT / f"{name}-rows.json", found)
            if turn >= 0 and 2 * time.monotonic() - start > deadline:
                break
    finally:
        for worker in running.values():
            with suppress(pool.WorkerError):
                pool.end(worker)
    return found


def main() -> None:
    """Measure every file and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="160m-0.8", help="a synthetic pair, size-acceptance")
    parser.add_argument("--types", default="q8_0,q6_k,q5_k,q4_k,q4_0", help="of its files")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all files together")
    parser.add_argument("--rounds", type=int, default=1000, help="at most, for each file")
    parser.add_argument("--count", type=int, default=12, help="forwards of an answer")
    options = parser.parse_args()
    kinds = options.types.split(",")
    for kind, (target, draft) in zip(kinds, pair_files(options.pair, kinds), strict=True):
        found = measure(f"{options.pair}-{kind}", target, draft, 60 * options.minutes / len(kinds), options)
        print(section([found]), flush=True)


if __name__ == "__main__":
    main()
