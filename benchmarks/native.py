"""How fast is one forward of the native decoder, and what part is that of what the machine can do at most?

    python benchmarks/native.py [--threads 1] [--rounds 20] [--types bf16,q8_0,q4_0,q4_k] [--sizes 163m,478m,shipped]

For each type of weights and 1 to 8 rows: v = time of the rows / time of one, and rho = time / max(bytes / bandwidth, operations /
peak). Bandwidth (the best of reads in 1, 2, 4 and 8 streams) and peaks (products of bytes, of bfloat16, of float32, from the first
cache) are measured in the same rounds, in random order with the forwards, by probe.cpp. All times are the least of the rounds: what
neighbours do only adds to them. Attention and norms of a forward count as overhead. `--torch`: beside plain types, the same
forwards through torch's operators. `--cpu-time`: processor time of one thread instead of the clock, for a machine that others use.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from outrider import isa
from outrider.assets import shipped
from outrider.models.decoder import DecoderConfig, DecoderWeights, LayerWeights
from outrider.models.lean import LeanTarget
from outrider.models.native import load_native
from outrider.models.quantised import QUANTIZE, quantised
from outrider.nn import compiled
from outrider.nn.kv import PagedKV
from outrider.types import Draft, Rows

ROWS = (1, 2, 3, 4, 5, 6, 7, 8)
TORCH_ROWS = (1, 4, 8)
CACHED = 128
STREAMS = (1, 2, 4, 8)
PLAIN = {"bf16": torch.bfloat16, "float32": torch.float32}


def decoder_config(vocab: int, hidden: int, layers: int, heads: int, inner: int) -> DecoderConfig:
    width = hidden // heads
    inv_freq = 10000.0 ** -(torch.arange(0, width, 2).float() / width)
    return DecoderConfig(
        "llama", vocab, hidden, layers, heads, heads, width, inner, 1e-5, 1024, (0,) * layers, inv_freq
    )


def shipped_config(part: str) -> DecoderConfig:
    """The shape of the shipped pair's target or draft."""
    c = json.loads((shipped(part) / "config.json").read_text())
    return decoder_config(
        c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["intermediate_size"]
    )


def random_weights(c: DecoderConfig, dtype: torch.dtype) -> DecoderWeights:
    rng = torch.Generator().manual_seed(0)
    ones = torch.ones(c.hidden, dtype=dtype)

    def matrix(rows: int, columns: int) -> Tensor:
        return (columns**-0.5 * torch.randn(rows, columns, generator=rng)).to(dtype)

    def layer() -> LayerWeights:
        sizes = [(3 * c.hidden, c.hidden), (c.hidden, c.hidden), (2 * c.inner, c.hidden), (c.hidden, c.inner)]
        qkv, o, gate_up, down = (matrix(*size) for size in sizes)
        return LayerWeights(ones, qkv, None, None, None, o, None, ones, gate_up, down)

    embedding = matrix(c.vocab_size, c.hidden)
    return DecoderWeights(
        embedding, tuple(layer() for _ in range(c.layers)), ones, matrix(c.vocab_size, c.hidden), dtype
    )


def read_bytes(w: DecoderWeights) -> int:
    """Bytes of weights that a forward must read, as they are stored."""
    size = lambda t: sum(s.rows.nbytes for s in t) if isinstance(t, tuple) else t.nbytes  # noqa: E731
    return sum(size(t) for layer in w.layers for t in (layer.qkv, layer.o, layer.gate_up, layer.down)) + size(w.head)


def products(w: DecoderWeights) -> int:
    """Multiplications of one row."""
    count = lambda t: sum(s.outputs * s.inputs for s in t) if isinstance(t, tuple) else t.numel()  # noqa: E731
    return sum(count(t) for layer in w.layers for t in (layer.qkv, layer.o, layer.gate_up, layer.down)) + count(w.head)


def chain(n: int, cached: int = CACHED) -> Rows:
    """One sequence: an anchor behind `cached` tokens and n - 1 drafted ones."""
    draft = Draft(torch.arange(1, n, dtype=torch.int64), tuple(range(-1, n - 2)), (n - 1,))
    return Rows.assemble([0], [[7]], [cached], draft)


def interleaved(
    arms: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Microseconds of every arm in every round; arms take turns in random order, so that all meet the same noise and none is
    always in another's wake."""
    out: dict[str, list[float]] = {name: [] for name in arms}
    chance = random.Random(rounds)
    for r in range(rounds + 2):
        for name in chance.sample(list(arms), len(arms)):
            arm = arms[name]
            start = clock()
            arm()
            if r >= 2:
                out[name].append(1e6 * (clock() - start))
    return out


class Probe:
    """probe.cpp: what this machine can do at most, measured by the same clock in the same rounds."""

    def __init__(self, threads: int) -> None:
        unit = compiled.Unit("probe", Path(__file__).parent, True, "")
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "probe.so"
            choice = isa.chosen()  # the limits of the decoder's instructions, of which OUTRIDER_ISA may take some away
            level = ("-march=native",) if choice.native or choice.level is None else choice.level.flags
            flags = [*compiled.FLAGS, *level, "-fopenmp", f"-I{compiled.DECODER.folder}"]
            compiled.compile_unit(unit, compiled.find_compiler(), flags, made)
            self.library = ctypes.CDLL(str(made))
        for name in ("probe_read", "probe_bytes", "probe_bf16", "probe_float"):
            getattr(self.library, name).restype = ctypes.c_int64
        self.threads, self.memory = threads, torch.ones(1 << 26)
        self.sink = torch.zeros(256, dtype=torch.int64)

    def read(self, size: int, streams: int) -> None:
        whole = ctypes.c_int64
        self.library.probe_read(
            ctypes.c_void_p(self.memory.data_ptr()), whole(size), whole(self.threads), whole(streams)
        )

    def peak(self, kind: str, count: int) -> int:
        """Products done by all threads."""
        more = (ctypes.c_void_p(self.sink.data_ptr()),) if kind == "bytes" else ()
        run = getattr(self.library, f"probe_{kind}")
        return self.threads * run(ctypes.c_int64(self.threads), ctypes.c_int64(count), *more)


PEAKS = {"bytes": 100_000, "bf16": 20_000, "float": 10_000}
"""Kind of products -> repetitions that take some milliseconds."""


def measure(
    title: str,
    config: DecoderConfig,
    types: list[str],
    rounds: int,
    with_torch: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    probe, arms, facts = Probe(torch.get_num_threads()), {}, {}
    for name in types:
        dtype = PLAIN.get(name, torch.bfloat16)
        plain = random_weights(config, dtype)
        weights = plain if name in PLAIN else quantised(plain, name)
        weights = replace(weights, layers=tuple(weights.layers))
        facts[name] = read_bytes(weights), products(weights)
        decoder, _ = load_native(config, weights)
        if decoder is None:
            raise SystemExit("no native decoder here: run with logging to see why")
        kv = PagedKV(config.layers, 1, config.kv_heads, 512, config.head_dim, dtype, torch.device("cpu"))
        kv.k.normal_(), kv.v.normal_()
        kv.make_room(0, 512)
        kv.length[0] = CACHED
        arms |= {f"{name} {n}": partial(decoder.forward, chain(n), kv) for n in ROWS}
        if with_torch and name in PLAIN:
            lean = LeanTarget(config, plain, native=False)
            arms |= {f"torch {name} {n}": partial(lean.forward, chain(n), kv) for n in TORCH_ROWS}
    size = min(max(size for size, _ in facts.values()), probe.memory.nbytes)
    arms |= {f"read {n}": partial(probe.read, size, n) for n in STREAMS}
    arms |= {f"peak {kind}": partial(probe.peak, kind, count) for kind, count in PEAKS.items()}
    times = {arm: min(spent) for arm, spent in interleaved(arms, rounds, clock).items()}
    bandwidth = max(size / times[f"read {n}"] for n in STREAMS)  # bytes per microsecond
    peaks = {kind: probe.peak(kind, count) / times[f"peak {kind}"] for kind, count in PEAKS.items()}
    print(f"{title}: {CACHED} cached, {decoder.kind}, {probe.threads} threads; read {bandwidth / 1e3:.1f} GB/s (in "
          + ", ".join(f"{n}: {size / times[f'read {n}'] / 1e3:.1f}" for n in STREAMS)
          + " streams); 10^9 products a second: " + ", ".join(f"{k} {v / 1e3:.0f}" for k, v in peaks.items()))  # fmt: skip
    for name in types:
        stored, work = facts[name]
        one, peak = times[f"{name} 1"], peaks[{"bf16": "bf16", "float32": "float"}.get(name, "bytes")]
        v = [times[f"{name} {n}"] / one for n in ROWS]
        rho = [times[f"{name} {n}"] / max(stored / bandwidth, n * work / peak) for n in ROWS]
        line = lambda values: " ".join(f"{x:5.2f}" for x in values)  # noqa: E731
        print(f"  {name:8}{stored / 1e6:8.1f} MB  one row {one / 1e3:8.3f} ms  v {line(v)}  rho {line(rho)}")
    for arm, spent in times.items():
        if arm.startswith("torch"):
            print(f"  {arm:16} {spent / 1e3:8.3f} ms")


SIZES = {
    "163m": ("12 layers of 1024", lambda: decoder_config(8192, 1024, 12, 16, 2816)),
    "478m": ("16 layers of 1536", lambda: decoder_config(8192, 1536, 16, 24, 4096)),
    "layer": ("1 layer of 1024", lambda: decoder_config(2048, 1024, 1, 16, 2816)),
    "narrow": ("160 layers of 288", lambda: decoder_config(8192, 288, 160, 6, 768)),
    "shipped": ("shipped target", lambda: shipped_config("target")),
    "draft": ("shipped draft", lambda: shipped_config("draft")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    known = ", ".join((*PLAIN, *QUANTIZE))
    parser.add_argument("--types", default="bf16,float32,q8_0,q6_k,q5_k,q4_k,q4_0,int8", help=f"of {known}")
    parser.add_argument("--sizes", default="163m,shipped,draft", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--torch", action="store_true", help="torch's operators beside plain types")
    parser.add_argument("--cpu-time", action="store_true", help="processor time; with --threads 1")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("processor time is that of one thread: add --threads 1")
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    for size in args.sizes.split(","):
        title, config = SIZES[size]
        measure(title, config(), args.types.split(","), args.rounds, args.torch, clock)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
