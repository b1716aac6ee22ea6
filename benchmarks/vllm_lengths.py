"""Our draft lengths inside vLLM against its fixed ones and plain decoding, interleaved, at two loads.

    .venv-vllm/bin/python benchmarks/vllm_lengths.py --rounds 28

Two processes with vLLM in each, one plain and one with our scheduler; only one of them works at a time, so rounds are comparable.
Where a process happens to place its weights is worth some per cent, so there are several such pairs, one after another.
Every round runs each arm once at each load, in shuffled order. A load is a number of sequences that stays: a request that ends is
followed by the next one, and the clock stops when none is left to follow. (A batch that runs empty spends half of its steps at
lower loads, and is as slow as its slowest sequence, which the lengths of the others do not change.) Requests differ in how many
tokens they ask for, the same in every arm: of equal ones plain decoding ends all in one step, and its clock would stop before their
followers' prompts are read, which every arm that drafts reads. The adaptive arm keeps what it
has learnt between its turns, and learns for some runs before the first round; `learning` is the price of that. Prints ratios to
plain of sums over rounds, with 95% intervals. The fixed length that the adaptive arm is compared with in a round is the best one of
the other rounds: the best of five in the same rounds would be the luckiest too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from vllm_inside import FOLDERS, speculative, started

TOKENS = (48, 144)
"""The fewest and the most that a request asks for."""
LOADS = {1: 3, 8: 24}
"""Sequences at a time, and the requests of a run."""


def worker(method: str) -> None:
    """One vLLM; a line {"arm", "load", "seed"} on stdin gives a line {"tokens", "seconds"} on stdout."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to stderr
    llm = started(None if method == "plain" else speculative(method, 4))
    from vllm import SamplingParams

    from outrider.assets import HERE
    from outrider.integrations.vllm.lengths import Cycle, LiveLengths

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    prompts = [json.loads(row)["prompt"] for row in (HERE / "pycode" / "prompts.jsonl").read_text().splitlines()]
    adaptive = LiveLengths(4, 4)
    print("ready", file=reply, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if method != "plain":
            scheduler.lengths = adaptive if asked["arm"] == "adaptive" else Cycle([asked["arm"]])
        draw = random.Random(asked["seed"])
        how = partial(SamplingParams, temperature=asked["temperature"], ignore_eos=True, detokenize=False)
        chosen = [(draw.choice(prompts), how(max_tokens=draw.randint(*TOKENS))) for _ in range(LOADS[asked["load"]])]
        done = steady(llm.llm_engine, chosen, asked["load"])
        print(json.dumps(done), file=reply, flush=True)


def steady(engine: Any, requests: list[tuple[str, Any]], load: int) -> dict[str, float]:
    """Tokens and seconds of these requests, `load` at a time, until fewer are left; the rest is dropped."""
    tokens = dict.fromkeys(map(str, range(len(requests))), 0)
    left = list(enumerate(requests))[::-1]
    running, began = 0, time.perf_counter()
    while True:
        while running < load and left:
            number, (prompt, params) = left.pop()
            engine.add_request(str(number), prompt, params)
            running += 1
        if running < load:
            break
        for out in engine.step():
            tokens[out.request_id] = len(out.outputs[0].token_ids)
            running -= out.finished
    seconds = time.perf_counter() - began
    engine.abort_request(list(tokens))
    while engine.has_unfinished_requests():
        engine.step()
    return {"tokens": sum(tokens.values()), "seconds": seconds}


class Worker:
    """A process with one vLLM."""

    def __init__(self, method: str) -> None:
        words = [sys.executable, __file__, "--worker", method]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self) -> None:
        assert self.process.stdout and self.process.stdout.readline().strip() == "ready"

    def run(self, arm: Any, load: int, seed: int, temperature: float) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(
            json.dumps({"arm": arm, "load": load, "seed": seed, "temperature": temperature}) + "\n"
        )
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def main() -> None:
    """Rounds, then a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker")
    parser.add_argument("--method", default="eagle3", choices=list(FOLDERS))
    parser.add_argument("--rounds", type=int, default=28)
    parser.add_argument(
        "--learn", type=int, default=40, help="runs of the adaptive arm at each load before the first round"
    )
    parser.add_argument("--starts", type=int, default=4, help="pairs of processes, one after another")
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="fixed lengths")
    parser.add_argument("--seconds", type=float, default=1e9, help="end after the round in which this time has passed")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--out", type=Path, help="append every measurement to this file")
    parser.add_argument("--report", type=Path, help="print the table of such a file, and measure nothing")
    o = parser.parse_args()
    if o.worker:
        worker(o.worker)
        return
    if o.report:
        report([json.loads(line) for line in o.report.read_text().splitlines()], o.method)
        return
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if o.out:
            with o.out.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")

    for start in range(o.starts):
        measure(o, range(start, o.rounds, o.starts), o.seconds / o.starts, keep)
    report(rows, o.method)


def measure(o: argparse.Namespace, rounds: Iterable[int], limit: float, keep: Callable[[dict[str, Any]], None]) -> None:
    """One pair of processes: some runs to learn, then these rounds, until the time is over."""
    began = time.monotonic()
    plain, ours = Worker("plain"), Worker(o.method)
    plain.ready()
    ours.ready()
    for load in LOADS:
        for seed in range(o.learn):
            keep({"round": -1, "arm": "learning", "load": load, **ours.run("adaptive", load, seed, o.temperature)})
        for arm in ("plain", *o.lengths):
            (plain if arm == "plain" else ours).run(arm, load, 0, o.temperature)  # warm
    for number in rounds:
        turns = [(arm, load) for arm in ("plain", "adaptive", *o.lengths) for load in LOADS]
        random.Random(number).shuffle(turns)
        for arm, load in turns:
            who = plain if arm == "plain" else ours
            keep({"round": number, "arm": arm, "load": load, **who.run(arm, load, number, o.temperature)})
        if time.monotonic() - began > limit:
            break
    plain.end()
    ours.end()


def report(rows: list[dict[str, Any]], method: str) -> None:
    """Speed of every arm over plain vLLM, and of the adaptive one over the best fixed length, 95% intervals over rounds."""
    from outrider.evaluate.statistics.ratios import paired_ratio

    lengths = sorted({r["arm"] for r in rows if isinstance(r["arm"], int)})
    arms = ("plain", "adaptive", *lengths)
    for load in LOADS:
        here = {(r["round"], r["arm"]): r for r in rows if r["load"] == load and r["round"] >= 0}
        rounds = [n for n in sorted({n for n, _ in here}) if all((n, arm) in here for arm in arms)]

        def over(arm: Any, base: Any, here: Any = here, rounds: Any = rounds) -> str:
            def side(which: Any, what: str) -> np.ndarray:
                return np.array([here[n, which(n) if callable(which) else which][what] for n in rounds], float)

            sides = [side(a, x) for a in (arm, base) for x in ("tokens", "seconds")]
            found = paired_ratio(*sides)
            return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"

        best = max(lengths, key=lambda arm: speed(here, arm, rounds))
        print(f"{method}, {load} at a time, {len(rounds)} rounds, plain {speed(here, 'plain', rounds):.0f} tokens/s")
        for arm in ("adaptive", *lengths):
            print(f"  {arm!s:>8}: {over(arm, 'plain')} of plain{' (best fixed)' if arm == best else ''}")
        print(
            f"  adaptive over the best fixed length of the other rounds: {over('adaptive', elsewhere(here, rounds, lengths))}"
        )


def speed(here: dict[tuple[int, Any], dict[str, Any]], arm: Any, rounds: list[int]) -> float:
    """Tokens per second of an arm over these rounds."""
    return sum(here[n, arm]["tokens"] for n in rounds) / sum(here[n, arm]["seconds"] for n in rounds)


def elsewhere(
    here: dict[tuple[int, Any], dict[str, Any]], rounds: list[int], lengths: Sequence[int]
) -> Callable[[int], int]:
    """For a round the fixed length that was fastest in the others."""
    return lambda n: max(lengths, key=lambda arm: speed(here, arm, [x for x in rounds if x != n]))


if __name__ == "__main__":
    main()
