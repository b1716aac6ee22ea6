"""Greedy text with drafts is that of plain decoding, on quantised pairs: many prompts, batches of any company, several lengths.

The target is a GGUF file of q8_0, the draft the same model rounded to q4_k: close enough for drafts to be accepted often, far
enough for them to be refused often. Both are asserted, so that the equality says something.
"""

from __future__ import annotations

import sys
import time

import pytest
import torch

from outrider.build import Engine, build_engine, companion
from outrider.models.native.build import load_library
from outrider.params import SamplingParams
from outrider.verify import LOSSLESS
from tests.covering import slow_beyond
from tests.gguf_files import make_pair

pytestmark = pytest.mark.skipif(load_library() is None, reason="products in blocks need a C++ compiler")
SLOTS, TOKENS, LONGEST, VOCAB = 32, 16, 24, 320
SAMPLED = SamplingParams(temperature=1.0, max_tokens=TOKENS, seed=5)
SHAPE = {
    "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "dtype": torch.bfloat16,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    made = {}
    for kind in ("q8_0", "q4_k"):
        folder = tmp_path_factory.mktemp(kind)
        _, made[kind] = make_pair(folder, "llama", kind, tokenizer=True, **SHAPE)
    return build_engine(made["q8_0"], draft=str(made["q4_k"]), slots=SLOTS, max_length=LONGEST + TOKENS + 8)


def prompts(count: int, seed: int) -> list[list[int]]:
    noise = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST, (count,), generator=noise).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=noise).tolist() for n in lengths]


def texts(engine: Engine, asked: list[list[int]]) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    return [result.outputs[0].token_ids for result in engine.generate(asked, params)]


def compare(engine: Engine, count: int, lengths: tuple[int, ...], part: int = 500) -> None:
    """`count` prompts, each with every length against plain decoding; parts of them are shuffled anew, so that company differs."""
    plain, drafted = companion(engine, "none"), {n: companion(engine, length=n) for n in lengths}
    started = time.perf_counter()
    for at in range(0, count, part):
        asked = prompts(min(part, count - at), seed=at)
        expected = texts(plain, asked)
        for n, other in drafted.items():
            order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(at + n)).tolist()
            found = texts(other, [asked[i] for i in order])
            for place, i in enumerate(order):
                assert found[place] == expected[i], (n, at, asked[i])
        print(
            f"{at + len(asked)} of {count} prompts, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True
        )
    for n, other in drafted.items():
        share = other.counts.accepted / other.counts.proposed
        assert 0.2 < share < 0.98, f"length {n}: {share:.2f} of the drafts were accepted, which tries one side only"


def test_some_prompts(engine: Engine) -> None:
    compare(engine, 48, (3,))


@pytest.mark.parametrize("rule", slow_beyond([(rule,) for rule in sorted(LOSSLESS)], [("block",), ("match",)]))
def test_every_lossless_rule(engine: Engine, rule: str) -> None:
    """Greedy, in one batch; and for `match`, whose noise belongs to positions, at temperature 1 too."""
    asked = prompts(16, seed=77)
    assert texts(companion(engine, rule=rule, length=3), asked) == texts(companion(engine, "none"), asked)
    if rule == "match":
        sampled = [companion(engine, draft, rule=rule, length=3) for draft in ("none", None)]
        plain, drafted = ([r.outputs[0].token_ids for r in e.generate(asked, SAMPLED)] for e in sampled)
        assert plain == drafted


@pytest.mark.slow
def test_ten_thousand_prompts(engine: Engine) -> None:
    compare(engine, 10_000, (1, 4))
