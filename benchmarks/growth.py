"""Tokens, drafted nodes and levels per target pass for several ways to grow a draft, and their rate at assumed times.

Counts do not depend on the machine. The rate is tokens per unit of time if a target pass takes 1, a level of drafting `--level` and
a verified row `--row`; drafters whose levels come from one pass have `--level 0`.

    python benchmarks/growth.py --every 3 --length 8 --draft DRAFT --draft stop:0.2:DRAFT
    python benchmarks/growth.py --every 3 --length 6 --temperature 1 --rule traversal --draft dynamic:12x4:DRAFT

DRAFT stands for the shipped draft model.
"""

from __future__ import annotations

import argparse
import json

from outrider.assets import HERE, shipped
from outrider.build import Engine, build_engine, companion
from outrider.params import SamplingParams


def counted(engine: Engine, prompts: list[str], temperature: float, tokens: int) -> tuple[float, float, float]:
    """Per target pass of a sequence: tokens, drafted nodes, and levels of its draft."""
    inner, levels = engine.parts.drafter.draft, [0]

    def draft(evidence, budget):
        made = inner(evidence, budget)
        levels[0] += sum(max((len(made.path_to(k)) for k in made.nodes(b)), default=0) for b in range(len(made.counts)))
        return made

    engine.parts.drafter.draft = draft  # type: ignore[method-assign]
    params = [
        SamplingParams(temperature=temperature, max_tokens=tokens, seed=i, ignore_eos=True) for i in range(len(prompts))
    ]
    engine.generate(prompts, params)
    c = engine.counts
    return c.tokens / c.steps, c.proposed / c.steps, levels[0] / c.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", action="append", required=True)
    parser.add_argument("--length", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rule", default="auto")
    parser.add_argument("--every", type=int, default=1, help="use every n-th of the shipped prompts")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--level", type=float, default=0.07)
    parser.add_argument("--row", type=float, default=0.03)
    args = parser.parse_args()
    rows = (HERE / "pycode" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(row)["prompt"] for row in rows][:: args.every]
    base = build_engine(length=1, slots=16)
    print("draft, rule, tokens per pass, nodes, levels, rate")
    for spec in args.draft:
        named = spec.replace("DRAFT", str(shipped("draft")))
        engine = companion(base, named, length=args.length, rule=args.rule)
        tokens, nodes, levels = counted(engine, prompts, args.temperature, args.tokens)
        rate = tokens / (1.0 + args.level * levels + args.row * nodes)
        print(f"{spec}, {engine.parts.rule.name}, {tokens:.2f}, {nodes:.2f}, {levels:.2f}, {rate:.2f}", flush=True)


if __name__ == "__main__":
    main()
