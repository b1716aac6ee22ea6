"""Drafts that are prepared while the target verifies: the same drafts, whatever came true and whatever breaks."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.ahead import Ahead
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.errors import CapabilityError, ConfigError
from outrider.models.toy import TableTarget, TinyLM
from outrider.nn.kv import PagedKV
from outrider.params import SamplingParams
from outrider.protocols import Drafter
from outrider.verify import SpeculativeSampling

TARGET = TinyLM(17, 16, 1, seed=3, sharp=3.0)
LENGTH = 3


def draft_model() -> TinyLM:
    return TARGET.perturbed(0.3, seed=7)


def run(drafter: Drafter, slots: int = 2) -> tuple[list[list[int]], Engine]:
    engine = Engine(TARGET, drafter, SpeculativeSampling(), Fixed(LENGTH), slots=slots)
    params = [
        SamplingParams(max_tokens=30, seed=n, temperature=0.0 if n == 2 else 0.8, ignore_eos=True) for n in range(4)
    ]
    return [list(r.outputs[0].token_ids) for r in engine.generate([[1, 2], [3], [4], [1, 2, 5]], params)], engine


@pytest.mark.parametrize("inline", [True, False])
def test_the_text_is_that_of_the_drafter_alone(inline: bool) -> None:
    """At any temperature: noise is keyed, so a prepared draft is the draft that would have been made. Only outcomes differ."""
    alone, plain = run(ModelDrafter(draft_model(), LENGTH))
    drafter = Ahead(ModelDrafter(draft_model(), LENGTH + 1), 4, inline=inline)
    texts, engine = run(drafter)
    assert texts == alone
    assert engine.counts.accepted == plain.counts.accepted
    if inline:  # everything is ready in time
        assert drafter.hits > 10


@pytest.mark.parametrize("inline", [True, False])
def test_premises_give_their_pages_back(inline: bool) -> None:
    """They begin with the pages of their sequences; when all requests have ended no slot holds a page."""
    drafter = Ahead(ModelDrafter(draft_model(), LENGTH + 1), 4, inline=inline)
    run(drafter)
    drafter.release(range(2))
    kv = drafter.inner.cache.kv
    assert isinstance(kv, PagedKV)
    assert kv.spare == kv.pages.count
    assert not any(drafter.inner.cache.held)


def test_premises_read_their_last_token_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """All else is in the pages that they share: a row for each premise and level, whatever the length of the text."""
    drafter = Ahead(ModelDrafter(draft_model(), LENGTH + 1), 4, inline=True)
    rows: list[int] = []
    prepare = drafter.inner.draft

    def counted(evidence, budget):
        before = [len(h) for h in drafter.inner.cache.held]
        draft = prepare(evidence, budget)
        if evidence.sequences and evidence.sequences[0].slot >= 2:  # of premises
            rows.extend(len(drafter.inner.cache.held[v.slot]) - before[v.slot] for v in evidence.sequences)
        return draft

    monkeypatch.setattr(drafter.inner, "draft", counted)
    run(drafter)
    assert rows
    assert max(rows) <= LENGTH + 2  # the outcome's last tokens, and a row for each level but the last


def test_more_premises_come_true_more_often() -> None:
    shares = []
    for premises in (1, 8):
        drafter = Ahead(ModelDrafter(draft_model(), LENGTH + 1), premises, inline=True)
        run(drafter)
        shares.append(drafter.hits / (drafter.hits + drafter.misses))
    assert shares[0] < shares[1]


def test_a_worker_that_fails_costs_nothing_but_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once, and drafts are made as usual from then on."""
    alone, _ = run(ModelDrafter(draft_model(), LENGTH), slots=1)
    forward = TARGET.forward

    def slow(*rows, **layers):  # leaves the worker the time to fail
        time.sleep(0.01)
        return forward(*rows, **layers)

    monkeypatch.setattr(TARGET, "forward", slow)

    class Breaking(ModelDrafter):
        calls = 0

        def draft(self, evidence, budget):
            if threading.current_thread().name == "outrider-ahead":
                Breaking.calls += 1
                if Breaking.calls == 3:
                    super().draft(evidence, budget)  # what it has done then must be forgotten
                    raise RuntimeError("boom")
            return super().draft(evidence, budget)

    texts, engine = run(Ahead(Breaking(draft_model(), LENGTH + 1), 4), slots=1)
    assert texts == alone
    assert Breaking.calls == 3
    assert [n for n in engine.notices if "boom" in n] == [n for n in engine.notices if "ahead" in n]
    assert engine.defects == 0


def test_the_thread_ends_with_its_drafter() -> None:
    """And the draft model and its cache go with the drafter: the thread keeps nothing of them between tasks."""
    before = set(threading.enumerate())
    drafter = Ahead(ModelDrafter(draft_model(), LENGTH + 1), 4)
    run(drafter)
    drafter.release(range(2))  # nothing is being prepared any more
    (thread,) = set(threading.enumerate()) - before
    inner = weakref.ref(drafter.inner)
    del drafter
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    assert inner() is None


def test_only_chains_of_a_draft_model() -> None:
    for inner in (NGram(4), ModelDrafter(TableTarget.random(17, seed=1), 3, branching=(2, 1, 1))):
        with pytest.raises(CapabilityError, match="drop 'ahead:'"):
            Ahead(inner, 2)
    with pytest.raises(ConfigError):
        Ahead(ModelDrafter(TARGET, 1), 2)
