"""A GGUF file of a random qwen3moe as large as one likes: load time, memory, speed plain and with n-gram drafts, in turns.

    python benchmarks/mixture_file.py model.gguf --build [--layers 8]     # writes it: layers of Qwen3-30B-A3B's shape in Q4_K
    python benchmarks/mixture_file.py model.gguf --rounds 4

Blocks are random bytes with scales for weights of a usual size, so that they have the entropy of real ones. A random model's text
repeats nothing, so it may write two tokens only, in which n-gram drafts find something: the acceptance is printed, and is no
property of real models.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.models.load import inspect_checkpoint, load_target
from outrider.nn.blocks import BlockType, named
from outrider.params import SamplingParams
from outrider.verify import load_rule

HIDDEN, HEADS, KV_HEADS, HEAD, COUNT, USED, INNER, VOCAB = 2048, 32, 4, 128, 128, 8, 768, 32000
PROMPT = [11, 12, 13, 14, 15, 16, 17, 18] * 2
TWO = {21: 100.0, 22: 100.0}
"""What the text is made of."""


def build(path: Path, layers: int) -> None:
    """Write the file, a tensor at a time."""
    import gguf

    keys = {
        "context_length": 32768, "embedding_length": HIDDEN, "block_count": layers, "feed_forward_length": 6144,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD,
        "attention.value_length": HEAD, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6, "expert_count": COUNT,
        "expert_used_count": USED, "expert_feed_forward_length": INNER, "vocab_size": VOCAB,
    }  # fmt: skip
    writer, rng = gguf.GGUFWriter(path, "qwen3moe"), np.random.default_rng(0)
    for key, value in keys.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"qwen3moe.{key}", value)
    writer.add_tokenizer_model("none")
    plan = shapes(layers)
    for name, (kind, shape) in plan.items():
        block, rows = named(kind), int(np.prod(shape[:-1]))
        size = (*shape[:-1], block.row_bytes(shape[-1]))
        number = gguf.GGMLQuantizationType(block.number)
        writer.add_tensor_info(name, size, np.dtype(np.uint8), rows * size[-1], number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (kind, shape) in plan.items():
        writer.write_tensor_data(values(name, named(kind), shape, rng))
    writer.close()


def shapes(layers: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor, as in a file of llama.cpp's Q4_K_M: some values and downs in Q6_K, the head too."""
    out: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("q4_k", (VOCAB, HIDDEN)),
        "output.weight": ("q6_k", (VOCAB, HIDDEN)),
        "output_norm.weight": ("f32", (HIDDEN,)),
    }
    for i in range(layers):
        more = "q6_k" if i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2 else "q4_k"
        own = {
            "attn_norm": ("f32", (HIDDEN,)), "ffn_norm": ("f32", (HIDDEN,)), "attn_q_norm": ("f32", (HEAD,)),
            "attn_k_norm": ("f32", (HEAD,)), "attn_q": ("q4_k", (HEADS * HEAD, HIDDEN)),
            "attn_k": ("q4_k", (KV_HEADS * HEAD, HIDDEN)), "attn_v": (more, (KV_HEADS * HEAD, HIDDEN)),
            "attn_output": ("q4_k", (HIDDEN, HEADS * HEAD)),
            "ffn_gate_inp": ("f32", (COUNT, HIDDEN)), "ffn_gate_exps": ("q4_k", (COUNT, INNER, HIDDEN)),
            "ffn_up_exps": ("q4_k", (COUNT, INNER, HIDDEN)), "ffn_down_exps": (more, (COUNT, HIDDEN, INNER)),
        }  # fmt: skip
        out |= {f"blk.{i}.{name}.weight": found for name, found in own.items()}
    return out


def values(name: str, block: BlockType, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Bytes of a tensor: ones for norms, numbers of a normal distribution for routers, random blocks for the others."""
    if block.name == "f32":
        drawn = rng.standard_normal(shape) / HIDDEN**0.5 * 3 if len(shape) > 1 else np.ones(shape)
        return drawn.astype(np.float32).view(np.uint8)
    rows, scale = int(np.prod(shape[:-1])), (1.0 if name == "token_embd.weight" else shape[-1] ** -0.5)
    out = rng.integers(0, 256, (rows * shape[-1] // block.values, block.bytes), dtype=np.uint8)
    d = np.float16(scale / (150 if block.name == "q4_k" else 1300))  # codes times scales spread about so much
    if block.name == "q4_k":
        out[:, :2], out[:, 2:4] = (np.array([x], np.float16).view(np.uint8) for x in (d, np.float16(7.5 * d)))
    else:
        out[:, 208:] = np.array([d]).view(np.uint8)
    return out.reshape(*shape[:-1], -1)


def resident(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def measure(path: Path, rounds: int, tokens: int, lengths: list[int]) -> None:
    """Load the file, decode in turns, print."""
    before, start, spent = resident("VmRSS"), time.perf_counter(), time.process_time()
    target = load_target(path)
    loaded = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - spent}
    memory = {"after": resident("VmRSS") - before, "peak": resident("VmHWM") - before}
    speeds: dict[int, list[float]] = {n: [] for n in lengths}
    ratios: dict[int, list[float]] = {n: [] for n in lengths}
    accepted, texts = {}, set()
    for turn in range(rounds + 1):
        plain = 0.0
        for n in lengths:
            drafter = NGram(n) if n else NoDraft()
            engine = Engine(
                target, drafter, load_rule("speculative_sampling"), Fixed(n), slots=1, max_length=tokens + 64
            )
            begin = time.perf_counter()
            asked = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, logit_bias=TWO)
            (result,) = engine.generate([PROMPT], [asked])
            speed = tokens / (time.perf_counter() - begin)
            texts.add(result.outputs[0].token_ids)
            plain = plain or speed
            c = engine.counts
            accepted[n] = c.accepted / max(c.accepted + c.rejected, 1)
            if turn:  # the first one warms up
                speeds[n].append(speed)
                ratios[n].append(speed / plain)
    use = target.row_work  # type: ignore[attr-defined]
    print(json.dumps({
        "file_bytes": path.stat().st_size, "experts": inspect_checkpoint(path).experts, "threads": torch.get_num_threads(),
        "load": {k: round(v, 2) for k, v in loaded.items()},
        "memory_mb": {k: round(v / 1e6) for k, v in memory.items()},
        "peak_beyond_file_mb": round((memory["peak"] - path.stat().st_size) / 1e6),
        "tokens_per_second": {n: round(median(x), 2) for n, x in speeds.items()},
        "over_plain": {n: [round(f(x), 2) for f in (median, min, max)] for n, x in ratios.items()},
        "accepted": {n: round(a, 2) for n, a in accepted.items()}, "texts": len(texts),
        "v_model": [round(use(n), 2) for n in range(1, 9)], "repeat": round(use.routing.repeat, 2),
    }, indent=1))  # fmt: skip


def main() -> None:
    """Write the file, or measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lengths", default="0,1,3", help="draft lengths, 0 first: plain decoding")
    options = parser.parse_args()
    if options.build:
        build(options.file, options.layers)
    else:
        measure(options.file, options.rounds, options.tokens, [int(n) for n in options.lengths.split(",")])


if __name__ == "__main__":
    main()
