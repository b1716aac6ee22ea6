"""How near `outrider doctor`'s expected tokens a second are to what the whole model then decodes, in turns on one thread.

    python benchmarks/doctor.py model.gguf FOLDER ... [--rounds 4]

A round measures as doctor does (the first blocks, a second), then decodes four texts of 48 tokens with the whole model and takes
the fastest: both are the least of several, since other programs only add time. Printed: both, the ratio, and its median.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.none import NoDraft
from outrider.evaluate.planning.pace import pace
from outrider.models.load import load_target
from outrider.params import SamplingParams
from outrider.verify import load_rule

TOKENS, TEXTS = 48, 4


def decoded(engine: Engine) -> float:
    """Tokens a second of the fastest of some texts."""
    asked, best = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True), 0.0
    for _ in range(TEXTS):
        start = perf_counter()
        engine.generate([[1, 2, 3, 4]], [asked])
        best = max(best, TOKENS / (perf_counter() - start))
    return best


def main() -> None:
    """Measure every model that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for path in options.models:
        rule, ratios = load_rule("speculative_sampling"), []
        engine = Engine(load_target(path), NoDraft(), rule, Fixed(0), slots=1, max_length=2 * TOKENS)
        for _ in range(options.rounds):
            told = pace(path, None)
            if isinstance(told, str):
                raise SystemExit(told)
            ratios.append(told.tokens / decoded(engine))
            print(f"{path}: expected {told.tokens:.1f} tokens/s, ratio to decoded {ratios[-1]:.2f}", flush=True)
        print(f"{path}: median {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
