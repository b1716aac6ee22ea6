"""Did this commit make anything slower? This checkout beside an earlier one, in turn, in one run.

    git worktree add ../before COMMIT
    python benchmarks/before.py ../before    # the shipped pair: plain, chain, tree; 1 and 8 prompts together

One process per checkout and batch size. A round gives both the same prompts and seeds, in random order; ratios of tokens per
second are formed within a round and reported as their median with a bootstrap interval over rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

from peers import pool
from peers.arms import ROOT, Worker
from peers.run import say
from peers.stats import ratio, speeds, table

from outrider.assets import shipped, shipped_prompts

OUT = Path("runs/before")
USERS = {"OMP_NUM_THREADS": "", "OMP_PROC_BIND": "", "OMP_PLACES": ""}
"""A user sets none of these."""
DRAFTS = {"plain": "none", "chain of 3": str(shipped("draft")), "tree 2x2x1": f"tree:2x2x1:{shipped('draft')}"}
WARM = 16


def start(name: str, root: Path, draft: str, batch: int) -> pool.Running:
    """A process of a checkout with one engine, told nothing that a user would not say."""
    worker = Worker(
        name,
        "worker_ours.py",
        Path(sys.executable),
        "torch",
        {"lengths": [0, 3]},
        {"PYTHONPATH": str(root / "src"), **USERS},
    )
    load = {"target": str(shipped("target")), "draft": draft, "dtype": "bfloat16", "capacity": batch, "length": 1024}
    return pool.start(worker, load, len(os.sched_getaffinity(0)), OUT / "logs")


def tokens_of(texts: list[str]) -> list[list[int]]:
    """Prompts of the shipped pair as tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shipped("target") / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in texts]


def measure(before: Path, kind: str, batch: int, rounds: int, tokens: int) -> list[str]:
    """One row: median speeds of both checkouts and their ratio."""
    checkouts = {"now": ROOT, "before": before}
    running = {name: start(f"{name}-{kind}-{batch}", root, DRAFTS[kind], batch) for name, root in checkouts.items()}
    prompts, order = tokens_of(shipped_prompts()), random.Random(f"{kind} {batch}")
    command_of = lambda turn: {  # noqa: E731
        "prompts": [prompts[(turn * batch + i) % len(prompts)] for i in range(batch)],
        "temperature": 1.0,
        "seed": order.randrange(2**31),
        "setting": {"length": 0 if kind == "plain" else 3},
        "tokens": tokens,
    }
    samples = pool.in_turn(running, rounds, order, command_of, {"tokens": WARM})
    speed = {name: speeds(found) for name, found in samples.items()}
    got = ratio({"now": speed["now"]}, {"before": speed["before"]})
    assert got is not None
    medians = [f"{sorted(speed[name])[rounds // 2]:.0f}" for name in ("before", "now")]
    return [kind, str(batch), *medians, f"{got.value:.3f} ({got.low:.3f} to {got.high:.3f})", str(rounds)]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a sample")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts decoded together")
    options = parser.parse_args()
    rows = []
    for batch in options.batch:
        for kind in DRAFTS:
            rows.append(measure(options.before.resolve(), kind, batch, options.rounds, options.tokens))
            say("  ".join(rows[-1]))
    print(table(["draft", "prompts together", "tokens/s before", "now", "now / before (95%)", "rounds"], rows))


if __name__ == "__main__":
    main()
