"""Drafting in parallel with verification, on a target and a draft model that sleep: what it gains, beside the formula.

    python benchmarks/ahead.py                     # a target pass of 50 ms, a drafted token of 0.2 of it
    python benchmarks/ahead.py --cost 0.1 --length 5
    python benchmarks/ahead.py --busy              # passes that keep Python's lock, as those of many small operators

Both are small tables whose passes take a known time, asleep or (--busy) in Python, so the figures are those of two devices, or of
two cores. After every token the target's
distribution p is another one (its mean entropy is printed), and the draft model's is p with a part moved to other tokens, so that
sum min(p, q) is the same everywhere. One process, the arms in turn. The rate predicted for the parallel arm takes the
measured share of prepared drafts that came true.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import numpy as np
import torch
from slow_models import Slow

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.ahead import Ahead
from outrider.drafters.apart import Apart
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.models.toy import TableTarget
from outrider.params import SamplingParams
from outrider.protocols import Drafter
from outrider.theory.parallel import speculated_rate
from outrider.theory.speedup import speedup
from outrider.verify import SpeculativeSampling

VOCABULARY, TOKENS, SEEDS = 32, 120, 4


def pair(acceptance: float, sharp: float) -> tuple[TableTarget, TableTarget, float]:
    """A target, a draft model whose tokens are accepted with that probability after any text, and the mean entropy of p in nats."""
    target = TableTarget.random(VOCABULARY, seed=1, sharp=sharp)
    p = torch.softmax(target.table, -1)
    other = p.roll(1, -1)  # what a part of p is moved to
    part = (1.0 - acceptance) / (p - other).clamp(min=0).sum(-1, keepdim=True)
    if (part > 1).any():
        raise SystemExit("such a low acceptance cannot be had with distributions as wide as these: raise --sharp")
    entropy = float(-(p * p.log()).sum(-1).mean())
    return target, TableTarget(((1 - part) * p + part * other).log()[0]), entropy


def rate(engine: Engine, seed: int, tokens: int) -> float:
    """Tokens per second of one text."""
    start = time.perf_counter()
    text = engine.generate([[1]], SamplingParams(max_tokens=tokens, seed=seed))[0].outputs[0].token_ids
    return len(text) / (time.perf_counter() - start)


def main() -> None:
    """Print the rates of every arm and their predictions."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seconds", type=float, default=0.05, help="a target pass")
    ask.add_argument("--tokens", type=int, default=TOKENS, help="of a text")
    ask.add_argument("--cost", type=float, default=0.2, help="a drafted token, in target passes")
    ask.add_argument("--length", type=int, default=3, help="tokens of a draft")
    ask.add_argument("--acceptance", type=float, default=0.8, help="of a drafted token")
    ask.add_argument("--sharp", type=float, default=3.0, help="standard deviation of the target's logits")
    ask.add_argument("--premises", type=int, default=16, help="outcomes that are prepared for")
    ask.add_argument("--busy", action="store_true", help="passes keep Python's lock instead of sleeping")
    given = ask.parse_args()
    table, small, entropy = pair(given.acceptance, given.sharp)
    slow = partial(Slow, busy=given.busy)
    target, draft = slow(table, given.seconds), slow(small, given.seconds * given.cost)
    beside = partial(Ahead, ModelDrafter(draft, given.length + 1), given.premises)  # type: ignore[arg-type]
    turn = partial(ModelDrafter, draft, given.length)  # type: ignore[arg-type]
    drafters: dict[str, tuple[Drafter, int]] = {
        "plain": (NoDraft(), 0),
        "in turn": (turn(), given.length),
        "ahead": (beside(), given.length),
        "apart": (Apart(beside, turn()), given.length),
    }
    engines = {
        name: Engine(target, d, SpeculativeSampling(), Fixed(n), slots=1)  # type: ignore[arg-type]
        for name, (d, n) in drafters.items()
    }
    rates = {name: [] for name in engines}
    for seed in range(SEEDS):
        for name, engine in engines.items():
            rates[name].append(rate(engine, seed, given.tokens))
    alpha, ahead = given.acceptance, drafters["ahead"][0]
    assert isinstance(ahead, Ahead)
    hit = ahead.hits / max(ahead.hits + ahead.misses, 1)
    one = given.cost * (
        given.length + 1
    )  # a prepared draft, and one made after a miss: a token more predicts what follows
    predicted = {  # where nobody waits for Python's lock
        "plain": 1.0,
        "in turn": speedup(alpha, given.length, given.cost),
        "ahead": speculated_rate(alpha, given.length, one / given.length, hit),
    }
    predicted["apart"] = predicted["ahead"]
    print(
        f"acceptance {alpha}, entropy {entropy:.2f}, prepared drafts that came true {hit:.2f} of {ahead.hits + ahead.misses}"
    )
    for name, found in rates.items():
        per_pass = np.array(found) * given.seconds
        print(
            f"{name:8} {per_pass.mean():.3f} tokens per target pass ({per_pass.min():.3f} to {per_pass.max():.3f}), "
            f"predicted {predicted[name]:.3f}"
        )
    for name in ("ahead", "apart"):
        gain = np.array(rates[name]) / np.array(rates["in turn"])
        print(f"{name} over in turn {gain.mean():.2f} ({gain.min():.2f} to {gain.max():.2f})")


if __name__ == "__main__":
    main()
