"""Which exact rule is fastest end to end? The same draft, prompts and lengths under several rules, interleaved.

    python benchmarks/rules_bench.py [--target DIR --draft DIR] [--length 4] [--rules speculative_sampling block]

Prints tokens per second with 10% and 90%, the ratio to the first rule with its 95% interval, tokens per step, and the ledger.
"""

from __future__ import annotations

import argparse

from outrider.build import build_engine, companion
from outrider.evaluate.measure import Arm, run_arms
from outrider.evaluate.records import summarise
from outrider.evaluate.workloads import load_prompts
from outrider.params import SamplingParams
from outrider.telemetry.ledger import acceptance_length, ledger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target"), parser.add_argument("--draft", default="auto")
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--rules", nargs="+", default=["speculative_sampling", "block"])
    parser.add_argument("--shapes", nargs="*", default=[], help="trees of the draft, judged by the first rule")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=96)
    args = parser.parse_args()
    engine = build_engine(args.target, args.draft, length=args.length, slots=1, max_length=512)
    path = args.draft if args.draft != "auto" else str(engine.loaded.path).removesuffix("target") + "draft"
    arms = [Arm(rule, companion(engine, path, rule=rule)) for rule in args.rules]
    arms += [Arm(shape, companion(engine, f"{shape}:{path}", rule=args.rules[0])) for shape in args.shapes]
    arms.append(Arm("plain", companion(engine, "none", length=0)))
    texts = [engine.encode(p) for p in load_prompts(None, args.count)]
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, ignore_eos=True)
    records = run_arms(arms, texts, params, batch=1, repeats=args.repeats, warmup=1, seed=0)
    for s in summarise(records, arms[0].name):
        book, ratio = ledger(s.counts), s.speedup
        against = f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" if ratio is not None else ""
        shares = ", ".join(f"{k} {100 * v / sum(s.phases.values()):.0f}%" for k, v in s.phases.items())
        print(
            f"{s.name:24} {s.tokens_per_second:8.1f} tokens/s  {against:26} {acceptance_length(s.counts) or 1:.3f} tokens/step  "
            f"rejections {book.predicted:.0f} / {book.observed}  {shares}"
        )


if __name__ == "__main__":
    main()
