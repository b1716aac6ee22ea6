"""Did this commit make anything slower? This checkout beside an earlier one, in turn, in one run.

    git worktree add ../before COMMIT
    python benchmarks/before.py ../before    # the shipped pair: plain, chain, tree; 1 and 8 prompts together
    python benchmarks/before.py ../before --only "EAGLE, 4" --temperature 0 1 --batch 1

A round gives both the same prompts and seeds, in random order; ratios of tokens per second are formed within a round, and their
median is one start's. Both are started anew `--starts` times: processes of one and the same checkout differ by more than rounds do
(forwards of a small model by a fifth and more), so what one pair of processes says is no difference of checkouts. The median of the
starts is reported with the least and the greatest of them. Which of the two starts first is drawn.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from itertools import product
from pathlib import Path
from statistics import median

from peers import pool
from peers.arms import ROOT, Worker
from peers.run import say
from peers.stats import Speeds, ratio, speeds, table

from outrider.assets import shipped, shipped_prompts

OUT = Path("runs/before")
USERS = {"OMP_NUM_THREADS": "", "OMP_PROC_BIND": "", "OMP_PLACES": ""}
"""A user sets none of these."""
DRAFTS = {"plain": ("none", 0), "chain of 3": (str(shipped("draft")), 3), "tree 2x2x1": (f"tree:2x2x1:{shipped('draft')}", 3),
          "chain of 5": (str(shipped("draft")), 5), "EAGLE, 4": (str(shipped("eagle")), 4)}  # fmt: skip
USUAL = ("plain", "chain of 3", "tree 2x2x1")
WARM = 16


def start(name: str, root: Path, kind: str, batch: int) -> pool.Running:
    """A process of a checkout with one engine, told nothing that a user would not say."""
    draft, length = DRAFTS[kind]
    worker = Worker(
        name,
        "worker_ours.py",
        Path(sys.executable),
        "torch",
        {"lengths": [0, length]},
        {"PYTHONPATH": str(root / "src"), **USERS},
    )
    load = {"target": str(shipped("target")), "draft": draft, "dtype": "bfloat16", "capacity": batch, "length": 1024}
    return pool.start(worker, load, len(os.sched_getaffinity(0)), OUT / "logs")


def tokens_of(texts: list[str]) -> list[list[int]]:
    """Prompts of the shipped pair as tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shipped("target") / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in texts]


def measure(
    before: Path, kind: str, temperature: float, batch: int, rounds: int, tokens: int, starts: int
) -> list[str]:
    """One row: median speeds of both checkouts and their ratio."""
    order = random.Random(f"{kind} {batch}")
    found = [once(before, kind, temperature, batch, rounds, tokens, order) for _ in range(starts)]
    speed = {name: median(x for one in found for x in one[name]) for name in ("before", "now")}
    ratios = [got.value for one in found if (got := ratio({"now": one["now"]}, {"before": one["before"]})) is not None]
    spread = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    return [
        kind,
        f"{temperature:g}",
        str(batch),
        f"{speed['before']:.0f}",
        f"{speed['now']:.0f}",
        spread,
        f"{starts} x {rounds}",
    ]


def once(
    before: Path, kind: str, temperature: float, batch: int, rounds: int, tokens: int, order: random.Random
) -> Speeds:
    """Speeds by round of both checkouts, started anew."""
    checkouts = [("now", ROOT), ("before", before)]
    # of two processes of one checkout the one that started first was the slower one in most starts
    order.shuffle(checkouts)
    running = {name: start(f"{name}-{kind}-{batch}", root, kind, batch) for name, root in checkouts}
    prompts = tokens_of(shipped_prompts())
    command_of = lambda turn: {  # noqa: E731
        "prompts": [prompts[(turn * batch + i) % len(prompts)] for i in range(batch)],
        "temperature": temperature,
        "seed": order.randrange(2**31),
        "setting": {"length": DRAFTS[kind][1]},
        "tokens": tokens,
    }
    samples = pool.in_turn(running, rounds, order, command_of, {"tokens": WARM})
    return {name: speeds(found) for name, found in samples.items()}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--rounds", type=int, default=6, help="of a start")
    parser.add_argument("--starts", type=int, default=3, help="processes of each checkout, one after the other")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a sample")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts decoded together")
    parser.add_argument("--only", nargs="+", default=USUAL, choices=DRAFTS, metavar="NAME", help=", ".join(DRAFTS))
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    options = parser.parse_args()
    rows = []
    for batch in options.batch:
        for kind, temperature in product(options.only, options.temperature):
            sizes = batch, options.rounds, options.tokens, options.starts
            rows.append(measure(options.before.resolve(), kind, temperature, *sizes))
            say("  ".join(rows[-1]))
    print(
        table(
            ["draft", "temperature", "prompts together", "tokens/s before", "now", "now / before (starts)", "rounds"],
            rows,
        )
    )


if __name__ == "__main__":
    main()
