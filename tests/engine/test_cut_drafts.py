"""A text that ends within a draft: what is accepted, emitted and counted agree, for every way to end and every rule."""

from __future__ import annotations

import pytest

from outrider.build import Engine
from outrider.drafters.none import NoDraft
from outrider.params import SamplingParams
from outrider.records import Counts
from outrider.serve.replies import acceptance
from outrider.verify import load_rule
from tests.contract.asked import PROMPTS, VOCAB, engine, target
from tests.contract.scripted import Budgets, Scripted

MODEL = target()
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
TEXT = engine(MODEL, NoDraft(), load_rule("match"), 1, eos=()).generate([PROMPTS[0]], [GREEDY])[0].outputs[0].token_ids


class Letters:
    """Token t is one letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 97 for c in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + t) for t in ids)


def balanced(c: Counts) -> bool:
    return (
        c.judged == c.accepted + c.dropped + c.rejected
        and c.emitted == c.tokens == c.accepted + c.steps - c.cut
        and sum(c.accepted_at) == c.accepted
        and all(j >= a for j, a in zip(c.judged_at, c.accepted_at, strict=True))
    )


@pytest.mark.parametrize("rule", ["speculative_sampling", "match", "block", "traversal", "tv_budget"])
@pytest.mark.parametrize("how", ["stop string", "stop token", "end of text"])
@pytest.mark.parametrize("end", [1, 2, 4, 7])
def test_no_more_is_accepted_than_is_emitted(rule: str, how: str, end: int) -> None:
    """Drafts of six right tokens, cut at their first, a middle and their last one."""
    script = Scripted(lambda v, k: list(TEXT[len(v.tokens) - v.prompt :][:k]))
    eos = (TEXT[end - 1],) if how == "end of text" else ()
    more = {"stop string": {"stop": (chr(97 + TEXT[end - 1]),)}, "stop token": {"stop_token_ids": (TEXT[end - 1],)}}
    one = Engine(
        MODEL,
        script,
        load_rule(rule),
        Budgets(lambda s: 6),
        slots=1,
        max_length=64,
        eos=eos,
        tokenizer=Letters(),
        allow_lossy=True,
    )
    out = one.generate([PROMPTS[0]], [SamplingParams(temperature=0.0, max_tokens=24, **more.get(how, {}))])[0].outputs[
        0
    ]
    size = TEXT.index(TEXT[end - 1]) + 1
    assert out.token_ids == TEXT[:size] and out.finish_reason == "stop"
    for c in (out.counts, one.counts):
        assert balanced(c)
        assert c.accepted == out.origins.count("accepted") <= c.emitted == size
    said = acceptance(out.counts, 8)
    assert said["num_accepted_draft_tokens"] <= size
    assert sum(said["acceptance_histogram"]) == said["num_spec_steps"]
    assert sum(j * n for j, n in enumerate(said["acceptance_histogram"])) == said["num_accepted_draft_tokens"]
    if said["num_spec_steps"]:  # the first token comes from the prompt's step, the others from those with a draft
        assert said["mean_acceptance_length"] * said["num_spec_steps"] == pytest.approx(size - 1)


def test_the_ledger_keeps_what_was_judged() -> None:
    """risk, rejections and judged positions are the rule's, cut or not: their balance is a law of the rule, not of the text."""
    c = Counts()
    c.add(4, 3, 4, 1.5, 0.5, 0.0, 2)
    c.add(4, 4, 4, 1.0, 0.5, 0.0)
    assert (c.judged, c.rejected, c.risk, c.accepted, c.dropped, c.cut, c.tokens) == (8, 1, 2.5, 6, 1, 1, 7)
    assert c.judged_at == [2, 2, 1, 1] and c.accepted_at == [2, 2, 1, 1]
    double = Counts()
    double.merge(c)
    double.merge(c)
    assert (double.dropped, double.cut, double.tokens) == (2, 2, 14)
    assert VOCAB > 8
