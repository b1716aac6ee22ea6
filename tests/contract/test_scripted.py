"""EX-7: any accept pattern, and the end of a sequence at every index of an accepted run."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from outrider.build import Engine
from outrider.drafters.none import NoDraft
from outrider.params import SamplingParams
from outrider.verify import load_rule
from tests.contract.asked import VOCAB, engine, target
from tests.contract.scripted import Budgets, Scripted

MODEL = target()
PROMPT = [3, 1, 4, 1, 5]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
K = 4


def reference(length: int = 24) -> list[int]:
    one = engine(MODEL, NoDraft(), load_rule("speculative_sampling"), 1)
    p = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    return list(one.generate([PROMPT], [p])[0].outputs[0].token_ids)


TEXT = reference(40)


def truth(view, k: int) -> list[int]:
    done = len(view.tokens) - view.prompt
    return TEXT[done : done + k]


@pytest.mark.parametrize("pattern", list(product([True, False], repeat=K)))
@pytest.mark.parametrize("rule", ["speculative_sampling", "match"])
def test_every_accept_pattern(pattern: tuple[bool, ...], rule: str) -> None:
    def script(view, k: int) -> list[int]:
        right = truth(view, k)
        return [t if keep else (t + 1) % VOCAB for t, keep in zip(right, pattern, strict=False)]

    one = engine(MODEL, Scripted(script), load_rule(rule), 1, length=K)
    result = one.generate([PROMPT], [GREEDY])[0].outputs[0]
    assert list(result.token_ids) == TEXT[:24]
    kept = pattern.index(False) if False in pattern else K
    assert max(one.counts.accepted_at, default=0) == (0 if kept == 0 else one.counts.accepted_at[0])
    assert len([a for a in one.counts.accepted_at if a]) == kept


@pytest.mark.parametrize("rule", ["speculative_sampling", "match"])
@pytest.mark.parametrize("end", range(1, 12))
@pytest.mark.parametrize("how", ["eos", "stop id", "max_tokens", "context"])
def test_the_end_at_every_index(rule: str, end: int, how: str) -> None:
    """Output stops exactly where plain decoding stops, whichever node of an accepted run ends it."""
    eos, limit, extra = (), 64, {}
    first = next(i for i, t in enumerate(TEXT) if t == TEXT[end - 1]) + 1  # its first occurrence ends the text
    if how == "eos":
        eos = (TEXT[end - 1],)
    elif how == "stop id":
        extra = {"stop_token_ids": (TEXT[end - 1],)}
    elif how == "max_tokens":
        extra, first = {"max_tokens": end}, end
    else:
        limit, first = len(PROMPT) + end, end
    p = SamplingParams(**{"temperature": 0.0, "max_tokens": 30, **extra})
    one = Engine(MODEL, Scripted(truth), load_rule(rule), Budgets(lambda s: K), slots=1, max_length=limit, eos=eos)
    out = one.generate([PROMPT], [p])[0].outputs[0]
    assert list(out.token_ids) == TEXT[:first]
    assert out.finish_reason == ("stop" if how in ("eos", "stop id") else "length")
    assert one.counts.emitted == first


@pytest.mark.parametrize("seed", range(20))
def test_lengths_that_change_every_step(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    depth = lambda s: int(torch.randint(0, K + 2, (1,), generator=g))  # noqa: E731

    def script(view, k: int) -> list[int]:
        return [t if int(torch.randint(0, 4, (1,), generator=g)) else (t + 3) % VOCAB for t in truth(view, k)]

    one = Engine(MODEL, Scripted(script), load_rule("speculative_sampling"), Budgets(depth), slots=1, max_length=64)
    assert list(one.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids) == TEXT[:24]


@pytest.mark.parametrize("bad", [VOCAB, -1, 10**9])
@pytest.mark.parametrize("at", range(K))
def test_ids_outside_the_vocabulary_are_rejected_and_counted(bad: int, at: int) -> None:
    def script(view, k: int) -> list[int]:
        right = truth(view, k)
        return [*right[:at], bad, *right[at + 1 :]]

    one = engine(MODEL, Scripted(script), load_rule("speculative_sampling"), 1, length=K)
    assert list(one.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids) == TEXT[:24]
    assert one.defects > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_distributions_that_are_none_are_not_used(value: float) -> None:
    distribution = lambda n: torch.full((n, VOCAB), value, dtype=torch.float64)  # noqa: E731
    one = engine(MODEL, Scripted(truth, distribution=distribution), load_rule("speculative_sampling"), 1, length=K)
    assert list(one.generate([PROMPT], [GREEDY])[0].outputs[0].token_ids) == TEXT[:24]
    assert one.defects > 0


class _Poisoned:
    """The toy target, with NaN logits for one slot."""

    def __init__(self, inner, slot: int) -> None:
        self.inner, self.slot = inner, slot

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def forward(self, rows, kv, *, layers=()):
        scores = self.inner.forward(rows, kv, layers=layers)
        b = 0
        for s in rows.segments:
            if s.scored:
                if s.slot == self.slot:
                    scores.logits[b] = float("nan")
                b += 1
        return scores


def test_a_broken_request_does_not_disturb_its_neighbours() -> None:
    honest = engine(MODEL, NoDraft(), load_rule("speculative_sampling"), 3)
    prompts = [PROMPT, [1, 2, 3], [9, 8, 7, 6]]
    p = [SamplingParams(temperature=1.0, max_tokens=10, seed=i) for i in range(3)]
    want = [r.outputs[0] for r in honest.generate(prompts, p)]
    broken = engine(_Poisoned(MODEL, 1), NoDraft(), load_rule("speculative_sampling"), 3)
    got = [r.outputs[0] for r in broken.generate(prompts, p)]
    assert got[1].finish_reason == "error"
    assert "NaN" in (got[1].error or "")
    assert [got[0].token_ids, got[2].token_ids] == [want[0].token_ids, want[2].token_ids]
