"""Prediction without drafting, against the engine that drafts: the same distributions, the same counting, the same numbers.

z-tests against the exact conditional variance given the texts; |z| < 6.2 has a false-alarm rate below 1e-9 each.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from outrider.build import Engine, build_engine
from outrider.control.fixed import Fixed
from outrider.drafters.model.drafter import ModelDrafter
from outrider.errors import ConfigError
from outrider.evaluate.planning.predict_report import report
from outrider.evaluate.scoring.costs import measure_costs
from outrider.evaluate.scoring.score import (
    Clock,
    Emitted,
    Item,
    draft_model,
    given_text,
    items_of,
    sample,
    score,
    to_vocabulary,
)
from outrider.evaluate.workloads import load_rows
from outrider.models.toy import TableTarget, TinyLM
from outrider.params import SamplingParams
from outrider.records import Counts
from outrider.theory import forecast as fc
from outrider.theory.replay import replay
from outrider.verify import load_rule

Z = 6.2
SILENT = lambda share: None  # noqa: E731


def toy_engine(
    length: int, *, drawn: str = "sampled", eos: tuple[int, ...] = (), tokenizer: object = None
) -> tuple[Engine, TableTarget]:
    """An engine on a table of 9 tokens with a perturbed table as its draft."""
    target = TableTarget.random(9, seed=1, positions=3, sharp=1.5)
    draft = target.perturbed(0.8, seed=2)
    drafter = ModelDrafter(draft, length, sample=drawn)  # type: ignore[arg-type]
    rule = load_rule("speculative_sampling")
    engine = Engine(target, drafter, rule, Fixed(length), slots=16, max_length=64, eos=eos, tokenizer=tokenizer)
    return engine, draft


def decode(engine: Engine, params: SamplingParams, texts: int) -> tuple[list[Emitted], list[Counts]]:
    """Texts of the engine itself, with its counts."""
    prompts = [[i % 9, (i // 9) % 9] for i in range(texts)]
    out = engine.generate(prompts, [SamplingParams(**{**as_dict(params), "seed": i}) for i in range(texts)])
    emitted = [
        Emitted(list(r.prompt), list(o.token_ids), o.finish_reason == "stop", params.max_tokens, i)
        for i, r in enumerate(out)
        for o in r.outputs
    ]
    return emitted, [o.counts for r in out for o in r.outputs]


def as_dict(params: SamplingParams) -> dict:
    return {name: getattr(params, name) for name in ("temperature", "top_p", "max_tokens", "ignore_eos")}


def scored(engine: Engine, draft, emitted: list[Emitted], params: SamplingParams, rows: int = 64):
    items = [Item("") for _ in range(max(e.item for e in emitted) + 1)]
    return score(engine, draft, emitted, items, params, Clock(), SILENT, rows=rows)


def z(observed, mean: np.ndarray, variance: np.ndarray) -> float:
    return float((np.sum(observed) - mean.sum()) / math.sqrt(variance.sum()))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_distributions_are_those_of_a_direct_computation(temperature: float) -> None:
    engine, draft = toy_engine(2)
    params = SamplingParams(temperature=temperature, max_tokens=20)
    emitted, _ = decode(engine, params, 6)
    found = scored(engine, draft, emitted, params)
    target = engine.parts.target
    assert isinstance(target, TableTarget)
    for e, text in zip(emitted, found.texts, strict=True):
        tokens = [*e.prompt, *e.output]
        for n, (end, token) in enumerate(zip(range(len(e.prompt), len(tokens)), e.output, strict=True)):
            p, q = (m.distribution(tokens[:end]).numpy() ** (1 / temperature) for m in (target, draft))
            p, q = p / p.sum(), q / q.sum()
            assert text.tv is not None and text.risk is not None and text.hit is not None
            assert text.target[n] == pytest.approx(math.log(p[token]), abs=1e-9)
            assert text.draft[n] == pytest.approx(math.log(q[token]), abs=1e-9)
            assert text.tv[n] == pytest.approx(0.5 * np.abs(p - q).sum(), abs=1e-9)
            assert text.risk[n] == pytest.approx(1 - p[q.argmax()], abs=1e-9)
            assert text.hit[n] == (q.argmax() == token)
    assert found.target_rows.shape == (64, 9) == found.draft_rows.shape
    np.testing.assert_allclose(found.target_rows.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_calls_and_rejections_of_the_engines_own_texts(length: int) -> None:
    engine, draft = toy_engine(length)
    params = SamplingParams(max_tokens=30)
    emitted, counts = decode(engine, params, 80)
    texts = scored(engine, draft, emitted, params).texts
    found = replay(texts, length)
    assert abs(z([c.steps for c in counts], found.calls, found.calls_variance)) < Z
    assert abs(z([c.rejected for c in counts], found.rejected, found.rejected_variance)) < Z
    wrong = replay(texts, 2 if length == 1 else 1)  # negative control: another length
    assert abs(z([c.steps for c in counts], wrong.calls, wrong.calls_variance)) > Z
    # the rule's own ledger and the variance-reduced prediction speak of the same number
    ledger = sum(c.risk for c in counts)
    assert ledger == pytest.approx(found.risk.sum(), rel=0.1)
    total = Counts()
    for c in counts:
        total.merge(c)
    for d, (a, j) in enumerate(zip(total.accepted_at, total.judged_at, strict=True)):
        error = math.sqrt(found.acceptance_at[d] * (1 - found.acceptance_at[d]) / j)
        assert abs(a / j - found.acceptance_at[d]) < Z * error


def test_greedy_drafts_are_predicted_to_the_last_call() -> None:
    engine, draft = toy_engine(3, drawn="greedy")
    params = SamplingParams(max_tokens=30)
    emitted, counts = decode(engine, params, 40)
    found = replay(scored(engine, draft, emitted, params).texts, 3, "greedy")
    for name, mine in (("steps", "calls"), ("proposed", "proposed"), ("judged", "judged"), ("rejected", "rejected")):
        np.testing.assert_allclose(getattr(found, mine), [getattr(c, name) for c in counts], atol=1e-9)
    depth = [np.array([c.accepted_at[d] if d < len(c.accepted_at) else 0 for c in counts]) for d in range(3)]
    np.testing.assert_allclose(found.accepted_at, np.stack(depth, 1), atol=1e-9)


def test_texts_that_stop_are_counted_like_the_engine_does() -> None:
    engine, draft = toy_engine(3, drawn="greedy", eos=(0,))
    params = SamplingParams(max_tokens=25)
    emitted, counts = decode(engine, params, 60)
    assert {e.stopped for e in emitted} == {True, False}
    found = replay(scored(engine, draft, emitted, params).texts, 3, "greedy")
    np.testing.assert_allclose(found.calls, [c.steps for c in counts], atol=1e-9)
    np.testing.assert_allclose(found.proposed, [c.proposed for c in counts], atol=1e-9)


def test_greedy_target_and_draft() -> None:
    engine, draft = toy_engine(3)
    params = SamplingParams(temperature=0.0, max_tokens=30)
    emitted, counts = decode(engine, params, 20)
    texts = scored(engine, draft, emitted, params).texts
    for drafting in ("sampled", "greedy"):
        found = replay(texts, 3, drafting)
        np.testing.assert_allclose(found.calls, [c.steps for c in counts], atol=1e-9)
        np.testing.assert_allclose(found.risk, [c.risk for c in counts], atol=1e-9)


def test_prediction_from_plain_text_covers_what_the_engine_measures() -> None:
    """Independent texts on both sides: the difference against both standard errors."""
    length = 3
    speculative, draft = toy_engine(length)
    params = SamplingParams(max_tokens=30)
    engine = build_engine(speculative.parts.target, ModelDrafter(draft, length), slots=8)
    prompts = [" "] * 60
    engine.encode = lambda prompt: [3, 4] if prompt == " " else [int(x) for x in prompt]  # type: ignore[method-assign, assignment]
    items = [Item(p) for p in prompts]
    clock = Clock()
    emitted = sample(engine, items, params, clock, SILENT, seed=99)
    assert clock.seconds > 0 and len(emitted) == 60
    assert len({tuple(e.output) for e in emitted}) == 60
    texts = score(engine, draft, emitted, items, params, clock, SILENT).texts
    predicted = fc.forecast(texts, lengths=(length,)).lengths[0].acceptance_length
    out = speculative.generate([[3, 4]] * 60, [SamplingParams(max_tokens=30, seed=10_000 + i) for i in range(60)])
    steps = [r.outputs[0].counts.steps for r in out]
    observed = fc.clustered_ratio([30.0] * 60, steps, [str(i) for i in range(60)])
    error = math.hypot(predicted.high - predicted.low, observed.high - observed.low) / 4  # about one standard error
    assert abs(predicted.value - observed.value) < Z * error


def test_the_shipped_pair() -> None:
    """Length by length, the engine's own texts on the shipped pair in float32; and the report that is made of them."""
    engine = build_engine(length=4, dtype="float32", slots=4, max_length=256)
    draft = draft_model(engine)
    items = items_of(load_rows(None, 6), shipped=True)
    assert len(items) == 6 and len({i.domain for i in items}) > 1
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    out = engine.generate(
        [i.prompt for i in items], [SamplingParams(max_tokens=40, ignore_eos=True, seed=i) for i in range(6)]
    )
    emitted = [Emitted(list(r.prompt), list(r.outputs[0].token_ids), False, None, i) for i, r in enumerate(out)]
    found = score(engine, draft, emitted, items, params, Clock(), SILENT, rows=50)
    r, counts = replay(found.texts, 4), [x.outputs[0].counts for x in out]
    assert abs(z([c.steps for c in counts], r.calls, r.calls_variance)) < Z
    assert abs(z([c.rejected for c in counts], r.rejected, r.rejected_variance)) < Z
    document = report(found.texts, None, found)
    assert document["predicted"] is True and document["tokens"] == 240
    lengths = [row["acceptance_length"]["value"] for row in document["drafting"]["sampled"]["lengths"]]
    assert lengths == sorted(lengths) and len(lengths) == 16
    assert all(gain >= 1 - 1e-12 for gain in document["block_gain"].values())
    multi = document["multi_draft"]
    for k in ("2", "4"):
        rules = {name: e["value"] for name, e in multi[k].items()}
        assert multi["one_draft"]["value"] < rules["recursive_rejection"] <= rules["k_seq"] + 1e-9
        assert rules["k_seq"] <= rules["optimal_transport"] + 1e-9
    front = [x["rejection"]["value"] for x in document["lossy"]]
    assert front == sorted(front, reverse=True)
    assert front[0] < 1 - document["drafting"]["sampled"]["acceptance"]["value"]


def test_long_texts_are_scored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from outrider.evaluate.scoring import score as predict

    model, other = TinyLM(11, seed=3), TinyLM(11, seed=3).perturbed(0.1, seed=4)
    tokens = np.random.default_rng(0).integers(0, 11, 40).tolist()
    whole = torch.cat(list(predict.logits_along(model, tokens, 12, Clock())))
    monkeypatch.setattr(predict, "CHUNK", 5)
    pieces = torch.cat(list(predict.logits_along(model, tokens, 12, Clock())))
    assert whole.shape == (27, 11)
    torch.testing.assert_close(whole, pieces, atol=1e-12, rtol=0)
    costs = measure_costs(model, other, tokens, Clock(), longest=4, rounds=2)
    assert costs.verify[0] == 1.0 and len(costs.verify) == 5 and costs.draft > 0


def test_vocabularies_of_two_sizes() -> None:
    logits = torch.zeros(2, 4)
    assert to_vocabulary(logits, 3).shape == (2, 3)
    wide = to_vocabulary(logits, 6)
    assert wide.shape == (2, 6) and torch.isinf(wide[:, 4:]).all()


def test_wrong_texts_and_missing_models() -> None:
    engine, draft = toy_engine(2)
    params = SamplingParams(temperature=0.0, max_tokens=30)
    unlikely = [Emitted([1, 2], [int((p + 1) % 9) for p in range(30)], False, None, 0)]
    with pytest.raises(ConfigError, match="not this target's own"):
        scored(engine, draft, unlikely, params)
    draft.max_length = 20
    long = [Emitted([1] * 20, [1], False, None, 0)]
    with pytest.raises(ConfigError, match="21 tokens is longer than the draft's context of 20"):
        scored(engine, draft, long, params)
    with pytest.raises(ConfigError, match="--draft"):
        draft_model(build_engine(engine.parts.target, "none"))


def test_given_completions_join_at_the_border() -> None:
    class Joins:
        """A tokenizer that reads pairs of letters, so that a completion changes the prompt's last token."""

        def encode(self, text: str) -> list[int]:
            return [ord(a) % 7 + (0 if b == "" else ord(b) % 7) for a, b in pairs(text)]

    def pairs(text: str) -> list[tuple[str, str]]:
        return [(text[i : i + 1], text[i + 1 : i + 2]) for i in range(0, len(text), 2)]

    engine, _ = toy_engine(2, tokenizer=Joins())
    e = given_text(engine, Item("abc", "defg"), 0, 64)
    assert [*e.prompt, *e.output] == Joins().encode("abcdefg")
    assert len(e.prompt) == 1  # "c" alone is another token than "cd"
    with pytest.raises(ConfigError, match="adds no token"):
        given_text(engine, Item("ab", ""), 0, 64)
