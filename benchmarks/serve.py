"""Does speculation ever make the server slower? Plain, fixed and adaptive draft lengths side by side, at several loads.

    python benchmarks/serve.py                                  # the shipped pair, 1, 4, 8 and 16 clients
    python benchmarks/serve.py --rate 20 --seconds 30           # open loop at 20 requests a second
    python benchmarks/serve.py --arms adaptive --before ../before    # a checkout of an earlier commit beside this one
    python benchmarks/serve.py --target T --draft D --arms adaptive vllm vllm-draft transformers    # other servers beside ours

One server process per arm; all are idle but the one that is asked. A round sends the same requests to every arm in random order;
ratios to the first arm (with --before: to the same arm there) are formed within a round, and reported as their median with a seeded
bootstrap interval over rounds.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from peers.arms import VENVS, vllm_env
from serve_load import Address, Traffic, closed_loop, open_loop, summary

from outrider.assets import shipped_prompts

OURS = {"plain": ["--draft", "none"], "fixed": ["--fixed-length"], "adaptive": []}
PEERS = ("vllm", "vllm-draft", "transformers")
BEFORE = "@before"


@dataclass(frozen=True, slots=True)
class Start:
    """How a server is started. command: without its port option; ready: a path that answers 200 once it serves; model: its name;
    bare: it refuses fields of vLLM; ours: it has our server's state."""

    command: list[str]
    ready: str
    model: str
    env: dict[str, str] = field(default_factory=dict)
    bare: bool = False
    ours: bool = False


def start_of(name: str, options: argparse.Namespace) -> Start:
    """The server of an arm, every one in bfloat16 or what the checkpoint has, with as many slots."""
    target, slots = options.target, str(options.slots)
    if name.endswith(BEFORE):
        now = start_of(name.removesuffix(BEFORE), options)
        return replace(now, env={"PYTHONPATH": str(options.before.resolve() / "src")})
    if name in OURS:
        command = [sys.executable, "-m", "outrider.cli.main", "serve", "--hang-timeout", "3600", "--slots", slots]
        command += ["--length", str(options.length), "--served-model-name", options.model, *OURS[name]]
        command += ["--target", target] if target else []
        command += ["--draft", options.draft] if options.draft and name != "plain" else []
        return Start(command, "/ready", options.model, ours=True)
    if not target:
        raise SystemExit(f"the arm {name} needs --target: a folder both can read")
    if name == "transformers":
        command = [str(VENVS / "vllm" / "bin" / "transformers"), "serve", str(Path(target).resolve())]
        command += [
            "--device",
            "cpu",
            "--dtype",
            options.dtype,
        ]  # its continuous batching gave no token on a CPU in 5.19
        return Start(command, "/health", str(Path(target).resolve()), bare=True)
    command = [
        str(VENVS / "vllm" / "bin" / "python"),
        "-m",
        "vllm.entrypoints.openai.api_server",
    ]  # its script asks for "vllm"
    command += ["--model", target, "--served-model-name", options.model]
    command += ["--dtype", options.dtype, "--max-num-seqs", slots, "--max-model-len", str(options.context)]
    command += ["--no-enable-prefix-caching"]
    if name == "vllm-draft":
        wish = {"model": options.draft, "num_speculative_tokens": options.length, "method": "draft_model"}
        command += ["--speculative-config", json.dumps(wish | {"draft_sample_method": "probabilistic"})]
    return Start(command, "/health", options.model, vllm_env(sorted(os.sched_getaffinity(0))))


class Arm:
    """A server of its own, stopped (SIGSTOP, with its children) while others are asked."""

    def __init__(self, name: str, start: Start, log: Path | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = Address("127.0.0.1", free.getsockname()[1])
        self.name, self.start = name, start
        self.process = subprocess.Popen(
            [*start.command, "--port", str(self.address.port)],
            stdout=subprocess.DEVNULL if log is None else log.open("wb"),
            stderr=subprocess.STDOUT,
            env=os.environ | start.env,
            start_new_session=True,
        )

    def wait(self, seconds: float = 300.0) -> None:
        """Until it is ready."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.address.port}{self.start.ready}", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        ended = self.process.poll() is not None
        raise SystemExit(f"{self.name}: {'it ended while starting' if ended else f'not ready after {seconds:g} s'}")

    def length(self) -> int | None:
        """The draft length our server uses now; None for the others."""
        return self._state()["now"]["length"] if self.start.ours else None

    def phases(self) -> dict[str, float]:
        """Seconds of our server's steps so far, by phase; empty for the others."""
        return self._state()["now"]["seconds"] if self.start.ours else {}

    def _state(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.address.port}/outrider/state", timeout=10) as reply:
            return json.load(reply)

    def pause(self, stop: bool) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP if stop else signal.SIGCONT)

    def end(self) -> None:
        if self.process.poll() is None:
            self.pause(False)
            self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


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
                if len(arms) > 1:
                    arm.pause(False)
                    time.sleep(0.2)
                before = arm.phases()
                mine = replace(traffic, model=arm.start.model, bare=arm.start.bare)
                if kind == "open":
                    work = open_loop(arm.address, mine, load, options.seconds, seed=round_)
                else:
                    count = options.requests * load
                    work = closed_loop(arm.address, mine, int(load), int(count), seed=round_)
                run = summary(*asyncio.run(work))
                run["length"] = arm.length()
                run["phases"] = {k: v - before[k] for k, v in arm.phases().items()}
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
        line = f"  {name:{max(map(len, runs))}s} {speed:7.1f} tokens/s"
        for kind in ("first_token", "per_token"):
            p50, p99 = (1e3 * float(np.median([r["latency"][kind][q] or np.nan for r in mine])) for q in ("p50", "p99"))
            line += f"   {kind.replace('_', ' ')} p50 {p50:6.1f} p99 {p99:6.1f} ms"
        if any(r["length"] is not None for r in mine):
            line += f"   lengths {[r['length'] for r in mine]}"
        base = name + BEFORE if name + BEFORE in runs else next(iter(runs))
        if name != base:
            ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(mine, runs[base], strict=True)]
            out["ratios"][name] = interval(ratios)
            line += "   x{:.3f} [{:.3f}, {:.3f}]".format(*out["ratios"][name])
        print(line, file=sys.stderr)
        if mine[0]["phases"]:
            print(f"            {_where(mine)}", file=sys.stderr)
        bad = {k: v for r in mine for k, v in r["outcomes"].items() if k != "ok"}
        if bad:
            print(f"            not ok: {bad}", file=sys.stderr)
    return out


def _where(runs: list[dict[str, Any]]) -> str:
    """Where the time of our server went, in per cent of all rounds: the phases of its steps, and no step at all."""
    whole = sum(r["seconds"] for r in runs)
    shares = {phase: sum(r["phases"][phase] for r in runs) / whole for phase in runs[0]["phases"]}
    return "time: " + " ".join(f"{k} {v:.0%}" for k, v in (shares | {"idle": 1.0 - sum(shares.values())}).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
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
    parser.add_argument("--arms", nargs="+", default=list(OURS), choices=[*OURS, *PEERS], help="the first is the base")
    parser.add_argument(
        "--before", type=Path, help="a checkout of an earlier commit, for arms of ours: its server beside this one"
    )
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024, help="of vLLM, prompt and output")
    parser.add_argument("--dtype", default="bfloat16", help="of peers; ours keeps the checkpoint's")
    parser.add_argument("--prompts", type=Path, default=None, help="a text a line, instead of the shipped prompts")
    parser.add_argument("--target", default=None)
    parser.add_argument("--draft", default=None)
    parser.add_argument("--model", default="pycode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--characters", type=int, default=600, help="of a prompt, its last ones")
    parser.add_argument("--logs", type=Path, default=None, help="folder for what the servers say")
    parser.add_argument("--write", type=Path, default=None)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # so that the servers are ended too
    earlier = [name + BEFORE for name in options.arms if name in OURS and options.before]
    starts = {name: start_of(name, options) for name in [*earlier, *options.arms]}
    texts = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else shipped_prompts()
    prompts = [p[-options.characters :] for p in texts if p]
    if options.logs is not None:
        options.logs.mkdir(parents=True, exist_ok=True)
    arms: list[Arm] = []
    bad = {"hang_up": options.hang_up, "slow": options.slow, "malformed": options.malformed}
    traffic = Traffic(options.model, prompts, options.tokens, options.temperature, **bad)
    try:
        for name, start in starts.items():  # one after another: two that load at once disturb each other
            arms.append(Arm(name, start, options.logs and options.logs / f"{name}.log"))
            arms[-1].wait()
            arms[-1].pause(len(starts) > 1)
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
