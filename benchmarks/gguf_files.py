"""GGUF files in Outrider beside llama.cpp: plain and with a draft model, and prompts of 512 tokens, interleaved in one run.

    python benchmarks/peers.py install llama-native   llama.cpp's server compiled for this machine, in .venvs/llama-native
    python benchmarks/peers.py install xllama         the same from a wheel, in .venvs/xllama
    python benchmarks/gguf_files.py --pair 160m-0.8 --types q8_0,q4_k --minutes 20
    python benchmarks/gguf_files.py --target big.gguf --draft small.gguf --minutes 10
    python benchmarks/peers.py table runs/gguf/*.json --write docs/peers.md

`--pair` builds a synthetic pair of that size and acceptance (benchmarks/synthetic.py) and writes it as GGUF files, one per type. A
process per engine setting, stopped while another one works. A round gives all settings the same random tokens, in random order; a
ratio is the median over rounds of the speeds' ratio within a round, with its bootstrap interval, and where settings compete the one
for a round is chosen on the other rounds. Each round is kept in runs/gguf/NAME.json: the same command again goes on where it was
stopped. `--cpu-time`: ratios of processor time instead of the clock, for a machine that others use (with --threads 1; threads that
wait for others spin, and that counts).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peers.arms import PLAIN, VENVS
from peers.gguf_arms import LONG, arms, section
from peers.run import Bench, Scenario, Workload, machine, say, write_json

OUT = Path("runs/gguf")
LENGTH = 1024
PROMPT = (LONG, 1)
"""Tokens of a long prompt and new ones."""


def pair_files(name: str, kinds: list[str]) -> list[tuple[Path, Path]]:
    """Target and draft of a synthetic pair as GGUF files, by type; made if they are not there."""
    import synthetic  # torch and transformers are slow to import

    size, _, acceptance = name.partition("-")
    if size not in synthetic.SIZES or not acceptance:
        raise SystemExit(f"--pair {name}: write size-acceptance, such as 160m-0.8; sizes: {', '.join(synthetic.SIZES)}")
    folder = synthetic.build(size, synthetic.SIZES[size], float(acceptance))
    made = []
    for kind in kinds:
        both = []
        for role in ("target", "draft"):
            file = folder / f"{role}-{kind}.gguf"
            if not file.exists():
                convert = [sys.executable, "-m", "outrider", "convert", folder / f"{role}-bfloat16", file]
                subprocess.run([*convert, "--type", kind], check=True)
            both.append(file)
        made.append((both[0], both[1]))
    return made


def measure(
    name: str, target: Path, draft: Path | None, vocab: int, seconds: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Rounds until the time is up, at least one, behind those that an earlier run kept. The record, which is on the disk too."""
    scenarios = [Scenario(1, t) for t in options.temperature] + [Scenario(1, 0.0, PROMPT, (PLAIN,))]
    checkpoint = target.parent / "target-bfloat16" if options.pair else None
    wanted = arms(options.lengths, max(options.temperature) > 0, draft is not None, options.llama, checkpoint)
    bench = Bench(wanted, scenarios, Workload(options.prompt, options.tokens, vocab, 0))
    for scenario in scenarios:  # at temperature 0 drafts that are drawn are those that are not
        for arm in wanted if scenario.temperature == 0 else ():
            if arm.worker.options.get("sampled"):
                bench.samples[scenario.name].pop(arm.name, None)
    cores = sorted(os.sched_getaffinity(0))
    files = {file.name: file.stat().st_size for file in (target, draft) if file is not None}
    setting = {"files": files, "threads": options.threads, "prompt": options.prompt, "tokens": options.tokens,
               "arms": [a.name for a in wanted], "scenarios": [s.name for s in scenarios]}  # fmt: skip
    kind = re.search(r"i?q\d_\w|mxfp4|bf16|f16", name.lower())
    about = {"kind": "gguf", "name": name, "type": kind[0] if kind else "", "command": shlex.join(["python", *sys.argv]),
             "clock": "cpu" if options.cpu_time else "seconds", "setting": setting, "machine": machine(cores),
             "date": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    out = OUT / f"{name}.json"
    earlier = json.loads(out.read_text()) if out.exists() and not options.afresh else {}
    if earlier.get("setting") == setting:
        bench.resume(earlier)
        say(f"{name}: going on behind round {bench.rounds}")
    load = {"target": str(target.resolve()), "draft": "none" if draft is None else str(draft.resolve()), "dtype": "auto",
            "capacity": 1, "length": LENGTH}  # fmt: skip
    deadline, longest = time.monotonic() + seconds, 0.0
    try:
        bench.start(load, options.threads, OUT / "logs" / name, 600)
        if bench.failed or bench.absent:
            raise SystemExit(f"{name}: {bench.failed or bench.absent}")
        turns = iter([-1, *range(bench.rounds, options.rounds)])
        for done, turn in enumerate(turns):
            if done > 1 and time.monotonic() + longest > deadline:
                break
            start = time.monotonic()
            kept = bench.rounds
            bench.round(turn)
            bench.rounds = max(bench.rounds, kept)
            longest = max(longest, time.monotonic() - start) if turn >= 0 else 0.0
            say(f"{name}: round {turn + 1} took {time.monotonic() - start:.0f} s" if turn >= 0 else f"{name}: warm")
            write_json(out, about | bench.record())
    finally:
        bench.end()
    return about | bench.record()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, action="append", default=[], help="a GGUF file, repeatable")
    parser.add_argument(
        "--draft", type=Path, action="append", default=[], help="its draft, repeatable, in the same order"
    )
    parser.add_argument("--pair", help="instead: a synthetic pair, size-acceptance")
    parser.add_argument("--types", default="q8_0,q4_k", help="with --pair: types of its files")
    parser.add_argument(
        "--llama", type=Path, default=VENVS / "xllama" / "bin" / "python", help="a Python with xllamacpp"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=20.0, help="for all files together, after they are made")
    parser.add_argument("--rounds", type=int, default=1000, help="at most, for each file, with those of earlier runs")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="draft lengths, of both engines"
    )
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument("--cpu-time", action="store_true", help="ratios of processor time, with --threads 1")
    parser.add_argument("--afresh", action="store_true", help="forget the rounds of earlier runs")
    options = parser.parse_args()
    if bool(options.target) == bool(options.pair) or len(options.draft) not in (0, len(options.target)):
        parser.error("give --pair, or --target with no --draft or one for each of them")
    if options.cpu_time and options.threads != 1:
        parser.error("threads that wait for each other spin: processor time is fair with --threads 1")
    return options


def main() -> None:
    """Measure every file and print its tables."""
    options = parse()
    vocab = 2000  # of random prompts: every vocabulary has so many tokens that are no marks
    if options.pair:
        files = pair_files(options.pair, options.types.split(","))
        names = [f"{options.pair}-{kind}" for kind in options.types.split(",")]
        vocab = min(vocab, json.loads((files[0][0].parent / "measured.json").read_text())["recipe"]["size"]["vocab"])
    else:
        files = list(zip(options.target, options.draft or [None] * len(options.target), strict=True))
        names = [target.stem for target in options.target]
    for name, (target, draft) in zip(names, files, strict=True):
        found = measure(name, target, draft, vocab, 60 * options.minutes / len(files), options)
        print(section(found), flush=True)


if __name__ == "__main__":
    main()
