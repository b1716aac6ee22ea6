"""How fast is one forward of the native decoder, and what part of the machine's reading speed is that?

    python benchmarks/native.py [--threads 1] [--rounds 40] [--float32]

Prints, for a 160M-parameter decoder and for a one-layer draft, microseconds per forward by number of rows (interleaved rounds,
10th percentile and median), the rate at which weights were read, and beside it, in the same rounds, a plain read of as much
memory and the same forwards through torch's operators (`LeanTarget` without the native decoder).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from outrider.assets import shipped
from outrider.models.decoder import DecoderConfig, DecoderWeights, LayerWeights
from outrider.models.lean import LeanTarget
from outrider.models.native import load_native
from outrider.nn.kv import ContiguousKV
from outrider.types import Draft, Rows

ROWS = (1, 2, 3, 4, 5, 6, 8, 16)
TORCH_ROWS = (1, 4, 8)
CACHED = 128


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
    return DecoderWeights(embedding, tuple(layer() for _ in range(c.layers)), ones, matrix(c.vocab_size, c.hidden), dtype)


def read_bytes(w: DecoderWeights) -> int:
    """Bytes of weights that a forward must read."""
    return sum(t.nbytes for layer in w.layers for t in (layer.qkv, layer.o, layer.gate_up, layer.down)) + w.head.nbytes


def chain(n: int) -> Rows:
    """One sequence: an anchor behind CACHED tokens and n - 1 drafted ones."""
    draft = Draft(torch.arange(1, n, dtype=torch.int64), tuple(range(-1, n - 2)), (n - 1,))
    return Rows.assemble([0], [[7]], [CACHED], draft)


def interleaved(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every arm in every round; arms take turns in random order, so that all meet the same noise and none is
    always in another's wake."""
    out: dict[str, list[float]] = {name: [] for name in arms}
    chance = random.Random(rounds)
    for r in range(rounds + 2):
        for name in chance.sample(list(arms), len(arms)):
            arm = arms[name]
            start = time.perf_counter()
            arm()
            if r >= 2:
                out[name].append(1e6 * (time.perf_counter() - start))
    return out


def measure(title: str, config: DecoderConfig, dtype: torch.dtype, rounds: int) -> None:
    weights = random_weights(config, dtype)
    decoder, _ = load_native(config, weights)
    if decoder is None:
        raise SystemExit("no native decoder here: run with logging to see why")
    kv = ContiguousKV(config.layers, 1, config.kv_heads, 512, config.head_dim, dtype, torch.device("cpu"))
    kv.k.normal_(), kv.v.normal_()
    kv.length[0] = CACHED
    size = read_bytes(weights)
    memory = torch.ones(size // 4)
    arms: dict[str, Callable[[], object]] = {"read": lambda: memory.sum()}
    arms |= {f"{n} rows": partial(decoder.forward, chain(n), kv) for n in ROWS}
    lean = LeanTarget(config, weights, native=False)
    arms |= {f"torch {n} rows": partial(lean.forward, chain(n), kv) for n in TORCH_ROWS}
    times = interleaved(arms, rounds)
    weights_read = f"{size / 1e6:.1f} MB of {str(dtype)[6:]} weights"
    print(f"{title}: {weights_read}, {CACHED} cached, {decoder.kind}, {torch.get_num_threads()} threads")
    best = statistics.quantiles(times["1 rows"], n=10)[0]
    for name, spent in times.items():
        p10, middle = statistics.quantiles(spent, n=10)[0], statistics.median(spent)
        ratio = "" if name == "read" else f"  {p10 / best:5.2f}x of one row"
        print(f"  {name:12} p10 {p10:9.1f} us  median {middle:9.1f} us  {size / p10 / 1e3:6.1f} GB/s{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--float32", action="store_true", help="float32 weights instead of bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = torch.float32 if args.float32 else torch.bfloat16
    measure("12 layers of 1024", decoder_config(8192, 1024, 12, 16, 2816), dtype, args.rounds)
    measure("1 layer of 192", decoder_config(4096, 192, 1, 3, 512), dtype, 20 * args.rounds)
    for part in ("target", "draft"):
        measure(f"shipped {part}", shipped_config(part), dtype, 10 * args.rounds)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
