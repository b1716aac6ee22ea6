"""Does speculation ever make the server slower? Plain, fixed and adaptive draft lengths side by side, at several loads.

    python benchmarks/serve.py                                  # the shipped pair, 1, 4 and 8 clients
    python benchmarks/serve.py --rate 20 --seconds 30           # open loop at 20 requests a second

One server process per arm; all are idle but the one that is asked. A round sends the same requests to every arm in random order;
ratios to plain decoding are formed within a round, and reported as their median with a seeded bootstrap interval over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from serve_load import Address, Traffic, closed_loop, open_loop, summary

from outrider.assets import shipped_prompts

ARMS = {"plain": ["--draft", "none"], "fixed": ["--fixed-length"], "adaptive": []}


class Arm:
    """A server of its own, stopped (SIGSTOP) while others are asked."""

    def __init__(self, name: str, options: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = Address("127.0.0.1", free.getsockname()[1])
        self.name = name
        command = [sys.executable, "-m", "outrider.cli.main", "serve", "--port", str(self.address.port)]
        self.process = subprocess.Popen([*command, "--hang-timeout", "3600", *options], stderr=subprocess.DEVNULL)

    def wait(self, seconds: float = 120.0) -> None:
        """Until it is ready."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.address.port}/ready", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise SystemExit(f"{self.name}: not ready after {seconds:g} s")

    def state(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.address.port}/outrider/state", timeout=10) as reply:
            return json.load(reply)

    def pause(self, stop: bool) -> None:
        os.kill(self.process.pid, signal.SIGSTOP if stop else signal.SIGCONT)

    def end(self) -> None:
        self.pause(False)
        self.process.terminate()
        self.process.wait(60)


def interval(ratios: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of ratios with a 95% bootstrap interval over rounds."""
    generator = np.random.default_rng(seed)
    draws = np.median(generator.choice(ratios, (4000, len(ratios))), axis=1)
    return float(np.median(ratios)), float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def measure(arms: list[Arm], traffic: Traffic, options: argparse.Namespace) -> dict[str, Any]:
    """All loads, all rounds; raw summaries and ratios."""
    order, results = random.Random(options.seed), {}
    loads = [("open", options.rate)] if options.rate else [("closed", c) for c in options.clients]
    for kind, load in loads:
        runs: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
        for round_ in range(-1, options.rounds):  # the first round warms up (the controller too) and is thrown away
            for arm in order.sample(arms, len(arms)):
                arm.pause(False)
                if kind == "open":
                    work = open_loop(arm.address, traffic, load, options.seconds, seed=round_)
                else:
                    count = options.requests * load
                    work = closed_loop(arm.address, traffic, int(load), int(count), seed=round_)
                run = summary(*asyncio.run(work))
                run["length"] = arm.state()["now"]["length"]
                if round_ >= 0:
                    runs[arm.name].append(run)
                if len(arms) > 1:
                    arm.pause(True)
        results[f"{kind} {load:g}"] = report(f"{kind} {load:g}", runs)
    return results


def report(title: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print a table of one load and return it."""
    out: dict[str, Any] = {"runs": runs, "ratios": {}}
    print(f"\n{title} clients, {len(next(iter(runs.values())))} rounds", file=sys.stderr)
    for name, mine in runs.items():
        speed = float(np.median([r["tokens_per_second"] for r in mine]))
        line = f"  {name:9s} {speed:7.1f} tokens/s"
        for kind in ("first_token", "per_token"):
            p50, p99 = (1e3 * float(np.median([r["latency"][kind][q] or np.nan for r in mine])) for q in ("p50", "p99"))
            line += f"   {kind.replace('_', ' ')} p50 {p50:6.1f} p99 {p99:6.1f} ms"
        if any(r["length"] is not None for r in mine):
            line += f"   lengths {[r['length'] for r in mine]}"
        if name != "plain" and "plain" in runs:
            ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(mine, runs["plain"], strict=True)]
            out["ratios"][name] = interval(ratios)
            line += "   x{:.3f} [{:.3f}, {:.3f}]".format(*out["ratios"][name])
        print(line, file=sys.stderr)
        bad = {k: v for r in mine for k, v in r["outcomes"].items() if k != "ok"}
        if bad:
            print(f"            not ok: {bad}", file=sys.stderr)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--requests", type=int, default=4, help="requests per client and round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--length", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.0, help="open loop: requests a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="open loop: seconds of arrivals")
    parser.add_argument("--hang-up", type=float, default=0.0)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--malformed", type=float, default=0.0)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--target", default=None)
    parser.add_argument("--draft", default=None)
    parser.add_argument("--model", default="pycode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, default=None)
    options = parser.parse_args()
    common = ["--length", str(options.length)]
    common += ["--target", options.target] if options.target else []
    arms = []
    for name in options.arms:
        draft = ["--draft", options.draft] if options.draft and name != "plain" else []
        arms.append(Arm(name, [*common, *draft, *ARMS[name]]))
    prompts = [p[-600:] for p in shipped_prompts()]
    bad = {"hang_up": options.hang_up, "slow": options.slow, "malformed": options.malformed}
    traffic = Traffic(options.model, prompts, options.tokens, options.temperature, **bad)
    try:
        for arm in arms:
            arm.wait()
        for arm in arms:
            arm.pause(len(arms) > 1)
        results = measure(arms, traffic, options)
    finally:
        for arm in arms:
            arm.end()
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    document = {"command": sys.argv, "machine": machine, "results": results}
    if options.write:
        options.write.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    else:
        print(json.dumps(document))


if __name__ == "__main__":
    main()
