"""How long do the forwards of the shipped learned drafters take, beside the time that their weights take to read?

    python benchmarks/drafts.py [--threads 2] [--rounds 30] [--steps 48]

One EAGLE level, the rows it catches up with, heads (side by side: four fresh ones as wide as the target; one after the other: the
shipped ones' first level, and a further one), and a block with its injected rows: each alone, behind 128 rows of
context, in random order with the torch twins and with reads of memory, whose speed (the best of 1 to 8 streams, probe.cpp) says
how long a forward's weights take to read. All times are the least of the rounds. Then whole drafts in an engine: milliseconds per
step of `draft`, with sampling, the forest and the catch-up, and the speed beside plain decoding; prompts are interleaved over the
drafters.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from native import STREAMS, Probe, interleaved

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

CONTEXT = 128
READ = 1 << 26
LEVELS = 4
CPU = torch.device("cpu")


def arms() -> dict[str, tuple[int, Callable[[], object], Callable[[], object]]]:
    """Name -> bytes of weights that are read, the native forward, its torch twin."""
    target = load_target(str(shipped("target")))
    eagle = Eagle3Network.load(shipped("eagle"), target)
    sizes = MedusaConfig(target.hidden_size, target.vocab_size, LEVELS, target.layers)
    medusa = MedusaNetwork(sizes).requires_grad_(False)
    block = DFlashNetwork.load(shipped("dflash"), target, str(shipped("target")))
    library = library_for(eagle.fc.weight)
    if library is None:
        raise SystemExit("no native decoder here: run with logging to see why")
    out: dict[str, Any] = {}

    def cache(run: Any, c: Any, layers: int) -> RowCache:
        made = RowCache(layers, 1, c.kv_heads, CONTEXT + 32, c.head_dim, run.dtype, CPU)
        made.k.normal_(), made.v.normal_()
        return made

    c, state = eagle.config, torch.randn(1, target.hidden_size)
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
    out["EAGLE, a level"] = own, *(partial(level, r, cache(r, c, 1)) for r in runs)
    out["EAGLE, 3 kept rows"] = own + bytes_of(eagle.fc), *(partial(read, r, cache(r, c, 1)) for r in runs)
    heads = medusa_heads.native(library, medusa, LEVELS), medusa_heads.stacked(medusa, LEVELS)
    out[f"Medusa, {LEVELS} heads"] = bytes_of(medusa), *(partial(h, state) for h in heads)

    out |= sequence_arms(library, target)
    d = block.config
    blocks = block_forward.NativeForward(library, block), block_forward.TorchForward(block, CONTEXT + 32)
    hidden = [torch.randn(8, target.hidden_size).to(target.dtype) for _ in d.taps]

    def draft(run: Any, kv: RowCache) -> object:
        rows = Rows(mutual=True, scored=range(1, d.block))
        rows.add(0, CONTEXT, [7, *(d.mask,) * (d.block - 1)], range(CONTEXT, CONTEXT + d.block))
        return run.block(rows, kv)

    def inject(run: Any, kv: RowCache) -> None:
        rows = Rows()
        rows.add(0, CONTEXT, [0, 0, 0], range(CONTEXT, CONTEXT + 3))
        run.inject(rows, kv, hidden, [0, 1, 2])

    out["block, 8 rows"] = (
        bytes_of(block.layers, block.norm, block.lm_head),
        *(partial(draft, r, cache(r, d, d.layers)) for r in blocks),
    )
    keys = [p for layer in block.layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]  # type: ignore[union-attr]
    out["block, 3 kept rows"] = bytes_of(block.fc, *keys), *(partial(inject, r, cache(r, d, d.layers)) for r in blocks)
    return out


def sequence_arms(library: Any, target: Any) -> dict[str, Any]:
    """The first level of sequential heads, and a further one."""
    heads = SequentialNetwork.load(shipped("medusa"), target)
    runs = sequential_forward.NativeForward(library, heads), sequential_forward.TorchForward(heads)
    state, taps = torch.randn(1, heads.config.width), torch.randn(len(heads.config.taps), 1, target.hidden_size)
    own = bytes_of(heads.layers, heads.norm, heads.lm_head)
    first = (partial(r.forward, [7], taps=taps.to(target.dtype)) for r in runs)
    return {
        "sequential, a level": (own, *(partial(r.forward, [7], state=state) for r in runs)),
        "sequential, the first": (own + bytes_of(heads.fc), *first),
    }


def bytes_of(*parts: torch.nn.Module) -> int:
    """Of weights in bfloat16."""
    return 2 * sum(p.numel() for part in parts for p in part.parameters())


def forwards(rounds: int) -> None:
    probe, made = Probe(torch.get_num_threads()), arms()
    timed: dict[str, Callable[[], object]] = {}
    for name, (_, native, twin) in made.items():
        timed |= {name: native, f"torch {name}": twin}
    timed |= {f"read {n}": partial(probe.read, READ, n) for n in STREAMS}
    times = {name: min(spent) for name, spent in interleaved(timed, rounds).items()}
    speed = max(READ / times[f"read {n}"] for n in STREAMS)  # bytes per microsecond
    print(f"{torch.get_num_threads()} threads, {speed / 1e3:.1f} GB/s; microseconds, the least of {rounds} rounds")
    print(f"{'':22}{'weights':>10}{'read':>8}{'native':>8}{'ratio':>7}{'torch':>8}")
    for name, (size, _, _) in made.items():
        read, own = size / speed, times[name]
        print(f"{name:22}{size / 1e6:7.2f} MB{read:8.0f}{own:8.0f}{own / read:7.2f}{times[f'torch {name}']:8.0f}")


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


DRAFTS = {"plain": ("none", 0), "draft model, 5": (str(shipped("draft")), 5), "EAGLE, 4": ("eagle", 4), "EAGLE, 5": ("eagle", 5),
          "EAGLE, dynamic": ("dynamic:16:eagle", 4), "Medusa, 4": ("medusa", 4), "block, 7": ("dflash", 7)}  # fmt: skip


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
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    forwards(args.rounds)
    if args.steps:
        engines(args.steps, args.count)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
