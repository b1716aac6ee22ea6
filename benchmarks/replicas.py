"""Two replicas of one thread against one server of two threads, on this machine, under the same load.

    python benchmarks/replicas.py --rounds 7 --clients 8

Both run for the whole time and are asked in turn, in random order within a round, so that a slow minute of the machine is
everybody's. Printed: new tokens per second of all clients together, and the ratio within a round with its 95% bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

ARMS = {"2 replicas, 1 thread each": ["--replicas", "2", "--replica-threads", "1"], "1 server, 2 threads": []}


def a_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(words: list[str], slots: int) -> Iterator[int]:
    """A server; its port."""
    port = a_port()
    threads = os.environ | ({} if words else {"OMP_NUM_THREADS": "2"})
    command = [sys.executable, "-m", "outrider.cli.main", "serve", "--port", str(port), "--slots", str(slots), *words]
    with subprocess.Popen(command, env=threads, stderr=subprocess.PIPE) as process:
        try:
            while not ready(port):
                if process.poll() is not None:
                    raise SystemExit(f"{command} has ended: {(process.stderr or sys.stdin).read()[-500:]!r}")
                time.sleep(0.5)
            time.sleep(5.0)  # the second replica
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def ready(port: int) -> bool:
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def load(port: int, clients: int, tokens: int, number: int) -> tuple[float, int]:
    """Seconds and tokens of one round: every client sends one request, all at once."""
    emitted = [0] * clients

    def one(i: int) -> None:
        body = {"model": "pycode", "prompt": f"def f{number}_{i}(", "max_tokens": tokens, "ignore_eos": True}
        head = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=300) as reply:
            emitted[i] = json.load(reply)["usage"]["completion_tokens"]

    began = time.perf_counter()
    threads = [threading.Thread(target=one, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, sum(emitted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--tokens", type=int, default=96)
    asked = parser.parse_args()
    with ExitStack() as stack:
        ports = {name: stack.enter_context(served(words, 8)) for name, words in ARMS.items()}
        for port in ports.values():
            load(port, 8, 16, -1)
        for clients in asked.clients:
            rates: dict[str, list[float]] = {name: [] for name in ARMS}
            for number in range(asked.rounds):
                for name in random.sample(list(ARMS), len(ARMS)):
                    seconds, tokens = load(ports[name], clients, asked.tokens, 100 * clients + number)
                    rates[name].append(tokens / seconds)
            a, b = (np.array(rates[name]) for name in ARMS)
            draws = np.random.default_rng(0).integers(0, len(a), (4000, len(a)))
            low, high = np.quantile(np.median((a / b)[draws], axis=1), [0.025, 0.975])
            print(f"{clients} clients: " + ", ".join(f"{n} {np.median(r):.0f} tokens/s" for n, r in rates.items()))
            print(f"  ratio {np.median(a / b):.2f} [{low:.2f}, {high:.2f}] over {len(a)} rounds", flush=True)


if __name__ == "__main__":
    main()
