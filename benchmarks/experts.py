"""Draft lengths on a mixture of experts: what a dense model of its active size would choose, and what `theory.experts` does.

A random target whose rows use 8 of 64 experts, beyond the caches, and a dense one that multiplies a row with as many weights.
Drafts are the target's own greedy text with tokens replaced at the wanted rate, so that acceptance is the same for all lengths and
drafting costs nothing. Both lengths decode the same prompts, in turns; the printed ratio is that of the medians of their speeds,
with the smallest and the largest ratio of neighbouring turns.

    python benchmarks/experts.py --acceptance 0.7 --rounds 5
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.none import NoDraft
from outrider.models.decoder import DecoderConfig, DecoderWeights, Experts, LayerWeights
from outrider.models.lean import LeanTarget
from outrider.params import SamplingParams
from outrider.protocols import Drafter
from outrider.theory.experts import best_length, possible_gain
from outrider.types import Draft, Evidence, Rows
from outrider.verify import load_rule

LAYERS, HIDDEN, VOCAB, COUNT, USED, INNER = 8, 512, 512, 64, 8, 256
LONGEST = 8
PROMPT = [1, 2, 3, 4]


def target(experts: bool) -> LeanTarget:
    """Random bfloat16 weights; without experts one SwiGLU of the width that a row's experts have together."""
    rng, heads = torch.Generator().manual_seed(0), HIDDEN // 64

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return (gain * columns**-0.5 * torch.randn(rows, columns, generator=rng)).bfloat16()

    def layer() -> LayerWeights:
        one = torch.ones(HIDDEN).bfloat16()
        width, copies = (COUNT * INNER, COUNT) if experts else (USED * INNER, 1)
        return LayerWeights(
            norm1=one, qkv=matrix(3 * HIDDEN, HIDDEN), qkv_bias=None, q_norm=None, k_norm=None, o=matrix(HIDDEN, HIDDEN),
            o_bias=None, norm2=one, gate_up=matrix(2 * width, HIDDEN), down=matrix(copies * HIDDEN, width // copies),
            router=matrix(COUNT, HIDDEN) if experts else None,
        )  # fmt: skip

    mixture = Experts(COUNT, USED, INNER, True, (True,) * LAYERS) if experts else None
    config = DecoderConfig(
        "qwen3_moe" if experts else "llama", VOCAB, HIDDEN, LAYERS, heads, heads, 64, USED * INNER, 1e-6, 4096, (0,) * LAYERS,
        10000.0 ** -(torch.arange(0, 64, 2).float() / 64), experts=mixture,
    )  # fmt: skip
    layers = tuple(layer() for _ in range(LAYERS))
    weights = DecoderWeights(
        matrix(VOCAB, HIDDEN, 20.0), layers, torch.ones(HIDDEN).bfloat16(), matrix(VOCAB, HIDDEN), torch.bfloat16
    )
    return LeanTarget(config, weights)


class Known:
    """Drafts the text that the target will write, with wrong tokens at some places of the text."""

    name, layers, trees = "known", (), False

    def __init__(self, text: Sequence[int], wrong: set[int], depth: int) -> None:
        self.text, self.wrong = text, wrong
        self.max_depth = self.max_nodes = depth

    def bind(self, slots: int, length: int) -> None:
        """Nothing to allocate."""

    def release(self, slots: Sequence[int]) -> None:
        """Nothing to forget."""

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """The next tokens of the text, behind what was emitted."""
        at = len(evidence.sequences[0].tokens) - len(PROMPT)
        places = range(at, min(at + budget[0], len(self.text)))
        tokens = [(self.text[i] + (i in self.wrong)) % VOCAB for i in places]
        return Draft(torch.tensor(tokens, dtype=torch.int64), tuple(range(-1, len(tokens) - 1)), (len(tokens),))


def decode(model: LeanTarget, drafter: Drafter, length: int, tokens: int) -> tuple[float, tuple[int, ...]]:
    """Tokens per second and the text of one greedy request."""
    engine = Engine(model, drafter, load_rule("speculative_sampling"), Fixed(length), slots=1, max_length=tokens + 32)
    start = perf_counter()
    (result,) = engine.generate([PROMPT], [SamplingParams(max_tokens=tokens, temperature=0.0)])
    return tokens / (perf_counter() - start), result.outputs[0].token_ids


def times(model: LeanTarget, rounds: int) -> list[float]:
    """Seconds of forwards of 1 to LONGEST + 1 rows behind 64 tokens, interleaved: medians."""
    kv = model.new_kv(1, 128)
    start = Rows.assemble([0], [[i % VOCAB for i in range(64)]], [0], Draft.empty(1))
    model.forward(start, kv)
    kv.commit(start, [()])
    found: list[list[float]] = [[] for _ in range(LONGEST + 1)]
    for turn in range(rounds):
        for n in range(LONGEST + 1):
            draft = Draft(torch.arange(n) * 37 % VOCAB, tuple(range(-1, n - 1)), (n,))
            rows = Rows.assemble([0], [[(turn * 13 + n) % VOCAB]], [64], draft)
            begin = perf_counter()
            model.forward(rows, kv)
            found[n].append(perf_counter() - begin)
    return [median(x) for x in found]


def main() -> None:
    """Measure both models, let both choose, and run both choices on the mixture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acceptance", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    mixture, dense = target(True), target(False)
    _, text = decode(mixture, NoDraft(), 0, options.tokens)
    chance = torch.rand(options.tokens, generator=torch.Generator().manual_seed(1)).tolist()
    wrong = {i for i, x in enumerate(chance) if x > options.acceptance}
    measured, flat = times(mixture, 40), times(dense, 40)
    work = mixture.row_work
    assert work is not None
    model = [work(n + 1) for n in range(LONGEST + 1)]
    by_dense = best_length(options.acceptance, 0.0, [t / flat[0] for t in flat])
    by_model = best_length(options.acceptance, 0.0, model)
    lengths = (by_dense[0], by_model[0], 0)
    speeds: dict[int, list[float]] = {n: [] for n in lengths}
    for _ in range(options.rounds):
        for n in speeds:
            speed, same = decode(mixture, Known(text, wrong, n) if n else NoDraft(), n, options.tokens)
            assert same == text
            speeds[n].append(speed)
    pairs = [a / b for a, b in zip(speeds[lengths[1]], speeds[lengths[0]], strict=True)]
    print(json.dumps({
        "acceptance": options.acceptance, "threads": options.threads, "experts": f"{USED} of {COUNT}",
        "v_measured": [round(t / measured[0], 2) for t in measured], "v_model": [round(x, 2) for x in model],
        "v_dense": [round(t / flat[0], 2) for t in flat], "repeat": round(work.routing.repeat, 3),
        "length_dense": lengths[0], "length_experts": lengths[1],
        "possible": {
            name: round(possible_gain(options.acceptance, 0.0, v, lengths[0]), 3)
            for name, v in (("model", model), ("measured", measured))
        },
        "tokens_per_second": {n: round(median(x), 1) for n, x in speeds.items()},
        "ratio": round(median(speeds[lengths[1]]) / median(speeds[lengths[0]]), 3),
        "ratio_range": [round(min(pairs), 3), round(max(pairs), 3)],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
