"""Checks of drafters and rules of one's own: good ones pass, and each broken one is told its class, its contract and the value."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from outrider import Engine, SamplingParams
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.ngram import NGram
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import CapabilityError
from outrider.models.toy import TableTarget
from outrider.testing import BrokenContract, check_drafter, check_rule
from outrider.types import Draft, Proposal, Verdict
from outrider.verify import SpeculativeSampling, load_rule


class Own:
    """Two nodes for each sequence, drawn from a uniform distribution with the noise of the evidence."""

    name, layers, trees, max_nodes, max_depth = "own", (), False, 2, 2

    def bind(self, slots: int, length: int) -> None:
        pass

    def release(self, slots: Any) -> None:
        pass

    def size(self, e: Any) -> int:
        return e.scores.logits.shape[-1]

    def token(self, e: Any, b: int, depth: int) -> int:
        return int(e.noise.uniform(b, depth, "draft") * self.size(e))

    def draft(self, e: Any, budget: Any) -> Draft:
        trees = [
            ([self.token(e, b, d + 1) for d in range(min(2, n))], list(range(-1, min(2, n) - 1)))
            for b, n in enumerate(budget)
        ]
        nodes = sum(len(t) for t, _ in trees)
        probs = torch.full((1, self.size(e)), 1 / self.size(e), dtype=torch.float64)
        return self.changed(Draft.join(trees, Proposal(probs, (0,) * nodes)), e)

    def changed(self, draft: Draft, e: Any) -> Draft:
        return draft


class Raises(Own):
    def changed(self, draft: Draft, e: Any) -> Draft:
        raise KeyError("no such slot")


class NoDraftAtAll(Own):
    def changed(self, draft: Draft, e: Any) -> Any:
        return [1, 2]


class OneTreeOnly(Own):
    def changed(self, draft: Draft, e: Any) -> Draft:
        return Draft(draft.token[: draft.counts[0]], draft.parent[: draft.counts[0]], draft.counts[:1])


class Misfit(Own):
    def changed(self, draft: Draft, e: Any) -> Draft:
        return Draft(draft.token, draft.parent[:-1], draft.counts)


class TooDeep(Own):
    max_nodes = 1


class Outside(Own):
    def token(self, e: Any, b: int, depth: int) -> int:
        return self.size(e) + 3


class NotOne(Own):
    def changed(self, draft: Draft, e: Any) -> Draft:
        return replace(draft, q=draft.q and replace(draft.q, probs=draft.q.probs * 2))


class Impossible(Own):
    """Gives a q under which its own tokens cannot be drawn."""

    def changed(self, draft: Draft, e: Any) -> Draft:
        probs = torch.nn.functional.one_hot((draft.token + 1) % self.size(e), self.size(e)).double()
        return replace(draft, q=Proposal(probs, tuple(range(len(draft.token)))))


class NotDrawn(Own):
    """Always the same token, and says that it was drawn."""

    def token(self, e: Any, b: int, depth: int) -> int:
        return 0


class Writes(Own):
    def changed(self, draft: Draft, e: Any) -> Draft:
        e.scores.logits[0, 0] += 1
        return draft


class Remembers(Own):
    """Has a state that release does not clear."""

    calls = 0

    def token(self, e: Any, b: int, depth: int) -> int:
        self.calls += 1
        return (super().token(e, b, depth) + self.calls // 40) % self.size(e)


class OwnRandom(Own):
    def token(self, e: Any, b: int, depth: int) -> int:
        return random.randrange(self.size(e))


class Picks(Own):
    """Draws, and drops what it does not like once it has seen it: no single draft shows that."""

    def changed(self, draft: Draft, e: Any) -> Draft:
        trees = []
        for b in range(len(draft.counts)):
            tokens, parents = draft.tree(b)
            trees.append((tokens, parents) if tokens and tokens[0] == 1 else ((), ()))
        probs = torch.full((1, self.size(e)), 1 / self.size(e), dtype=torch.float64)
        return Draft.join(trees, Proposal(probs, (0,) * sum(len(t) for t, _ in trees)))


BROKEN: list[tuple[type, str]] = [
    (Raises, "raised KeyError .*no such slot.* in draft"),
    (NoDraftAtAll, "returned list, not a Draft"),
    (OneTreeOnly, "drafted trees for 1 sequences instead of 3"),
    (Misfit, r"drafted \d+ tokens and \d+ parents"),
    (TooDeep, "drafted 2 nodes for a sequence and declares max_nodes=1"),
    (Outside, "drafted token 19, outside the vocabulary of 16"),
    (NotOne, "sums to 2, not to 1"),
    (Impossible, "has probability 0 under the q"),
    (NotDrawn, "times more often in .* nodes than its q says"),
    (Writes, "changed the logits of the step"),
    (Remembers, "a second time with the same texts and seeds"),
    (OwnRandom, "a draw that is not from the noise"),
    (Picks, "times (more|less) often|changed the distribution of the text"),
]


@pytest.mark.parametrize(("broken", "told"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_drafter_is_told_its_contract(broken: type, told: str) -> None:
    with pytest.raises(BrokenContract, match=f"the drafter {broken.__name__} .*({told})") as said:
        check_drafter(broken)
    assert "\n" not in str(said.value)


def chain() -> ModelDrafter:
    return ModelDrafter(TableTarget.random(5, seed=9), 3)


@pytest.mark.parametrize("make", [Own, lambda: NGram(3)], ids=["own", "ngram"])
def test_good_drafters_pass(make: Callable[[], Any]) -> None:
    report = check_drafter(make)
    assert len(report.checked) == 8 and not report.left_out


def test_a_drafter_for_a_certain_target_is_tried_on_that() -> None:
    target = TableTarget.random(5, seed=3)
    tree = ModelDrafter(target.perturbed(0.5, 4), 2, growth=Levels(levels((2, 2)), 5), vocab_size=5)
    for make in (chain, lambda: ModelDrafter(tree.model, 2, growth=tree.growth, vocab_size=5)):
        report = check_drafter(make, target)
        assert "distribution of the text" in report.left_out[0] and "held" in str(report)


# ----------------------------------------------------------------------------------- rules
class Rule(SpeculativeSampling):
    def __call__(self, p: Any, draft: Draft, noise: Any, allowance: Any = None) -> Any:
        return self.changed(super().__call__(p, draft, noise, allowance), p, draft)

    def changed(self, verdict: Verdict, p: Any, draft: Draft) -> Any:
        return verdict


class Fails(Rule):
    def changed(self, verdict: Verdict, p: Any, draft: Draft) -> Any:
        return verdict.path[len(verdict.path)]


class NoVerdict(Rule):
    def changed(self, verdict: Verdict, p: Any, draft: Draft) -> Any:
        return verdict.path


class TooFew(Rule):
    def changed(self, verdict: Verdict, p: Any, draft: Draft) -> Any:
        return replace(verdict, risk=verdict.risk[:-1])


class Skips(Rule):
    """Accepts the second node of a chain without the first."""

    def changed(self, verdict: Verdict, p: Any, draft: Draft) -> Any:
        return replace(verdict, path=tuple(path[1:] for path in verdict.path))


class Wild(Rule):
    def changed(self, verdict: Verdict, p: Any, draft: Draft) -> Any:
        return replace(verdict, next_token=tuple(t + 10**6 for t in verdict.next_token))


class Scribbles(Rule):
    def changed(self, verdict: Verdict, p: Any, draft: Draft) -> Any:
        p[0] = 0
        return verdict


class Moody(Rule):
    calls = 0

    def changed(self, verdict: Verdict, p: Any, draft: Draft) -> Any:
        self.calls += 1
        return replace(verdict, next_token=tuple((t + self.calls) % 3 for t in verdict.next_token))


class Generous(Rule):
    """Accepts a chain whole, whatever it is, with the target's most likely token behind it."""

    def changed(self, verdict: Verdict, p: Any, draft: Draft) -> Any:
        whole = tuple(tuple(draft.nodes(b)) if draft.is_chain else verdict.path[b] for b in range(len(draft.counts)))
        judged = tuple(max(len(w), j) for w, j in zip(whole, verdict.judged, strict=True))
        return replace(verdict, path=whole, judged=judged)


class Boasts(Rule):
    """Announces fewer rejections than it makes."""

    def changed(self, verdict: Verdict, p: Any, draft: Draft) -> Any:
        return replace(verdict, risk=tuple(r / 2 for r in verdict.risk))


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (Fails, "raised IndexError"),
        (NoVerdict, "returned tuple, not a Verdict"),
        (TooFew, "gave 599 values of 'risk' for 600 sequences"),
        (Skips, "accepted node .* and not the node above it"),
        (Wild, "gave the next token 100000., outside the vocabulary of 3"),
        (Scribbles, "changed its arguments"),
        (Moody, "gave two verdicts on the same arguments"),
        (Generous, "changes the distribution of the text on chains drawn from q"),
        (Boasts, "said .* rejections and made"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_broken_rule_is_told_its_contract(broken: type, told: str) -> None:
    with pytest.raises(BrokenContract, match=f"the rule {broken.__name__} {told}") as said:
        check_rule(broken)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "name", ["speculative_sampling", "match", "block", pytest.param("tv_budget", marks=pytest.mark.slow)]
)
def test_good_rules_pass(name: str) -> None:
    report = check_rule(lambda: load_rule(name))
    assert len(report.checked) == 5
    assert ("what it spends where it may" in report.left_out) == (not load_rule(name).lossless)


# ----------------------------------------------------------------------------------- in an engine
def test_an_engine_names_the_class_of_what_is_broken() -> None:
    params = SamplingParams(seed=1, max_tokens=12, ignore_eos=True)
    with pytest.raises(CapabilityError, match=r"the rule Wild gave the next token .*check_rule"):
        Engine.build(rule=Wild(), draft="ngram", slots=1).generate("a = 1\na = ", params)
    engine = Engine.build(draft=NotOne(), slots=1)
    engine.generate("x", params)
    assert any("drafts of NotOne had" in notice and "check_drafter" in notice for notice in engine.notices)
    engine = Engine.build(draft=Misfit(), slots=1)
    engine.generate("x", params)
    assert any("fix Misfit (outrider.testing.check_drafter" in notice for notice in engine.notices)
