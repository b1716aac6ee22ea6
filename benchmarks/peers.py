"""Outrider beside its peers, on the same checkpoints, prompts and dtype, interleaved in one run.

    python benchmarks/peers.py install vllm            an environment of its own, .venvs/vllm
    python benchmarks/peers.py install llama           another one; compiles llama.cpp
    python benchmarks/peers.py install llama-native    its server, compiled for this machine, for gguf_files.py
    python benchmarks/peers.py run --pair 160m-0.8 --minutes 12
    python benchmarks/peers.py table runs/peers/*.json runs/gguf/*.json --write docs/peers.md

`run` builds the pair if it is not there, starts one process per engine setting that cannot share one, and repeats
rounds until the time is up. A round runs every arm once in random order, with fresh prompts that all arms share. A peer
that is not installed is reported as absent.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from peers.arms import ENGINES
from peers.install import COMPILED, STEPS, install
from peers.report import write_report
from peers.run import run

OUT = Path("runs/peers")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Outrider beside its peers")
    commands = parser.add_subparsers(dest="command", required=True)
    environment = commands.add_parser("install", help="make the environment of a peer")
    environment.add_argument("peer", choices=sorted((*STEPS, *COMPILED)))
    measure = commands.add_parser("run", help="measure")
    measure.add_argument("--pair", action="append", help="size-acceptance, repeatable; default 160m-0.8")
    measure.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    measure.add_argument("--minutes", type=float, default=12.0, help="for everything, starting the engines included")
    measure.add_argument("--rounds", type=int, default=1000, help="at most; at least one is run")
    measure.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    measure.add_argument("--lengths", type=int, nargs="+", default=[2, 3, 4, 6], help="draft lengths of ours")
    measure.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    measure.add_argument("--temperature", type=float, nargs="+", default=[1.0], help="0 is greedy")
    measure.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    measure.add_argument("--tokens", type=int, default=96, help="new tokens")
    measure.add_argument("--seed", type=int, default=0)
    measure.add_argument("--patience", type=float, default=300.0, help="seconds an engine may take to load")
    measure.add_argument("--out", type=Path, default=OUT)
    report = commands.add_parser("table", help="result files as Markdown")
    report.add_argument("files", type=Path, nargs="+")
    report.add_argument("--write", type=Path, help="put the sections into this file instead of printing")
    return parser.parse_args()


def main() -> None:
    """Run one command."""
    options = parse()
    if options.command == "install":
        install(options.peer)
    elif options.command == "table":
        write_report(options.files, options.write)
    else:
        options.pair = options.pair or ["160m-0.8"]
        options.end = time.monotonic() + 60 * options.minutes
        run(options)


if __name__ == "__main__":
    main()
