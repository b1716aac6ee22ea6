"""How long does a rule take per step, beside one forward of a target of that vocabulary?

    python benchmarks/rules.py [--rounds 30] [--json]

Vocabularies of 4,096, 32,000 and 152,000; 1, 8 and 64 nodes (one sequence, a chain; for rules with trees also siblings).
Distributions are random, sharp, and agree as a draft of acceptance 0.8 does. The measured time is the rule alone: distributions are
ready. Beside it,
in the same rounds, the forward of that step: 1 + nodes rows of a 12-layer, 1024-wide decoder with that vocabulary, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

from outrider.threads import set_threads

set_threads()  # as a user has them

import torch  # noqa: E402
from native import chain as chain_rows  # noqa: E402
from native import decoder_config, random_weights  # noqa: E402

from outrider.models.native import load_native  # noqa: E402
from outrider.nn.kv import PagedKV  # noqa: E402
from outrider.noise import Noise  # noqa: E402
from outrider.types import Draft, Proposal  # noqa: E402
from outrider.verify import LOSSLESS, RULES, load_rule  # noqa: E402

VOCABULARIES = (4096, 32_000, 152_000)
NODES = (1, 8, 64)
FAR = 0.2


def distributions_of(rows: int, vocab: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Target distributions and draft distributions [rows, vocab] float32 with total variation near FAR."""
    rng = torch.Generator().manual_seed(seed)
    p = torch.softmax(3.0 * torch.randn(rows, vocab, generator=rng), -1)
    other = torch.softmax(3.0 * torch.randn(rows, vocab, generator=rng), -1)
    return p, (1 - FAR) * p + FAR * other


def case(vocab: int, nodes: int, trees: bool) -> tuple[torch.Tensor, Draft]:
    """A step of one sequence: a chain, or with `trees` pairs of i.i.d. siblings below a chain."""
    p, q = distributions_of(nodes + 1, vocab, nodes)
    parent = (
        tuple(range(-1, nodes - 1)) if not trees else tuple(2 * (k // 2) - 1 if k > 1 else -1 for k in range(nodes))
    )
    row = tuple(range(nodes)) if not trees else tuple(k // 2 * 2 for k in range(nodes))
    rng = torch.Generator().manual_seed(1)
    token = torch.cat([torch.multinomial(q[r : r + 1], 1, generator=rng)[0] for r in row])
    return p, Draft(token, parent, (nodes,), Proposal(q[:nodes], row))


def forward(vocab: int, rows: tuple[int, ...]) -> dict[int, Callable[[], object]]:
    """For each number of rows, a forward through a 12-layer decoder, or nothing where the native decoder does not run."""
    config = decoder_config(vocab, 1024, 12, 16, 2816)
    decoder, _ = load_native(config, random_weights(config, torch.bfloat16))
    if decoder is None:
        return {}
    kv = PagedKV(config.layers, 1, config.kv_heads, 256, config.head_dim, torch.bfloat16, torch.device("cpu"))
    kv.make_room(0, 256)
    kv.length[0] = 128
    return {n: partial(decoder.forward, chain_rows(n), kv) for n in rows}


def measure(vocab: int, rounds: int) -> list[dict[str, object]]:
    """Interleaved: every arm once a round, so that all meet the same noise."""
    arms: dict[tuple[str, int], Callable[[int], object]] = {}
    for nodes in NODES:
        for name in RULES:
            rule = load_rule(name)
            for trees in (False, True) if rule.trees and nodes > 1 else (False,):
                p, draft = case(vocab, nodes, trees)
                arms[name + (" on a tree" if trees else ""), nodes] = partial(_once, rule, p, draft)
    target = forward(vocab, (1, *(n + 1 for n in NODES)))
    spent: dict[tuple[str, int], list[float]] = {key: [] for key in arms}
    base: dict[int, list[float]] = {n: [] for n in target}
    chance = random.Random(rounds)
    for r in range(rounds + 2):
        for key in chance.sample(list(arms), len(arms)):
            arm = arms[key]
            start = time.perf_counter()
            arm(r)
            spent[key].append(time.perf_counter() - start)
        for n, call in target.items():
            call()
            start = time.perf_counter()
            call()
            base[n].append(time.perf_counter() - start)
    model = {n: statistics.median(times[2:]) for n, times in base.items()}
    return [
        {
            "rule": name,
            "lossless": name.split(" ")[0] in LOSSLESS,
            "nodes": nodes,
            "vocab": vocab,
            "microseconds": round(1e6 * statistics.median(times[2:]), 1),
            "share_of_forward": round(statistics.median(times[2:]) / model.get(nodes + 1, float("nan")), 4),
            "forward_of_one_row_ms": round(1e3 * model.get(1, float("nan")), 3),
            "forward_ms": round(1e3 * model.get(nodes + 1, float("nan")), 3),
        }
        for (name, nodes), times in spent.items()
    ]


def _once(rule: Callable[..., object], p: torch.Tensor, draft: Draft, r: int) -> object:
    return rule(p, draft, Noise((r,), (7,)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [row for vocab in VOCABULARIES for row in measure(vocab, args.rounds)]
    if args.json:
        print(json.dumps(rows))
        return
    print("| rule | " + " | ".join(f"V={v}, {n} nodes" for v in VOCABULARIES for n in NODES) + " |")
    print("|---|" + "---|" * (len(VOCABULARIES) * len(NODES)))
    steps = {(r["vocab"], r["nodes"]): r for r in rows}
    times = [steps[v, n] for v in VOCABULARIES for n in NODES]
    print(
        "| forward | "
        + " | ".join(f"{r['forward_ms']} ms ({r['forward_of_one_row_ms']} for one row)" for r in times)
        + " |"
    )
    for name in dict.fromkeys(row["rule"] for row in rows):
        cells = {(r["vocab"], r["nodes"]): r for r in rows if r["rule"] == name}
        line = [cells.get((v, n)) for v in VOCABULARIES for n in NODES]
        text = [
            f"{c['microseconds']:.0f} us ({100 * float(str(c['share_of_forward'])):.1f}%)" if c else "" for c in line
        ]
        print(f"| {name} | " + " | ".join(text) + " |")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
