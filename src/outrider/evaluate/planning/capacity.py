"""How many replicas for a traffic and a target on latency, with and without speculation, and what they cost: a simulated fleet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from outrider.errors import ConfigError
from outrider.files import json_rows, read_text
from outrider.theory.fleet import FAILED, REFUSED, Failures, Outcome, Replica, Traffic, poisson, simulate

MOST = 1000
"""Replicas that are looked at."""
MAX_BYTES = 1 << 28
MAX_TOKENS = 1 << 20
"""Most tokens of a trace's prompt or output: steps are simulated one by one."""
SHARES = (50, 95, 99)
_COLUMNS = (("arrival", "prompt_tokens", "output_tokens", 1.0), ("timestamp", "input_length", "output_length", 1e-3))
"""Names of a trace's columns, and seconds of a unit of its first: our own, and Mooncake's (milliseconds)."""


@dataclass(frozen=True, slots=True)
class Target:
    """Seconds to the first token, and per token after it, that `percentile` per cent of requests must not exceed; None: any."""

    ttft: float | None = None
    itl: float | None = None
    percentile: float = 95.0

    def met(self, out: Outcome) -> bool:
        """Whether an outcome meets it; a request that was refused, or that failed with its replica, meets nothing."""
        lost = int((~out.whole).sum())
        for most, seen in ((self.ttft, out.ttft()), (self.itl, out.itl())):
            late = lost + (0 if most is None else int((seen > most).sum()))
            if late > (1 - self.percentile / 100) * max(1, len(seen) + lost):
                return False
        return True


def read_traffic(text: str, prompts: Sequence[int], outputs: Sequence[int], requests: int, seed: int) -> Traffic:
    """The traffic that --traffic names: `poisson:RATE` (requests a second), or a JSONL file, of which `requests` rows are read.

    prompts, outputs: lengths in tokens of Poisson traffic. A row has `arrival` (seconds), `prompt_tokens` and `output_tokens`, or
    Mooncake's `timestamp` (milliseconds), `input_length` and `output_length`. Raises ConfigError, with the line of a bad row.
    """
    if text.startswith("poisson:"):
        try:
            return poisson(float(text.partition(":")[2]), requests, prompts, outputs, seed)
        except ValueError as error:
            raise ConfigError(f"--traffic poisson:RATE takes requests a second, as poisson:4: {error}") from None
    path = Path(text)
    if not path.is_file():
        raise ConfigError(f"--traffic {text!r} is neither poisson:RATE nor a file; give a JSONL trace")
    rows = [_row(row, where) for where, row in islice(json_rows(read_text(path, MAX_BYTES), path), requests)]
    if not rows:
        raise ConfigError(f"{path}: no requests in it")
    arrival, prompt, output = (np.array(x) for x in zip(*rows, strict=True))
    order = np.argsort(arrival, kind="stable")
    start = arrival[order[0]]
    return Traffic(arrival[order] - start, prompt[order].astype(np.int64), output[order].astype(np.int64))


def _row(row: Any, where: str) -> tuple[float, int, int]:
    for at, prompt, output, unit in _COLUMNS:
        if isinstance(row, dict) and at in row:
            values: list[Any] = [row.get(name) for name in (at, prompt, output)]
            if any(isinstance(v, bool) or not isinstance(v, int | float) or not 0 <= v < 1e12 for v in values):
                raise ConfigError(f"{where}: {at}, {prompt} and {output} must be numbers >= 0, got {values}")
            if any(v != int(v) for v in values[1:]):
                raise ConfigError(f"{where}: {prompt} and {output} are whole numbers of tokens, got {values[1:]}")
            if max(values[1:]) > MAX_TOKENS:
                raise ConfigError(f"{where}: {prompt} and {output} are at most {MAX_TOKENS:,}, got {values[1:]}")
            return float(values[0]) * unit, max(1, int(values[1])), max(1, int(values[2]))
    raise ConfigError(
        f"{where}: expected arrival, prompt_tokens and output_tokens, or timestamp, input_length, output_length"
    )


def fewest(run: Callable[[int], Outcome], target: Target, start: int = 1) -> tuple[int, Outcome] | None:
    """The fewest replicas, at most `MOST`, that meet the target, and their outcome; None if no number does.

    Doubling from `start`, then bisection: more replicas are taken to be no worse.
    """
    low, high = 0, max(1, min(start, MOST))
    found = run(high)
    while not target.met(found):
        low = high
        if high == MOST:
            return None
        high = min(2 * high, MOST)
        found = run(high)
    while high - low > 1:
        middle = (low + high) // 2
        out = run(middle)
        if target.met(out):
            high, found = middle, out
        else:
            low = middle
    return high, found


def describe(out: Outcome, replicas: int, price: float | None) -> dict[str, Any]:
    """An outcome as numbers. price: of a replica per hour. Latencies are None where no request ended whole."""
    ttft, itl = out.ttft(), out.itl()
    span = float(np.nanmax(out.end) - out.traffic.arrival[0]) if out.whole.any() else math.nan
    speed = out.throughput()
    return {
        "replicas": replicas,
        "requests": len(out.status),
        "failed": int((out.status == FAILED).sum()),
        "refused": int((out.status == REFUSED).sum()),
        "tokens_per_second": speed,
        "busy": out.busy / (replicas * span) if out.whole.any() else None,
        "ttft": _percentiles(ttft),
        "itl": _percentiles(itl),
        "gap": {f"p{q}": None if math.isnan(v := out.gap(q / 100)) else v for q in SHARES},
        "price_per_hour": None if price is None else price * replicas,
        "price_per_million_tokens": None if price is None or not speed else price * replicas / 3600 / speed * 1e6,
    }


def _percentiles(values: Any) -> dict[str, float | None]:
    return {f"p{q}": float(np.percentile(values, q)) if len(values) else None for q in SHARES}


def least_replicas(traffic: Traffic, replica: Replica) -> int:
    """Replicas below which no queue can stay short: the work of all prompts and of full batches, over the time of the traffic."""
    span = float(traffic.arrival[-1] - traffic.arrival[0])
    if span <= 0:
        return 1
    length = replica.lengths[min(replica.slots, len(replica.lengths) - 1)]
    tokens = 1 + float(np.cumprod(replica.acceptance[:length]).sum())
    step = replica.seconds(replica.slots, length, 0)
    work = float(traffic.output.sum()) * step / (replica.slots * tokens)
    return max(1, math.floor(work / span))


def plan_fleet(
    traffic: Traffic, arms: dict[str, Replica], target: Target, *, replicas: int | None = None, price: float | None = None,
    failures: Failures | None = None, queue: int | None = None, seed: int = 0, progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """For each arm ("speculative", "plain"): what `replicas` make of the traffic, and the fewest that meet the target, if any."""
    out: dict[str, Any] = {}
    for name, replica in arms.items():

        def run(n: int, replica: Replica = replica, name: str = name) -> Outcome:
            progress(f"{name}: {n} replica{'s' * (n > 1)}")
            return simulate(traffic, replica, n, queue=queue, failures=failures, seed=seed)

        mine: dict[str, Any] = {"lengths": [int(x) for x in replica.lengths]}
        if replicas is not None:
            here = run(replicas)
            mine["at"] = describe(here, replicas, price) | {"met": target.met(here)}
        if target.ttft is not None or target.itl is not None or replicas is None:
            found = fewest(run, target, least_replicas(traffic, replica))
            mine["fewest"] = None if found is None else describe(found[1], found[0], price)
        out[name] = mine
    return out
