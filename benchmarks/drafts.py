"""How long do the forwards of the shipped learned drafters take, beside the time that their weights take to read?

    python benchmarks/drafts.py [--threads 2] [--rounds 30] [--steps 48]

One EAGLE level, the rows it catches up with, heads (one after the other: the shipped ones' first level, a further one and a draft
of four; side by side: four fresh ones as wide as the target), and a block with its injected rows: each alone, behind 128 rows of
context, in random order with the torch twins and with reads of memory, whose speed (the best of 1 to 8 streams, probe.cpp) says how
long a forward's weights take to read. As in steps, the target scores five rows between a forward that is timed and the one before
it, so that weights and Python come from memory or the last cache. `limit` is what a forward may take: 1.6 times its weights' time,
Medusa 1.3, and 0.15 ms if that is more; the least of the rounds is held against it. `--cpu-time`: processor time of one thread, for
a machine that others use. Then whole drafts in an engine: milliseconds per step of `draft`, with sampling, the forest and the
catch-up, and the speed beside plain decoding; prompts are interleaved over the drafters.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from native import STREAMS, Probe

from outrider.assets import shipped, shipped_prompts
from outrider.build import Engine
from outrider.drafters.dflash import forward as block_forward
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.eagle import Eagle3Network
from outrider.drafters.eagle import forward as eagle_forward
from outrider.drafters.medusa import MedusaNetwork, SequentialNetwork, sequential_forward
from outrider.drafters.medusa import drafter as medusa_heads
from outrider.drafters.medusa.format import MedusaConfig
from outrider.models.load import load_target
from outrider.nn.drafts import Rows
from outrider.nn.held import library_for
from outrider.nn.row_cache import RowCache
from outrider.params import SamplingParams
from outrider.types import Draft
from outrider.types import Rows as TargetRows

CONTEXT = 128
READ = 1 << 26
LEVELS = 4
CPU = torch.device("cpu")
SLACK, HEADS_SLACK, LEAST = 1.6, 1.3, 150.0
"""A forward may take so many times the time that its weights take to read, or so many microseconds."""


@dataclass(frozen=True, slots=True)
class Timed:
    """size: bytes of weights that are read. native, twin: the compiled forward, and torch's. slack: see SLACK."""

    size: int
    native: Callable[[], object]
    twin: Callable[[], object]
    slack: float = SLACK


def timed(size: int, runs: Iterable[Callable[[], object]], slack: float = SLACK) -> Timed:
    """Of the compiled forward and torch's, in this order."""
    native, twin = runs
    return Timed(size, native, twin, slack)


def cache_of(run: Any, c: Any, layers: int) -> RowCache:
    """Keys and values of CONTEXT rows, and room."""
    made = RowCache(layers, 1, c.kv_heads, CONTEXT + 32, c.head_dim, run.dtype, CPU)
    made.k.normal_(), made.v.normal_()
    return made


def arms(target: Any) -> dict[str, Timed]:
    """Every forward by its name."""
    eagle = Eagle3Network.load(shipped("eagle"), target)
    library = library_for(eagle.fc.weight)
    if library is None:
        raise SystemExit("no native decoder here: run with logging to see why")
    return {
        **eagle_arms(library, eagle, target),
        **sequence_arms(library, target),
        **side_arms(library, target),
        **block_arms(library, target),
    }


def eagle_arms(library: Any, eagle: Eagle3Network, target: Any) -> dict[str, Timed]:
    """A level, and the rows that were kept with the logits behind them."""
    c = eagle.config
    runs = eagle_forward.NativeForward(library, eagle), eagle_forward.TorchForward(eagle, CONTEXT + 32)
    taps = [torch.randn(8, target.hidden_size).to(target.dtype) for _ in c.taps]
    feature = torch.randn(1, c.hidden)

    def level(run: Any, kv: RowCache) -> object:
        rows = Rows(scored=[0])
        rows.add(0, CONTEXT, [7], [CONTEXT], [-1])
        return run.forward(rows, kv, feature=feature)

    def read(run: Any, kv: RowCache) -> object:
        rows = Rows(scored=[2])
        rows.add(0, CONTEXT, [7, 8, 9], range(CONTEXT, CONTEXT + 3))
        return run.forward(rows, kv, taps=taps, tap_rows=[0, 1, 2])

    own = bytes_of(eagle.layers, eagle.norm, eagle.lm_head)
    both = lambda call: (partial(call, r, cache_of(r, c, 1)) for r in runs)  # noqa: E731
    return {
        "EAGLE, a level": timed(own, both(level)),
        "EAGLE, 3 kept rows": timed(own + bytes_of(eagle.fc), both(read)),
    }


def sequence_arms(library: Any, target: Any) -> dict[str, Timed]:
    """The first level of sequential heads, a further one, and a draft; every level of a draft reads its weights."""
    heads = SequentialNetwork.load(shipped("medusa"), target)
    runs = sequential_forward.NativeForward(library, heads), sequential_forward.TorchForward(heads)
    state, taps = torch.randn(1, heads.config.width), torch.randn(len(heads.config.taps), 1, target.hidden_size)
    own = bytes_of(heads.layers, heads.norm, heads.lm_head)
    first = [partial(r.forward, [7], taps=taps.to(target.dtype)) for r in runs]
    level = [partial(r.forward, [7], state=state) for r in runs]

    def draft(start: Callable[[], object], further: Callable[[], object]) -> None:
        start()
        for _ in range(LEVELS - 1):
            further()

    whole = [partial(draft, *pair) for pair in zip(first, level, strict=True)]
    return {
        "Medusa, a level": timed(own, level, HEADS_SLACK),
        "Medusa, the first": timed(own + bytes_of(heads.fc), first, HEADS_SLACK),
        f"Medusa, a draft of {LEVELS}": timed(LEVELS * own + bytes_of(heads.fc), whole, HEADS_SLACK),
    }


def side_arms(library: Any, target: Any) -> dict[str, Timed]:
    """Fresh heads side by side, as wide as the target."""
    medusa = MedusaNetwork(MedusaConfig(target.hidden_size, target.vocab_size, LEVELS, target.layers)).requires_grad_(
        False
    )
    state = torch.randn(1, target.hidden_size)
    heads = medusa_heads.native(library, medusa, LEVELS), medusa_heads.stacked(medusa, LEVELS)
    return {f"{LEVELS} heads side by side": timed(bytes_of(medusa), (partial(h, state) for h in heads), HEADS_SLACK)}


def block_arms(library: Any, target: Any) -> dict[str, Timed]:
    """Blocks of the chart's drafts and of the longest, and the rows that were kept."""
    block = DFlashNetwork.load(shipped("dflash"), target, str(shipped("target")))
    d = block.config
    runs = block_forward.NativeForward(library, block), block_forward.TorchForward(block, CONTEXT + 32)
    hidden = [torch.randn(8, target.hidden_size).to(target.dtype) for _ in d.taps]

    def draft(size: int, run: Any, kv: RowCache) -> object:
        rows = Rows(mutual=True, scored=range(1, size))
        rows.add(0, CONTEXT, [7, *(d.mask,) * (size - 1)], range(CONTEXT, CONTEXT + size))
        return run.block(rows, kv)

    def inject(run: Any, kv: RowCache) -> None:
        rows = Rows()
        rows.add(0, CONTEXT, [0, 0, 0], range(CONTEXT, CONTEXT + 3))
        run.inject(rows, kv, hidden, [0, 1, 2])

    own = bytes_of(block.layers, block.norm, block.lm_head)
    keys = [p for layer in block.layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]  # type: ignore[union-attr]
    made = {
        f"block, {size} rows": timed(own, (partial(draft, size, r, cache_of(r, d, d.layers)) for r in runs))
        for size in (4, d.block)
    }
    kept = (partial(inject, r, cache_of(r, d, d.layers)) for r in runs)
    return made | {"block, 3 kept rows": timed(bytes_of(block.fc, *keys), kept)}


def target_pass(target: Any, rows: int = 5) -> Callable[[], object]:
    """A forward of a target of so many rows, a chain, behind the context."""
    kv, empty = target.new_kv(1, CONTEXT + 16), Draft.empty(1)
    prompt = TargetRows.assemble([0], [[3] * CONTEXT], [0], empty)
    target.forward(prompt, kv)
    kv.commit(prompt, [()])
    chain = [([5] * (rows - 1), list(range(-1, rows - 2)))]
    return partial(target.forward, TargetRows.assemble([0], [[7]], [CONTEXT], Draft.join(chain)), kv)


def bytes_of(*parts: torch.nn.Module) -> int:
    """Of weights in bfloat16."""
    return 2 * sum(p.numel() for part in parts for p in part.parameters())


def in_steps(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float], between: Callable[[], object]
) -> dict[str, list[float]]:
    """Microseconds of each call in every round, in random order: of the second of two, with `between` before it."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    chance = random.Random(rounds)
    for _ in range(rounds):
        for name in chance.sample(list(calls), len(calls)):
            calls[name]()
            between()
            start = clock()
            calls[name]()
            spent[name].append(1e6 * (clock() - start))
    return spent


def forwards(rounds: int, cpu_time: bool) -> None:
    target = load_target(str(shipped("target")))
    probe, made = Probe(torch.get_num_threads()), arms(target)
    calls: dict[str, Callable[[], object]] = {}
    for name, arm in made.items():
        calls |= {name: arm.native, f"torch {name}": arm.twin}
    calls |= {f"read {n}": partial(probe.read, READ, n) for n in STREAMS}
    spent = in_steps(calls, rounds, time.thread_time if cpu_time else time.perf_counter, target_pass(target))
    times = {name: min(each) for name, each in spent.items()}
    speed = max(READ / times[f"read {n}"] for n in STREAMS)  # bytes per microsecond
    print(f"{torch.get_num_threads()} threads, {speed / 1e3:.1f} GB/s; microseconds, the least of {rounds} rounds")
    print(f"{'':22}{'weights':>10}{'read':>8}{'limit':>8}{'native':>8}{'median':>8}{'ratio':>7}{'torch':>8}")
    for name, arm in made.items():
        read, own = arm.size / speed, times[name]
        limit, median = max(arm.slack * read, LEAST), statistics.median(spent[name])
        print(f"{name:22}{arm.size / 1e6:7.2f} MB{read:8.0f}{limit:8.0f}{own:8.0f}{median:8.0f}{own / read:7.2f}"
              f"{times[f'torch {name}']:8.0f}{'' if own <= limit else '  over'}")  # fmt: skip


def watched(drafter: Any) -> list[float]:
    """Milliseconds of every later call of `draft`."""
    inner, spent = drafter.draft, []

    def draft(*given: Any) -> Any:
        start = time.perf_counter()
        made = inner(*given)
        spent.append(1e3 * (time.perf_counter() - start))
        return made

    drafter.draft = draft
    return spent


DRAFTS = {
    "plain": ("none", 0),
    "draft model, 5": (str(shipped("draft")), 5),
    "EAGLE, 4": ("eagle", 4),
    "EAGLE, 5": ("eagle", 5),
    "EAGLE, dynamic": ("dynamic:16:eagle", 4),
    "Medusa, 4": ("medusa", 4),
    "block, 3": ("dflash", 3),
    "block, 7": ("dflash", 7),
}


def engines(steps: int, count: int) -> None:
    for temperature in (0.0, 1.0):
        made: dict[str, tuple[Engine, list[float]]] = {}
        speed: dict[str, list[float]] = {name: [] for name in DRAFTS}
        for name, (draft, length) in DRAFTS.items():
            one = Engine.build(draft=draft, length=length, max_length=512)
            made[name] = one, watched(one.parts.drafter)
        prompts = shipped_prompts()[:count]
        for n, prompt in enumerate([prompts[0], *prompts]):
            for name, (one, spent) in made.items():
                if n == 1:
                    one.reset(), spent.clear()
                start = time.perf_counter()
                done = one.generate([prompt], SamplingParams(temperature=temperature, max_tokens=steps, seed=n))
                speed[name].append(len(done[0].outputs[0].token_ids) / (time.perf_counter() - start))
        base = statistics.mean(speed["plain"][1:])
        for name, (one, spent) in made.items():
            mean, c = statistics.mean(speed[name][1:]), one.counts
            print(f"T={temperature:.0f} {name:16}{c.emitted / c.steps:6.2f} tokens a step{statistics.median(spent):7.2f} ms a draft"
                  f"{mean:7.0f} tokens/s{mean / base:6.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=48, help="tokens per prompt and drafter; 0: forwards alone")
    parser.add_argument("--count", type=int, default=4, help="prompts")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    forwards(args.rounds, args.cpu_time)
    if args.steps:
        engines(args.steps, args.count)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
