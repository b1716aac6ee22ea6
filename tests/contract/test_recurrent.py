"""Targets whose state cannot be cut keep the contracts: every row has the exact distribution after any script of drafts, rejections,
cuts and releases, and every chain drafter gives the text of plain decoding. Trees are refused in a sentence.

The target is a table of known logits behind a state as models of transformers keep it (`models.toy_recurrent`); the same script runs
on the table itself, which has rows that can be forgotten, and all logits are equal.
"""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.errors import CapabilityError
from outrider.models import states
from outrider.models.states import MOST_MERGED, StateCaches
from outrider.models.toy import TableTarget
from outrider.models.toy_recurrent import RecurrentTarget
from outrider.records import StepRecord
from outrider.types import Draft, Rows
from outrider.verify import load_rule
from tests.contract.asked import PROMPTS, VOCAB, engine, params, tokens
from tests.contract.drafters import DRAFTERS

TABLE = TableTarget.random(VOCAB, seed=3, order=3, positions=2, sharp=4.0)
"""Its last tokens but one still matter: a wrong state shows behind the token that is read again at least."""


def chain(found: list[list[int]]) -> Draft:
    first = [sum(map(len, found[:i])) for i in range(len(found))]
    linked = [first[i] + j - 1 if j else -1 for i, f in enumerate(found) for j in range(len(f))]
    return Draft(torch.tensor([t for f in found for t in f], dtype=torch.int64), tuple(linked), tuple(map(len, found)))


def script(target: RecurrentTarget, seed: int, steps: int, accept: float = 0.6) -> float:
    """The largest difference of a row from the table itself, over `steps` random steps of up to three slots."""
    chance, worst = random.Random(seed), 0.0
    pair = [(m, m.new_kv(3, 400)) for m in (target, TABLE)]
    for _ in range(steps):
        slots = chance.sample(range(3), chance.randint(1, 3))
        length = pair[0][1].length
        for slot in slots:
            what = chance.random()
            if what < 0.03 or length[slot] > 300:
                for _, kv in pair:
                    kv.release([slot])
            elif what < 0.08 and length[slot]:
                keep = chance.randint(0, length[slot])
                for _, kv in pair:
                    kv.truncate(slot, keep)
        prefixes = [[chance.randrange(VOCAB) for _ in range(chance.choice((1, 1, 1, 5)))] for _ in slots]
        drafts = [[chance.randrange(VOCAB) for _ in range(chance.choice((0, 1, 3, 6)))] for _ in slots]
        rows = Rows.assemble(slots, prefixes, [length[s] for s in slots], chain(drafts))
        kept = [next((i for i in range(len(d)) if chance.random() > accept), len(d)) for d in drafts]
        scores = []
        for model, kv in pair:
            kv.reserve(rows)
            scores.append(model.forward(rows, kv, layers=(1,)))
            kv.commit(rows, [range(k) for k in kept])
        worst = max(worst, float((scores[0].logits - scores[1].logits).abs().max()))
        worst = max(worst, float((scores[0].hidden[0] - scores[1].hidden[0]).abs().max()))
    return worst


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_row_has_the_exact_distribution(seed: int, by_token: bool) -> None:
    assert script(RecurrentTarget(TABLE, by_token=by_token), seed, 150) == 0.0


@pytest.mark.parametrize("fault", ["shared", "late", "forgetful"])
def test_a_faulty_snapshot_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: a snapshot that shares what is overwritten, one taken after the rows, and none of a number beside them."""
    if fault == "shared":
        monkeypatch.setattr(states.Snapshot, "__init__", shared(states.Snapshot.__init__))
    elif fault == "late":
        monkeypatch.setattr(StateCaches, "_keep", lambda self, slot, others=0: None)
        monkeypatch.setattr(StateCaches, "advance", late(StateCaches.advance))
    else:
        monkeypatch.setattr(states, "containers", lambda root, opaque=(): iter([((), root)]))
    assert script(RecurrentTarget(TABLE), 0, 150) > 0.1


def shared(init):
    def wrong(self, state, count, growing, opaque=()):
        clone, torch.Tensor.clone = torch.Tensor.clone, lambda t: t  # type: ignore[method-assign, assignment]
        try:
            init(self, state, count, growing, opaque)
        finally:
            torch.Tensor.clone = clone  # type: ignore[method-assign]

    return wrong


def late(advance):
    def wrong(self, slot, read, count):
        before = self.fed[slot]
        advance(self, slot, read, count)
        self.saved[slot] = [states.Snapshot(self.state[slot], before, {})]

    return wrong


# ----------------------------------------------------------------------------------------------------------- with engines
@cache
def plain(rule: str, sampling: str) -> list[tuple[int, ...]]:
    out = []
    for prompt, p in zip(PROMPTS, params(sampling), strict=True):
        out += tokens(engine(TABLE, NoDraft(), load_rule(rule), 1).generate([prompt], [p]))
    return out


SPREAD = [
    pytest.param(name, by_token, marks=() if not by_token or name in ("model", "ngram") else pytest.mark.slow)
    for name in DRAFTERS
    for by_token in (False, True)
]


@pytest.mark.parametrize(("drafter", "by_token"), SPREAD)
def test_every_chain_drafter_gives_the_text_of_plain_decoding(drafter: str, by_token: bool) -> None:
    target = RecurrentTarget(TABLE, by_token=by_token)
    try:
        made = DRAFTERS[drafter](target, 3)  # type: ignore[arg-type]
    except CapabilityError as refusal:
        assert "\n" not in str(refusal)
        return
    if made.trees:
        with pytest.raises(CapabilityError, match="this target cannot score them: use a chain"):
            engine(target, made, load_rule("match"), 3)
        return
    for rule, sampling in (("match", "temperature 1"), ("speculative_sampling", "greedy with penalties")):
        one = engine(target, DRAFTERS[drafter](target, 3), load_rule(rule), 3)  # type: ignore[arg-type]
        assert tokens(one.generate(PROMPTS, params(sampling))) == plain("match", sampling)


@pytest.mark.parametrize("by_token", [False, True])
def test_a_draft_model_may_have_a_state_too(by_token: bool) -> None:
    """It is cut after every draft: from its second draft on nothing that it has read is read again."""
    related = RecurrentTarget(TABLE.perturbed(0.5, 1), by_token=by_token)
    drafter = ModelDrafter(related, 4)
    one = engine(TABLE, drafter, load_rule("match"), 3)
    assert tokens(one.generate(PROMPTS, params("temperature 1"))) == plain("match", "temperature 1")
    assert one.counts.rejected > 5
    assert drafter.cache.kv.replayed == 0  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------------ costs
def rejecting(target: RecurrentTarget, steps: int, accepted: int, drafted: int) -> list[tuple[int, int]]:
    """(calls, tokens read again) of each of `steps` steps whose drafts lose all but `accepted` nodes."""
    kv, out = target.new_kv(1, 400), []
    for _ in range(steps):
        rows = Rows.assemble([0], [[1]], [kv.length[0]], chain([[2] * drafted]))
        before = target.calls
        scores = target.forward(rows, kv)
        kv.commit(rows, [range(accepted)])
        out.append((target.calls - before, scores.replayed))
    return out


def test_a_rejection_costs_rows_and_seldom_a_call() -> None:
    costs = rejecting(RecurrentTarget(TABLE), 40, 1, 4)
    assert max(again for _, again in costs) <= MOST_MERGED + 2
    assert sum(calls for calls, _ in costs) <= 40 * (1 + 2 / MOST_MERGED) + 1
    assert {again for _, again in rejecting(RecurrentTarget(TABLE), 20, 4, 4)} == {0}  # nothing is rejected
    assert {again for _, again in rejecting(RecurrentTarget(TABLE, by_token=True), 20, 1, 4)} == {0}


def test_a_record_says_what_was_read_again() -> None:
    records: list[StepRecord] = []
    target = RecurrentTarget(TABLE)
    one = engine(target, DRAFTERS["model"](target, 1), load_rule("match"), 1, sinks=(records.append,))  # type: ignore[arg-type]
    one.generate([PROMPTS[0]], params("temperature 1")[:1])
    again = [r.replayed for r in records]
    assert sum(again) > 0
    for before, after in zip(records, records[1:], strict=False):
        if not before.counts.rejected and before.counts.proposed:
            assert after.replayed == 0
