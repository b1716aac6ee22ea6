"""How long the exact theory takes: one row per calculation, best of several runs, one thread.

    python benchmarks/theory.py [--large] [--json FILE] [NAME ...]

NAME keeps the rows whose name contains it. `--large` adds the instance with 1000 positions and 500 states (about 5 GB
of memory). To add a row, decorate a function with `@row("name", goal_in_seconds)`: it is called once and returns the
calculation to be timed, so that what it prepares is not timed.
"""

# ruff: noqa: E402  (threads are bound before numpy is imported)
from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # before numpy reads them
    os.environ.setdefault(_name, "1")

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy

from outrider.theory import (
    batch,
    block,
    chains,
    coupling,
    exact,
    kl,
    multidraft,
    rejections,
    simulate,
    stopping,
    transport,
    without_replacement,
)

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    name: str
    goal: float | None
    prepare: Callable[[], Work]
    large: bool


ROWS: list[Row] = []


def row(
    name: str, goal: float | None = None, large: bool = False
) -> Callable[[Callable[[], Work]], Callable[[], Work]]:
    """Register a calculation; `goal` is the time in seconds that it is meant to stay under."""

    def register(prepare: Callable[[], Work]) -> Callable[[], Work]:
        ROWS.append(Row(name, goal, prepare, large))
        return prepare

    return register


# -- chains, rejections, batch ------------------------------------------------------------------------------------------


@row("rejections: T=50 V=7", goal=1e-3)
def _() -> Work:
    chain = chains.best_guess(7, 50, 10)
    return lambda: rejections.expected_rejections(chain)


@row("rejections: T=1000 V=500", goal=2.0, large=True)
def _() -> Work:
    chain = chains.best_guess(500, 1000, 10)
    return lambda: rejections.expected_rejections(chain)


@row("rejections, 4 drafts: T=50 V=7")
def _() -> Work:
    chain = chains.best_guess(7, 50, 10)
    return lambda: batch.expected_rejections(chain, 4)


@row("rejections, limit of drafts: T=50 V=7")
def _() -> Work:
    chain = chains.best_guess(7, 50, 10)
    return lambda: batch.expected_rejections(chain, math.inf)


@row("rejections, 1 to 2000 drafts, all of them: T=100 V=7")
def _() -> Work:
    chain = chains.best_guess(7, 100, 10)
    return lambda: batch.sweep(chain, range(1, 2001))


@row("rejections, 8 drafts with prefix sharing: T=50 V=7")
def _() -> Work:
    chain = chains.best_guess(7, 50, 10)
    return lambda: batch.shared_per_position(chain, 8)


@row("law of rejections: T=50 V=7")
def _() -> Work:
    chain = chains.best_guess(7, 50, 10)
    return lambda: rejections.rejection_law(chain)


@row("law of rejections: T=1000 V=7")
def _() -> Work:
    chain = chains.best_guess(7, 1000, 10)
    return lambda: rejections.rejection_law(chain)


@row("calls, length 5: T=50 V=7")
def _() -> Work:
    chain = chains.best_guess(7, 50, 10)
    return lambda: rejections.calls(chain, length=5)


# -- enumeration and simulation -----------------------------------------------------------------------------------------


@row("enumerate 2 drafts: T=3 V=3")
def _() -> Work:
    chain = chains.best_guess(3, 3, 0)
    return lambda: exact.speculative(chain, drafts=2)


@row("simulate 20,000 runs: T=50 V=7", goal=2.0)
def _() -> Work:
    chain = chains.best_guess(7, 50, 10)
    return lambda: simulate.speculative(chain, 20_000, 0)


@row("simulate 20,000 runs, 4 drafts: T=50 V=7", goal=2.0)
def _() -> Work:
    chain = chains.best_guess(7, 50, 10)
    return lambda: simulate.speculative(chain, 20_000, 0, drafts=4)


@row("simulate 20,000 runs, blocks to the horizon: T=50 V=7")
def _() -> Work:
    chain = chains.best_guess(7, 50, 10)
    return lambda: simulate.block(chain, 20_000, 0)


# -- speed-up, prediction -----------------------------------------------------------------------------------------------


# -- one conditional distribution: fronts, several drafts, blocks, couplings -----------------------------------------------------


def _laws(size: int = 128_000) -> tuple[np.ndarray, np.ndarray]:
    target, draft = np.random.default_rng(0).dirichlet(np.full(size, 0.05), size=2)
    return target, draft


@row("transport optimum, 8 independent drafts: V=128,000", goal=0.05)
def _() -> Work:
    p, q = _laws()
    return lambda: transport.optimal_iid(p, q, 8)


@row("transport optimum, 8 independent drafts: V=200,000")
def _() -> Work:
    p, q = _laws(200_000)
    return lambda: transport.optimal_iid(p, q, 8)


@row("transport optimum, 2 drafts without replacement: V=128,000")
def _() -> Work:
    p, q = _laws()
    return lambda: transport.optimal_without_replacement(p, q, 2)


@row("recursive rejection, 8 drafts: V=128,000")
def _() -> Work:
    p, q = _laws()
    return lambda: multidraft.recursive(p, q, 8)


@row("K-SEQ, 8 drafts: V=128,000")
def _() -> Work:
    p, q = _laws()
    return lambda: multidraft.kseq(p, q, 8)


@row("SpecHub: V=128,000")
def _() -> Work:
    p, q = _laws()
    return lambda: multidraft.spechub(p, q)


@row("recursive, 2 without replacement, exact: V=128,000")
def _() -> Work:
    p, q = _laws()
    return lambda: without_replacement.recursive_acceptance(p, q, 2)


@row("recursive, 8 without replacement, 1000 samples: V=128,000")
def _() -> Work:
    p, q = _laws()
    rng = np.random.default_rng(0)
    return lambda: without_replacement.estimate_recursive_acceptance(p, q, 8, 1000, rng)


@row("match probability of the race: V=128,000")
def _() -> Work:
    p, q = _laws()
    return lambda: coupling.match_probability(p, q)


@row("mentored rule for a KL budget: V=128,000")
def _() -> Work:
    p, q = _laws()
    return lambda: kl.mentored(p, q, 0.05)


@row("sequence KL program: T=50 V=7")
def _() -> Work:
    chain = chains.best_guess(7, 50, 10)
    return lambda: kl.sequence_policy(chain, 1.0)


@row("block verification, expected length: V=7, 5 tokens")
def _() -> Work:
    chain = chains.best_guess(7, 50, 10)
    return lambda: block.expected_lengths(*block.conditionals(chain, 0, 0, 5))


@row("optimal stopping, Beta acceptances")
def _() -> Work:
    values, weights = stopping.beta_law(3.0, 1.2)
    return lambda: stopping.renewal(values, weights, draft_cost=0.08)


@dataclass(frozen=True)
class Timing:
    """The best of `runs` runs, in seconds."""

    name: str
    seconds: float
    runs: int
    goal: float | None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.seconds <= self.goal


def measure(item: Row, budget: float = 1.0) -> Timing:
    """Run for about `budget` seconds, at least three times after one warm-up, and keep the best."""
    work = item.prepare()
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return Timing(item.name, min(times), len(times), item.goal)


def main() -> int:
    """Print the table; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description="Timings of the exact theory.")
    parser.add_argument("names", nargs="*", help="keep rows whose name contains one of these")
    parser.add_argument("--large", action="store_true", help="include rows that need gigabytes")
    parser.add_argument("--json", type=Path, help="write the timings to this file too")
    options = parser.parse_args()
    items = [r for r in ROWS if not options.names or any(n in r.name for n in options.names)]
    items = [r for r in items if options.large or not r.large]
    timings = []
    for item in items:
        timings.append(measure(item))
        print(describe(timings[-1]), flush=True)
    if options.json:
        document = {
            "command": "python " + " ".join(sys.argv),
            "machine": machine(),
            "timings": [asdict(t) for t in timings],
        }
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return int(any(t.met is False for t in timings))


def describe(t: Timing) -> str:
    goal = "" if t.goal is None else f"  goal {t.goal * 1e3:8.1f} ms  {'met' if t.met else 'MISSED'}"
    return f"{t.name:<58} {t.seconds * 1e3:10.3f} ms  best of {t.runs:>5}{goal}"


def machine() -> dict[str, str]:
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }


if __name__ == "__main__":
    raise SystemExit(main())
