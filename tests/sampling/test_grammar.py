"""Structured output: the text matches, the distribution is the target's restricted to what is allowed, and speculation does not
move it."""

from __future__ import annotations

import json
import re

import pytest
import torch

from outrider.build import Engine, build_engine, companion
from outrider.errors import RequestError
from outrider.params import SamplingParams

PATTERN = r"[a-c]{2,6}(x|yz)[0-9]{1,3}"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build_engine(length=3, slots=3, max_length=160)


def ask(engine: Engine, grammar: str, **options) -> list:
    params = [SamplingParams(grammar=grammar, max_tokens=60, seed=i, **options) for i in range(4)]
    return [r.outputs[0] for r in engine.generate(["x = ", "import ", "def f", "class A"], params)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["speculative_sampling", "match", "block"])
def test_every_text_matches_its_pattern(engine: Engine, rule: str, temperature: float) -> None:
    one = companion(engine, rule=rule)
    for output in ask(one, f"regex:{PATTERN}", temperature=temperature):
        assert output.finish_reason == "stop"
        assert re.fullmatch(PATTERN, output.text)
    assert one.counts.accepted > 0


def test_json_is_valid_against_its_schema(engine: Engine) -> None:
    for output in ask(engine, "json:" + json.dumps(SCHEMA), temperature=1.0):
        if output.finish_reason == "stop":
            value = json.loads(output.text)
            assert set(value) == {"name", "size"}
            assert isinstance(value["size"], int)
            assert len(value["name"]) <= 8


@pytest.mark.parametrize("draft", [None, "ngram", "forced", "forced:3+ngram"])
def test_match_gives_the_text_of_plain_decoding(engine: Engine, draft: str | None) -> None:
    plain = companion(engine, "none", rule="match")
    one = companion(engine, draft, rule="match")
    for temperature in (0.0, 1.0):
        wanted = [o.token_ids for o in ask(plain, f"regex:{PATTERN}", temperature=temperature)]
        assert [o.token_ids for o in ask(one, f"regex:{PATTERN}", temperature=temperature)] == wanted


def test_what_a_grammar_dictates_is_drafted_without_a_model(engine: Engine) -> None:
    """Behind a choice nothing is dictated; a fixed text of many tokens is; fewer tokens than `least` are left to others."""
    fixed = "regex:(import|from) collections\\.abc import Sequence, Mapping"
    one, none = companion(engine, "forced"), companion(engine, "none")
    taken, plain = ask(one, fixed, temperature=0.0), ask(none, fixed, temperature=0.0)
    assert [o.text for o in taken] == [o.text for o in plain]
    assert one.counts.accepted > 0
    assert sum(o.counts.steps for o in taken) < sum(o.counts.steps for o in plain)
    free = companion(engine, "forced")
    ask(free, "regex:[a-z]{40}", temperature=0.0)
    assert free.counts.proposed == 0
    ask(free, fixed, temperature=0.0)
    most = free.counts.proposed
    strict = companion(engine, "forced:3")
    ask(strict, fixed, temperature=0.0)
    assert 0 < strict.counts.proposed <= most


def test_the_distribution_is_the_targets_restricted_and_renormalised(engine: Engine) -> None:
    from outrider.types import SequenceView

    pipeline = engine.parts.pipeline
    logits = torch.randn(2, pipeline.vocab_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompt = engine.encode("x = ")
    a, b, one = (engine.encode(c)[0] for c in ("a", "b", "1"))
    free = SequenceView(7, 0, [*prompt, a], len(prompt), 0, SamplingParams())
    bound = SequenceView(7, 0, [*prompt, a], len(prompt), 0, SamplingParams(grammar=f"regex:{PATTERN}"))
    whole, cut = pipeline(logits, [free, free], [(), (b,)]), pipeline(logits, [bound, bound], [(), (b,)])
    for row in range(2):
        allowed = cut[row] > 0
        assert allowed[b]
        assert not allowed[one]  # digits come behind x or yz only
        assert 0 < int(allowed.sum()) < pipeline.vocab_size
        torch.testing.assert_close(cut[row][allowed], whole[row][allowed] / whole[row][allowed].sum())


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("regex:[a", "unclosed"),
        ("yaml:a", "'regex:PATTERN' or 'json:SCHEMA'"),
        ("json:{", "cannot be"),
        ("", "1 to 262144"),
    ],
)
def test_a_bad_grammar_is_refused_and_disturbs_nobody(engine: Engine, grammar: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine.submit("x", SamplingParams(grammar=grammar))
    assert not engine.busy


def test_min_tokens_and_a_grammar_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="exclude"):
        SamplingParams(grammar="regex:a", min_tokens=2)
