"""Does the server leak? Half an hour of mixed traffic, a fifth of it bad, while its memory, descriptors and books are watched.

    python benchmarks/soak.py --minutes 30                                  # the shipped pair
    python benchmarks/soak.py --minutes 30 --target T --draft ngram         # anything else `outrider serve` takes

Open loop: Poisson arrivals, of which a tenth hang up after the first chunk, one in twenty reads a chunk every half second, and one
in twenty sends what is no JSON. The others vary: greedy or sampled, seeded or not, with stop strings, log-probabilities, penalties,
under a JSON grammar, twice, without speculation. Every half minute the arrivals pause until the server is idle; then its resident
memory and open descriptors are read from /proc. In the end its counters are held against each other and against what the clients
saw. The slope of memory is that of Theil and Sen over the idle readings after the warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import theilslopes
from serve_load import Address, Outcome, one

from outrider.assets import shipped_prompts

HANG_UP, SLOW, MALFORMED = 0.10, 0.05, 0.05
PAUSE = 30.0
"""Seconds of arrivals between two idle readings."""
SETTLE = 30.0
"""Seconds the server may take to become idle when the arrivals pause."""
SLOPE = 1.0
"""MB an hour that resident memory may grow by after the warm-up."""
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"seed": 7, "temperature": 0.8, "top_p": 0.9},
    {"stop": ["\n\n", "return"]},
    {"logprobs": 3},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    {"presence_penalty": 0.5, "logit_bias": {"5": -10}},
    {"speculation": {"mode": "off"}},
    {"n": 2},
)


@dataclass(frozen=True, slots=True)
class Reading:
    """The idle server. minute: since the start. memory: resident bytes. descriptors: open files and sockets."""

    minute: float
    memory: int
    descriptors: int


@dataclass
class Soak:
    """What came out. kinds: outcomes as the clients saw them; sent: requests by manner; counters: the server's at the end; faults:
    every promise that did not hold."""

    readings: list[Reading] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    counters: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.faults.append(what)

    def slope(self, warm_up: float) -> tuple[float, float, float] | None:
        """MB an hour after the first `warm_up` minutes, with a 95% interval; None with fewer than five readings."""
        late = [r for r in self.readings if r.minute >= warm_up]
        if len(late) < 5:
            return None
        slope, _, low, high = theilslopes([r.memory / 1e6 for r in late], [r.minute / 60 for r in late])
        return float(slope), float(low), float(high)


class Mix:
    """Bodies and manners, one after another, reproducibly."""

    def __init__(self, model: str, prompts: Sequence[str], tokens: int, seed: int) -> None:
        self.model, self.prompts, self.tokens, self.random = model, prompts, tokens, random.Random(seed)

    def next(self) -> tuple[bytes, str]:
        u = self.random.random()
        if u < MALFORMED:
            return b'{"model": ' + self.random.randbytes(40), "malformed"
        body: dict[str, Any] = {"model": self.model, "prompt": self.random.choice(self.prompts), "stream": True}
        body |= {"max_tokens": self.random.randint(1, self.tokens), **self.random.choice(VARIANTS)}
        if u < MALFORMED + HANG_UP:
            return json.dumps(body | {"max_tokens": 400, "ignore_eos": True}).encode(), "hang up"
        return json.dumps(body).encode(), "slow" if u < MALFORMED + HANG_UP + SLOW else "good"


class Served:
    """A server of its own process. options: further ones of `outrider serve`."""

    def __init__(self, options: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = Address("127.0.0.1", free.getsockname()[1])
        command = [sys.executable, "-m", "outrider.cli.main", "serve", "--port", str(self.address.port)]
        self.process = subprocess.Popen([*command, "--served-model-name", "soaked", *options])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.address.port}{path}", timeout=30) as reply:
            return reply.read().decode()

    def wait(self, seconds: float = 300.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/ready")
                return
            except OSError:
                time.sleep(0.2)
        raise SystemExit("the server is not ready in time")

    def counters(self) -> dict[str, float]:
        """Requests by how they ended, refusals by reason and replies by status, summed over everything else."""
        found: Counter[str] = Counter()
        for name, labels, value in re.findall(r"^([a-z_:]+)\{(.*)\} (\S+)$", self.get("/metrics"), re.MULTILINE):
            label = re.search(r'(?:finished_reason|reason|code)="([^"]*)"', labels)
            if name in (
                "vllm:request_success_total",
                "outrider_requests_refused_total",
                "outrider_http_responses_total",
            ):
                found[f"{name} {label[1] if label else ''}"] += float(value)
            elif name == "outrider_requests_started_total":
                found[name] = float(value)
        return dict(found)

    def reading(self, start: float) -> Reading:
        """Memory and descriptors now."""
        proc = Path(f"/proc/{self.process.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        minute = (time.monotonic() - start) / 60
        return Reading(minute, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(proc / "fd")))

    def idle(self) -> bool:
        """Every request that was started has ended."""
        found = self.counters()
        return found["outrider_requests_started_total"] == ended(found)

    def end(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def ended(counters: dict[str, float], *reasons: str) -> float:
    """Requests that ended for one of `reasons` (all of them by default)."""
    return sum(counters[f"vllm:request_success_total {r}"] for r in reasons or ("stop", "length", "abort", "error"))


async def arrivals(address: Address, mix: Mix, rate: float, seconds: float, soak: Soak) -> None:
    """Poisson arrivals for `seconds`; returns when all have ended."""
    tasks: list[asyncio.Task[Outcome]] = []
    start = at = time.monotonic()
    while (at := at + mix.random.expovariate(rate)) < start + seconds:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        body, manner = mix.next()
        soak.sent[manner] += 1
        tasks.append(asyncio.create_task(one(address, body, manner)))
    for outcome in await asyncio.gather(*tasks):
        soak.kinds[outcome.kind] += 1
        soak.statuses[outcome.status] += 1


def run(served: Served, mix: Mix, minutes: float, rate: float, pause: float = PAUSE) -> Soak:
    """Soak a server that is ready, and judge it. The first reading is taken after the first arrivals."""
    soak, start = Soak(), time.monotonic()
    while time.monotonic() - start < 60 * minutes:
        asyncio.run(arrivals(served.address, mix, rate, min(pause, 60 * minutes), soak))
        end = time.monotonic() + SETTLE
        while not served.idle() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(1.0)  # sockets of those who hung up are closed
        soak.check(served.idle(), f"requests are open {SETTLE:.0f} s after the last arrival")
        soak.readings.append(reading := served.reading(start))
        print(
            f"{reading.minute:5.1f} min {reading.memory / 1e6:.1f} MB {reading.descriptors} descriptors",
            file=sys.stderr,
        )
    judge(soak, served.counters())
    return soak


def judge(soak: Soak, found: dict[str, float]) -> None:
    """Hold the books against each other: the server's own, and the clients'."""
    soak.counters = found
    replies = {int(k.split()[1]): v for k, v in found.items() if k.startswith("outrider_http_responses_total")}
    good, hung_up = soak.kinds["ok"], soak.kinds["hung up"]
    finished = ended(found, "stop", "length")
    soak.check(not any(s >= 500 for s in (*soak.statuses, *replies)), f"replies of 5xx: {soak.statuses}, {replies}")
    soak.check(found["outrider_requests_started_total"] == ended(found), "started is not finished + cancelled + failed")
    soak.check(ended(found, "error") == 0, f"{ended(found, 'error'):.0f} requests ended with an error")
    soak.check(good <= finished <= good + hung_up, f"{finished:.0f} finished, but clients saw {good} (+{hung_up} left)")
    soak.check(soak.statuses[400] == soak.sent["malformed"], "malformed requests are not the ones that got 400")
    soak.check(set(soak.kinds) <= {"ok", "hung up", "http 400", "http 429"}, f"clients saw {dict(soak.kinds)}")
    counts = [r.descriptors for r in soak.readings]
    soak.check(max(counts[1:] or counts) <= counts[0] + 2, f"descriptors grow: {counts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=10.0, help="minutes that the slope of memory leaves out")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of a good request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, default=None)
    options, others = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # so that the server is ended too
    served = Served(others)
    try:
        served.wait()
        mix = Mix("soaked", [p[-400:] for p in shipped_prompts()], options.tokens, options.seed)
        soak = run(served, mix, options.minutes, options.rate)
    finally:
        code = served.end()
    soak.check(code == 0, f"the server ended with code {code}")
    told(soak, options, others)


def told(soak: Soak, options: argparse.Namespace, others: list[str]) -> None:
    """Print what came out, write it, and end with 1 if a promise did not hold."""
    slope = soak.slope(options.warm_up)
    soak.check(slope is None or slope[0] <= SLOPE, "memory grows by more than 1 MB an hour")
    first, last = soak.readings[0], soak.readings[-1]
    print(f"{sum(soak.sent.values())} requests {dict(soak.sent)}; clients saw {dict(soak.kinds)}")
    print(
        f"resident {first.memory / 1e6:.1f} MB after the first pause, {last.memory / 1e6:.1f} MB after {last.minute:.1f} minutes"
    )
    print(
        "slope after the warm-up: "
        + ("too short to say" if slope is None else "{:.2f} [{:.2f}, {:.2f}] MB/h".format(*slope))
    )
    print(f"descriptors {sorted({r.descriptors for r in soak.readings})}; faults: {soak.faults or 'none'}")
    if options.write:
        document = {"command": sys.argv, "serve": others, **vars(soak), "readings": [asdict(r) for r in soak.readings]}
        options.write.write_text(json.dumps(document | {"slope": slope}, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(soak.faults))


if __name__ == "__main__":
    main()
