"""Where a grammar ends, and how: more ends only, blanks with a bound, names of special tokens as text, and budgets that run out."""

from __future__ import annotations

import json
import re

import pytest
import torch

from outrider.build import Engine, build_engine, companion
from outrider.params import SamplingParams
from outrider.types import SequenceView

ENDLESS = r"[ab]{2,4}(c|dd)?"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build_engine(length=4, slots=3, max_length=160)


def texts(engine: Engine, grammar: str, **options) -> list:
    asked = [SamplingParams(**{"grammar": grammar, "max_tokens": 18, "seed": i, **options}) for i in range(3)]
    return [r.outputs[0] for r in engine.generate(["x = ", "ab", "class A"], asked)]


# ------------------------------------------------------------------ behind the end
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("grammar", [f"regex:{ENDLESS}", 'json:{"enum": ["ab", 7, null]}', 'json:{"const": {}}'])
def test_behind_the_end_are_only_ends(engine: Engine, grammar: str, temperature: float) -> None:
    """With `ignore_eos`: the text of plain decoding for every drafter, a text of the grammar, and then ends until the limit."""
    eos = set(engine.eos)
    plain = texts(companion(engine, "none", rule="match"), grammar, temperature=temperature, ignore_eos=True)
    for draft in (None, "ngram:1-3", "forced+prediction"):
        one = companion(engine, draft, rule="match")
        guess = {"prediction": tuple(engine.encode("abab(){}"))} if draft == "forced+prediction" else {}
        got = texts(one, grammar, temperature=temperature, ignore_eos=True, **guess)
        assert [o.token_ids for o in got] == [o.token_ids for o in plain]
    for output in plain:
        ends = [t in eos for t in output.token_ids]
        assert output.finish_reason == "length" and len(ends) == 18
        assert ends == sorted(ends) and any(ends)
        if grammar.startswith("regex"):
            assert re.fullmatch(ENDLESS, output.text)
        else:
            json.loads(output.text)


def test_every_end_is_an_end(engine: Engine) -> None:
    """A model with several ends of text: each is allowed where the grammar may end, and behind each only ends."""
    ends = (engine.eos and next(iter(engine.eos)), 5)
    one = Engine(
        engine.parts.target, companion(engine, "none").parts.drafter, engine.parts.rule, engine.controller,
        tokenizer=engine.tokenizer, slots=1, max_length=80, eos=ends,
    )  # fmt: skip
    automaton = one.parts.pipeline.grammars.start("regex:[ab]{1,3}")
    (a,) = one.encode("a")
    for path in ([a, 5], [a, ends[0]], [a, 5, ends[0]], [a, ends[0], 5, 5]):
        assert set(automaton.allowed(path).nonzero().flatten().tolist()) == set(ends)
    assert {*ends, a} <= set(automaton.allowed([a]).nonzero().flatten().tolist())
    automaton.follow([a, 5])
    assert set(automaton.allowed([]).nonzero().flatten().tolist()) == set(ends)
    assert automaton.forced() == [] and not automaton.exhausted
    automaton.follow([a])  # another text
    assert a in automaton.allowed([]).nonzero().flatten().tolist()


# ------------------------------------------------------------------ lossy rules
@pytest.mark.parametrize(
    ("rule", "draft"),
    [
        ("tv_budget:per_token=0.5", "ngram:1-3"),
        ("over_acceptance:eps=0.5", "ngram:1-3"),
        ("lenience:l=0.1", "early:2"),
        ("top_k:k=50", "ngram:1-3"),
    ],
)
def test_a_lossy_rule_keeps_to_the_grammar(engine: Engine, rule: str, draft: str) -> None:
    """Drafts from text that the grammar forbids, and requests with bans and least lengths beside them."""
    one = companion(engine, draft, rule=rule, allow_lossy=True)
    prompt = "ab = [ab, ab, abab]\nfor ab in ab:\n    print(ab, ab, ab)\n"
    asked = [SamplingParams(max_tokens=24, seed=s, grammar="regex:[0-9]{3}(, [0-9]{3}){0,9}") for s in range(2)]
    banned, only = engine.encode(" ab")[-1], engine.encode("=")[0]
    asked += [SamplingParams(max_tokens=24, min_tokens=20, seed=s, top_k=5) for s in range(2)]
    asked += [SamplingParams(max_tokens=24, seed=s, logit_bias={banned: -100.0}) for s in range(2)]
    asked += [SamplingParams(max_tokens=24, seed=s, logit_bias={only: 100.0}) for s in range(2)]
    outputs = [r.outputs[0] for r in one.generate([prompt] * 8, asked)]
    assert all(re.fullmatch(r"[0-9]{1,3}(, ?[0-9]{0,3})*,?", o.text) for o in outputs[:2])
    assert all(len(o.token_ids) >= 20 for o in outputs[2:4])
    assert all(banned not in o.token_ids for o in outputs[4:6])
    assert all(set(o.token_ids) == {only} for o in outputs[6:])


# ------------------------------------------------------------------ blanks
def test_blanks_in_json_have_a_bound(engine: Engine) -> None:
    """A model that wants nothing but blanks writes a few and goes on."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    words = (" ", "\n", "    ", "        ", "\n\n", "\t", "\n    ")
    blanks = {engine.encode(c)[0]: 100.0 for c in words if len(engine.encode(c)) == 1}
    for temperature in (0.0, 1.0):
        grammar = "json:" + json.dumps(schema)
        for output in texts(engine, grammar, temperature=temperature, max_tokens=150, logit_bias=blanks):
            assert set(json.loads(output.text)) == {"a"}
            assert max(map(len, re.findall(r"\s+", output.text))) <= 25


@pytest.mark.parametrize("style", [{}, {"indent": 4}, {"indent": "\t"}, {"separators": (",", ":")}])
def test_what_programs_print_as_json_is_allowed(engine: Engine, style: dict) -> None:
    items = {"type": "array", "items": {"type": ["null", "object"]}}
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": items}, "required": ["a", "b"]}
    written = json.dumps({"a": True, "b": [None, {"c": {"d": [1]}}]}, **style)
    automaton = engine.parts.pipeline.grammars.start("json:" + json.dumps(schema))
    automaton.follow(engine.encode(written))
    assert not automaton.exhausted and automaton.allowed([])[next(iter(engine.eos))]


# ------------------------------------------------------------------ names of special tokens
@pytest.mark.parametrize("value", ["<pad>", "</s>", "a<s>b</s>", "<pad><pad>"])
@pytest.mark.parametrize("draft", ["none", "forced", None])
def test_a_text_may_spell_a_special_token(engine: Engine, value: str, draft: str | None) -> None:
    for grammar in ("json:" + json.dumps({"const": value}), f'regex:"{value}"'):
        for output in texts(companion(engine, draft), grammar, temperature=0.0, max_tokens=60):
            assert output.finish_reason == "stop"
            assert json.loads(output.text) == value


# ------------------------------------------------------------------ budgets
def spent(engine: Engine, monkeypatch: pytest.MonkeyPatch, **limits: int) -> Engine:
    from outrider import automata

    monkeypatch.setattr(automata, "LIMITS", {**automata.LIMITS, **limits})
    return companion(engine, "none")


def test_a_grammar_that_is_given_up_is_an_error_outside_a_server_too(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    hard = "regex:((.*ab.{20}cd|.*ef.{21}gh|.*ij.{22}kl|.*mn.{23}op)){1,3}"
    one = spent(engine, monkeypatch, max_lexer_states=200)
    count = 8  # texts differ by machine (rounding), and which of them run into the limit
    asked = [SamplingParams(grammar=hard, max_tokens=100, temperature=1.5, seed=i) for i in range(count)]
    asked.append(SamplingParams(max_tokens=40, seed=9))
    *ruled, free = (r.outputs[0] for r in one.generate(["x = "] * (count + 1), asked))
    assert any(o.finish_reason == "error" and o.error and "middle of the text" in o.error for o in ruled)
    assert all(o.finish_reason in ("error", "length") for o in ruled)
    assert free.finish_reason in ("length", "stop") and free.error is None
    assert one.defects == sum(o.finish_reason == "error" for o in ruled)
    assert all(one.parts.pipeline.automaton(slot) is None for slot in range(one.scheduler.slots)), (
        "a slot's next request begins with its own budget"
    )


def test_tokens_that_the_model_never_gives_are_an_error_and_no_nan(engine: Engine) -> None:
    """Logits of minus infinity on all that the grammar allows: one sentence for that request, its neighbour's text as ever."""
    pipeline, seen = engine.parts.pipeline, SamplingParams(grammar="regex:[0-9]+")
    prompt = engine.encode("x = ")
    view = SequenceView(1, 0, [*prompt], len(prompt), 0, seen)
    free = SequenceView(2, 0, [*prompt], len(prompt), 0, SamplingParams())
    logits = torch.randn(2, pipeline.vocab_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    digits = engine.parts.pipeline.grammars.start("regex:[0-9]+").allowed([])
    logits[0, digits] = -torch.inf
    p = pipeline(logits, [view, free], [(), ()])
    assert torch.isfinite(p).all() and torch.equal(p[1], pipeline(logits[1:], [free], [()])[0])
    automaton = pipeline.automaton(1)
    assert (
        automaton is not None
        and "no probability" in automaton.trouble([])
        and automaton.trouble([3]) == automaton.trouble([])
    )
    pipeline.release([1])
    assert pipeline.automaton(1) is None
