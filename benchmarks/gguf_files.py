"""GGUF files in Outrider beside llama.cpp: plain greedy decoding, and prompts of 512 tokens, interleaved.

    python -m venv .venvs/xllama && .venvs/xllama/bin/pip install xllamacpp
    python benchmarks/gguf_files.py model-q8_0.gguf model-q4_k.gguf --threads 2

One process per engine and file, stopped while the other one works. A round gives both the same random tokens, in random order; a
ratio is the median over rounds of their speeds' ratio within a round, with its bootstrap interval.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

from peers import pool
from peers.arms import ROOT, VENVS, Worker
from peers.run import say
from peers.stats import ratio, speeds, table

OUT = Path("runs/gguf")
LENGTH = 1024
KINDS = {"decoding": (8, 64), "a prompt of 512": (512, 1)}
"""Name -> tokens of the prompt, new tokens."""


def measure(file: Path, kind: str, llama: Path, threads: int, rounds: int) -> list[str]:
    """One row: median seconds of both engines and the ratio of their speeds."""
    (prompt, tokens), order = KINDS[kind], random.Random(f"{file.name} {kind}")
    env = {"PYTHONPATH": str(ROOT / "src")}
    workers = {
        "ours": Worker("ours", "worker_ours.py", Path(sys.executable), "torch", {"lengths": [0]}, env),
        "llama.cpp": Worker("llama.cpp", "worker_xllama.py", llama, "xllamacpp"),
    }
    load = {"target": str(file), "draft": "none", "dtype": "auto", "capacity": 1, "length": LENGTH}
    running = {name: pool.start(worker, load, threads, OUT / "logs") for name, worker in workers.items()}
    command_of = lambda _: {  # noqa: E731
        "prompts": [[order.randrange(10, 2000) for _ in range(prompt)]],
        "temperature": 0.0,
        "seed": 0,
        "setting": {"length": 0},
        "tokens": tokens,
    }
    samples = pool.in_turn(running, rounds, order, command_of, {"tokens": 1})
    speed = {name: speeds(found) for name, found in samples.items()}
    got = ratio({"ours": speed["ours"]}, {"llama.cpp": speed["llama.cpp"]})
    assert got is not None
    medians = [f"{sorted(speed[name])[rounds // 2]:.1f}" for name in ("ours", "llama.cpp")]
    return [file.name, kind, *medians, f"{got.value:.2f} ({got.low:.2f} to {got.high:.2f})", str(rounds)]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="+")
    parser.add_argument(
        "--llama", type=Path, default=VENVS / "xllama" / "bin" / "python", help="a Python with xllamacpp"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    rows = []
    for file in options.file:
        for kind in KINDS:
            rows.append(measure(file.resolve(), kind, options.llama, options.threads, options.rounds))
            say("  ".join(rows[-1]))
    print(table(["file", "what", "ours, new tokens/s", "llama.cpp", "ours / llama.cpp (95%)", "rounds"], rows))


if __name__ == "__main__":
    main()
