"""What is kept of prompts: a chat's second turn, and clients that share a system prompt, with and without it.

    python benchmarks/prefix_cache.py            # the shape of the shipped target (22M) and random weights: text plays no part
    python benchmarks/prefix_cache.py --layers 12 --hidden 1024 --heads 16 --inner 2816 --vocab 8192   # 158M

Two engines on the same weights take turns, plain decoding, the tokens of a prompt drawn anew for every round. Ratios are formed within
a round and given as their median with a bootstrap interval over rounds.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from native import decoder_config, random_weights
from peers.stats import ratio

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.none import NoDraft
from outrider.engine.turns import Turns
from outrider.models.lean import LeanTarget
from outrider.params import SamplingParams
from outrider.telemetry.resources import memory_bytes
from outrider.verify import load_rule

CONTEXT = 32_768
"""Tokens of the model's context, of which an engine is given what it needs."""


def engines(target: LeanTarget, slots: int, length: int) -> dict[str, Engine]:
    """With and without."""
    turns = Turns()
    return {
        name: Engine(
            target, NoDraft(), load_rule("auto"), Fixed(0), slots=slots, max_length=length, turns=turns, prefix_cache=on
        )
        for name, on in (("with", True), ("without", False))
    }


def first_token(engine: Engine, prompt: list[int]) -> tuple[float, int]:
    """Seconds until it is there, and the token."""
    start = time.perf_counter()
    stream = engine.stream(prompt, SamplingParams(max_tokens=1, seed=1, ignore_eos=True))
    event = next(stream)
    spent = time.perf_counter() - start
    stream.close()
    return spent, event.tokens[0]


def second_turn(both: dict[str, Engine], vocab: int, tokens: int, said: int, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token of the second turn of a chat of so many tokens; the first turn is not timed."""
    draw, out = random.Random(tokens), {name: list[float]() for name in both}
    for _ in range(rounds):
        prompt = [draw.randrange(vocab) for _ in range(tokens - said)]
        question = [draw.randrange(vocab) for _ in range(20)]
        found = set()
        for name in draw.sample(list(both), len(both)):
            params = SamplingParams(max_tokens=said, seed=1, ignore_eos=True)
            answer = both[name].generate([prompt], params)[0].outputs[0].token_ids
            spent, token = first_token(both[name], [*prompt, *answer, *question])
            out[name].append(spent)
            found.add((*answer, token))
        assert len(found) == 1, "a text depends on what was kept"
    return out


def shared_prompt(
    both: dict[str, Engine], vocab: int, clients: int, system: int, asked: int, said: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds in which so many clients with one system prompt, and a question of their own, get their answers."""
    draw, out = random.Random(clients), {name: list[float]() for name in both}
    for _ in range(rounds):
        begin = [draw.randrange(vocab) for _ in range(system)]
        prompts = [begin + [draw.randrange(vocab) for _ in range(asked)] for _ in range(clients)]
        texts = []
        for name in draw.sample(list(both), len(both)):
            start = time.perf_counter()
            results = both[name].generate(prompts, SamplingParams(max_tokens=said, seed=1, ignore_eos=True))
            out[name].append(time.perf_counter() - start)
            texts.append([r.outputs[0].token_ids for r in results])
        assert texts[0] == texts[1], "a text depends on what was kept"
    return out


def told(title: str, seconds: dict[str, list[float]]) -> str:
    """One line."""
    got = ratio({"a": np.array(seconds["without"])}, {"b": np.array(seconds["with"])})
    assert got is not None
    each = ", ".join(f"{median(seconds[name]):.3f} s {name}" for name in seconds)
    return f"{title}: {each}; {got.value:.1f} times sooner ({got.low:.1f} to {got.high:.1f}, {len(seconds['with'])} rounds)"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 21), ("hidden", 288), ("heads", 6), ("inner", 768), ("vocab", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=1000, help="of a chat's first turn, and of the system prompt")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--said", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    config = replace(decoder_config(o.vocab, o.hidden, o.layers, o.heads, o.inner), max_length=CONTEXT)
    target = LeanTarget(config, random_weights(config, torch.bfloat16))
    before = memory_bytes()
    wide = target.new_kv(o.slots, CONTEXT)
    after = memory_bytes()
    print(
        f"room for {o.slots} x {CONTEXT} tokens ({2 * wide.k.nbytes / 1e9:.1f} GB when full) takes "
        f"{(after - before) / 1e6:.0f} MB before the first token"
    )
    del wide
    both = engines(target, o.slots, 2 * o.tokens)
    for one in both.values():
        one.warm_up()
    print(
        told(
            f"second turn of a chat of {o.tokens} tokens, first token",
            second_turn(both, o.vocab, o.tokens, o.said, o.rounds),
        )
    )
    seconds = shared_prompt(both, o.vocab, o.clients, o.tokens, 20, o.said, o.rounds)
    print(told(f"{o.clients} clients, a system prompt of {o.tokens} tokens, answers of {o.said}", seconds))


if __name__ == "__main__":
    main()
