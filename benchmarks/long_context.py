"""What does a forward cost by rows and by cached tokens, and what does drafting over a sparse view of the cache gain?

    python benchmarks/long_context.py [--contexts 256,4096,8192,16384] [--rows 1,2,4,6,8,16] [--threads 2] [--rounds 10]
        [--kv-dtypes auto,int8]

A target of the shipped pair's shape with random weights, one sequence, bfloat16, a cache of random numbers. For each
context: the time of one row and the ratios of more rows to it, the time of one row that sees `--view` of the cached tokens
only, and what these times predict for a sparse self-draft at acceptances of 0.8, 0.9 and 0.95
(`theory.roofline.self_draft_speedup`), best length of 1 to 12. Rows take turns in random order; times are the least of the
rounds. `--cpu-time`: seconds that one thread spent computing and waiting for memory instead of seconds on the clock, for
machines that others use too (one thread). `--kv-dtypes`: caches that are compared (`--kv-dtype`), all in turn; times are given as
ratios to one row of the first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from native import chain, interleaved, random_weights, shipped_config

from outrider.evaluate.planning.contexts import randomise
from outrider.models.decoder import DecoderConfig
from outrider.models.native import load_native
from outrider.nn.kv import PagedKV
from outrider.nn.stored import stored_as
from outrider.theory.roofline import self_draft_speedup
from outrider.types import Rows

LENGTHS = range(1, 13)


def narrowed(rows: Rows, cached: int, view: int) -> Rows:
    """The same rows, which see the first 16 and the newest of `cached` tokens, `view` in all."""
    if not 0 < view < cached:
        return rows
    seen = ((0, 16), (cached - view + 16, cached))
    return replace(rows, segments=tuple(replace(s, view=seen) for s in rows.segments))


def filled(config: DecoderConfig, kv_dtype: str, cached: int) -> PagedKV:
    """A cache of random numbers for one sequence."""
    stored = stored_as(kv_dtype, torch.bfloat16, config.head_dim)
    sizes = config.layers, 1, config.kv_heads, cached + 64, config.head_dim
    kv = PagedKV(*sizes, torch.bfloat16, torch.device("cpu"), stored=stored)
    kv.make_room(0, cached + 64)
    randomise(kv)
    kv.length[0] = cached
    return kv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="256,4096,8192,16384")
    parser.add_argument("--rows", default="1,2,4,6,8,16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--view", type=int, default=512)
    parser.add_argument("--kv-dtypes", default="auto")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = shipped_config("target")
    decoder, _ = load_native(config, random_weights(config, torch.bfloat16))
    if decoder is None:
        raise SystemExit("no native decoder here: run with logging to see why")
    sizes = [int(n) for n in args.rows.split(",")]
    print(f"{decoder.kind}, {args.threads} threads, {'CPU' if args.cpu_time else 'wall'} time; rows: {sizes}")
    for cached in map(int, args.contexts.split(",")):
        caches = {name: filled(config, name, cached) for name in args.kv_dtypes.split(",")}
        more = sorted({*sizes, 1, 6})
        arms: dict[str, Callable[[], object]] = {}
        for name, kv in caches.items():
            arms |= {f"{name} {n}": partial(decoder.forward, chain(n, cached), kv) for n in more}
            arms[f"{name} view"] = partial(decoder.forward, narrowed(chain(1, cached), cached, args.view), kv)
        spent = interleaved(arms, args.rounds, time.thread_time if args.cpu_time else time.perf_counter)
        took = {name: min(each) for name, each in spent.items()}
        first = took[f"{next(iter(caches))} 1"]
        for name in caches:
            one, view = took[f"{name} 1"], took[f"{name} view"]
            step = (took[f"{name} 6"] / one - 1) / 5  # of a row more, in passes
            gains = [max(self_draft_speedup(a, n, view / one, 1 + step * n) for n in LENGTHS) for a in (0.8, 0.9, 0.95)]
            ratios = " ".join(f"{took[f'{name} {n}'] / first:.2f}" for n in sizes)
            print(
                f"  {cached:6} cached, {name}: one row {one / 1e3:7.2f} ms, ratios {ratios}; "
                f"view {view / one:.2f}, predicted gain {' '.join(f'{g:.2f}' for g in gains)}"
            )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
