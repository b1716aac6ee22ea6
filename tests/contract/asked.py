"""The requests of the contract suite: six prompts of different lengths that join and leave in the middle of others."""

from __future__ import annotations

from functools import cache

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.engine.outputs import Result
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams

VOCAB = 23
PROMPTS = [[(7 * i + 3 * j * j) % VOCAB for j in range(n)] for i, n in enumerate((3, 17, 1, 9, 2, 12))]
LENGTHS = (11, 7, 15, 4, 13, 9)

SAMPLING: dict[str, dict] = {
    "greedy": {"temperature": 0.0},
    "greedy with penalties": {
        "temperature": 0.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
    },
    "temperature 1": {"temperature": 1.0},
    "cold, top-k": {"temperature": 0.7, "top_k": 5},
    "top-p with penalties": {"temperature": 1.0, "top_p": 0.8, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    "min-p, bias, repetition": {
        "temperature": 1.2,
        "min_p": 0.05,
        "logit_bias": {3: 2.0, 5: -100.0},
        "repetition_penalty": 1.2,
    },
    "bans and minimum": {"temperature": 1.0, "min_tokens": 4, "stop_token_ids": (4, 9)},
}


def params(name: str, seed: int = 100) -> list[SamplingParams]:
    """One set of parameters per prompt, each with its own seed and length."""
    return [SamplingParams(**SAMPLING[name], max_tokens=n, seed=seed + i) for i, n in enumerate(LENGTHS)]


@cache
def target() -> TinyLM:
    """Real attention with peaked distributions, float64: batch shapes differ by rounding and nothing else. One for all tests, so
    that learned drafters are trained on it once."""
    return TinyLM(VOCAB, 16, 2, seed=0, sharp=4.0)


def engine(model, drafter, rule, capacity: int, *, length: int = 4, chunk: int = 5, eos=(1,), sinks=()) -> Engine:
    """A small engine: chunks of 5 rows, so that prompts of 9, 12 and 17 tokens are fed in pieces."""
    more = {"slots": capacity, "max_length": 64, "chunk": chunk, "eos": eos, "sinks": sinks, "allow_lossy": True}
    return Engine(model, drafter, rule, Fixed(length), **more)


def tokens(results: list[Result]) -> list[tuple[int, ...]]:
    return [r.outputs[0].token_ids for r in results]
