"""Is a library that a wheel brings as fast as one compiled on this machine?

    python benchmarks/prebuilt.py [--threads 1] [--rounds 60] [--levels avx512_bf16 ...]

Both are built here as `pip wheel` and the first start build them: the wheel's for each set of instructions that this CPU has, ours
with all that the compiler finds in it. They decode the same weights in one process, in turns of random order; a figure is the
median over rounds of the ratio of times within a round (wheel's over compiled here; below 1: the wheel's is faster), with its 95%
bootstrap interval.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import numpy as np
import torch
from native import CACHED, chain, decoder_config, interleaved, random_weights, shipped_config
from peers.stats import ratio

from outrider import isa
from outrider.models.decoder import DecoderConfig
from outrider.models.native.runtime import NativeDecoder
from outrider.nn import compiled
from outrider.nn.compiled import DECODER
from outrider.nn.kv import PagedKV

HERE = "here"
ROWS = (1, 4)


def libraries(folder: Path, levels: Collection[str]) -> dict[str, ctypes.CDLL]:
    """The decoder compiled for this CPU, and the wheel's for those of its sets of instructions that `levels` names."""
    compiler = compiled.find_compiler()
    built = {HERE: compiled.build(DECODER, compiler, folder, openmp=True)}
    for level in (level for level in isa.levels() if level.name in levels):
        built[level.name] = compiled.build_for_wheel(DECODER, compiler, level, folder)
    return {name: ctypes.CDLL(str(path)) for name, path in built.items()}


def measure(title: str, config: DecoderConfig, dtype: torch.dtype, rounds: int, found: dict[str, ctypes.CDLL]) -> None:
    """Prints, per number of rows, the time of the library compiled here and the ratio of every other one to it."""
    weights = random_weights(config, dtype)
    kv = PagedKV(config.layers, 1, config.kv_heads, 512, config.head_dim, dtype, torch.device("cpu"))
    kv.k.normal_(), kv.v.normal_()
    kv.make_room(0, 512)
    kv.length[0] = CACHED
    decoders = {name: NativeDecoder(library, config, weights) for name, library in found.items()}
    print(f"{title}, {str(dtype)[6:]}, {torch.get_num_threads()} threads", flush=True)
    for n in ROWS:
        arms: dict[str, Callable[[], object]] = {k: partial(d.forward, chain(n), kv) for k, d in decoders.items()}
        times = {name: np.array(spent) for name, spent in interleaved(arms, rounds).items()}
        line = [f"  {n} rows: {np.median(times[HERE]):8.0f} us {HERE} ({decoders[HERE].kind})"]
        for name in found:
            if name != HERE and (r := ratio({name: times[name]}, {HERE: times[HERE]})) is not None:
                line.append(f"{name} {r.value:.3f} [{r.low:.3f}, {r.high:.3f}]")
        print("; ".join(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=60)
    names = [level.name for level in reversed(isa.levels())]
    parser.add_argument("--levels", nargs="+", choices=names, default=names, help="default: all that this CPU has")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="outrider-prebuilt-") as name:
        found = libraries(Path(name), args.levels)
    for dtype in (torch.bfloat16, torch.float32):
        measure("12 layers of 1024", decoder_config(8192, 1024, 12, 16, 2816), dtype, args.rounds, found)
        for part in ("target", "draft"):
            measure(f"shipped {part}", shipped_config(part), dtype, 10 * args.rounds, found)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
