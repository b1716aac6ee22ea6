"""How fast drafters are trained: steps of every kind for the shipped target, in processor time, beside an earlier checkout.

    python benchmarks/training.py                                   # this checkout: float32 and bfloat16 products
    git worktree add ../before COMMIT
    python benchmarks/training.py --before ../before --kinds eagle  # and an earlier one

Rows are text of Python's library with the target's hidden states. A turn is `--steps` steps of one arm (checkout and products) in a
process of its own that waits in between, on one thread. Printed: tokens per second of processor time, the median of the turns, and
the ratio to the first arm, the median of ratios within a turn with the least and the greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("medusa", "eagle", "mtp", "dflash", "draft")
OWN = {"eagle": {"width": 160}, "dflash": {"anchors": 32, "objective": "chain"}}
LEVELS = {"eagle": 5, "dflash": 7}


def main() -> None:
    """Start every arm, let them work in turns, print a line for each kind."""
    options = read_options()
    if options.worker:
        work(options)
        return
    places = {"now": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    arms = [(name, kind) for name in reversed(places) for kind in ("float32", "bfloat16")]
    print(f"{'kind':8}" + "".join(f"{f'{name}, {products}':>34}" for name, products in arms))
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            workers = [start(places[name], kind, products, options, Path(folder) / name) for name, products in arms]
            turns = [[turn(worker) for worker in workers] for _ in range(options.rounds)]
            for worker in workers:
                worker.stdin.close()  # type: ignore[union-attr]
                worker.wait()
            print(line(kind, turns), flush=True)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", type=Path, help="an earlier checkout")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every arm")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=192, help="tokens of a row")
    parser.add_argument("--worker", nargs=3, metavar=("KIND", "PRODUCTS", "WORK"), help=argparse.SUPPRESS)
    return parser.parse_args()


def start(root: Path, kind: str, products: str, options: argparse.Namespace, work: Path) -> subprocess.Popen[str]:
    """A process of a checkout that has made its first step. work: its own folder, which checkouts of the same name would share."""
    sizes = [f"--{name}={getattr(options, name)}" for name in ("steps", "batch", "length")]
    command = [sys.executable, __file__, *sizes, "--worker", kind, products, str(work)]
    where = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=where)
    worker.stdout.readline()  # type: ignore[union-attr]
    return worker


def turn(worker: subprocess.Popen[str]) -> float:
    """Tokens per second of processor time of one turn."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return float(json.loads(worker.stdout.readline()))


def line(kind: str, turns: Sequence[Sequence[float]]) -> str:
    """Speeds of all arms, and their ratios to the first."""
    cells = []
    for arm in range(len(turns[0])):
        ratios = sorted(found[arm] / found[0] for found in turns)
        cells.append(f"{median(f[arm] for f in turns):.0f} ({median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f})")
    return f"{kind:8}" + "".join(f"{cell:>34}" for cell in cells)


def work(options: argparse.Namespace) -> None:
    """A worker: one training whose steps are made when they are asked for."""
    import torch

    from outrider.assets import shipped
    from outrider.models.load import load_target
    from outrider.train.distill import Teacher
    from outrider.train.features import read_features
    from outrider.train.job import Job
    from outrider.train.keyed import hidden_folder
    from outrider.train.loop import LoopConfig, build_optimizer, tokens_in
    from outrider.train.pipeline import new_model, prepare

    torch.set_num_threads(1)
    kind, products, where = options.worker
    job = Job(
        kind=kind, target=shipped("target"), data=(Path(sysconfig.get_paths()["stdlib"]),), pattern="*.py", work=Path(where),
        out=Path(where) / "out", rows=4 * options.batch, held_out=1, prompt=options.length, length=options.length,
        batch=options.batch, levels=LEVELS.get(kind, 4), repeats=1.0, loop=LoopConfig(steps=1, lr=1e-4), **OWN.get(kind, {}),
    )  # fmt: skip
    ready, target = prepare(job, lambda _: None), load_target(job.target, dtype="float32", device="cpu")
    taps = job.method.taps(job, target)
    held = hidden_folder(ready.training, ready.layers)[0]
    data = read_features(ready.training, taps, hidden=held, rows=job.batch, seed=0, repeats=1.0, report=lambda _: None)
    model = new_model(job, target, data)
    batches, loss = job.method.fit_inputs(job, Teacher.of(target, data.layers, taps), model, data)
    optimizer, at = build_optimizer(model, job.loop), 0

    def steps() -> float:
        nonlocal at
        began, tokens = time.process_time(), 0
        for _ in range(options.steps):
            batch = batches(at)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=products == "bfloat16"):
                value = loss(model, batch, at % 3 / 3)  # two of three steps as `staged` begins, one as it ends
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            at, tokens = at + 1, tokens + tokens_in(batch)
        return tokens / (time.process_time() - began)

    steps()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(steps()), flush=True)


if __name__ == "__main__":
    main()
