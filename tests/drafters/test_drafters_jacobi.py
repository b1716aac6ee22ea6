"""Jacobi drafting: what it draws and declares, what survives from pass to pass, and that the text keeps its distribution.

Chi-square of four tokens, V = 5, false-alarm probability 1e-9 per assertion, as in `contract/test_joint_law.py`; `match` against
plain decoding, every rule and every kind of request is in the contract suite.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from outrider.build import Engine
from outrider.drafters.jacobi import Jacobi
from outrider.drafters.registry import load_drafter
from outrider.engine.core import EngineCore
from outrider.engine.parts import CoreOptions, Hooks, Parts
from outrider.errors import CapabilityError, ConfigError
from outrider.models.toy import TableTarget, TinyLM
from outrider.params import SamplingParams
from outrider.protocols import Rule
from outrider.sampling.pipeline import LogitsPipeline
from outrider.types import Evidence
from outrider.verify import best_exact, load_rule
from tests.contract.scripted import Budgets
from tests.contract.test_joint_law import TARGET, V, collect, exact_joint, statistic

MODEL = TinyLM(19, 16, 2, seed=3, sharp=3.0)


class Watched(Jacobi):
    """Keeps every evidence and the draft made of it. Views show the tokens of later steps, noise the anchor of their own."""

    def __init__(self, *args, **more) -> None:
        super().__init__(*args, **more)
        self.seen: list[tuple[Evidence, object]] = []

    def draft(self, evidence, budget):
        out = super().draft(evidence, budget)
        self.seen.append((evidence, out))
        return out


def run(drafter: Jacobi, rule: str = "speculative_sampling", n: int = 24, model=MODEL, **params) -> EngineCore:
    engine = Engine(model, drafter, load_rule(rule), Budgets(lambda s: drafter.max_depth), slots=2, max_length=64)
    engine.generate([[1, 2], [3]], SamplingParams(max_tokens=n, seed=5, **params))
    return engine


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "top_k": 5, "frequency_penalty": 0.5}])
def test_every_guess_is_the_race_of_its_declared_row_and_its_absolute_place(params: dict) -> None:
    drafter = Watched(5, MODEL.vocab_size)
    run(drafter, **params)
    judged = 0
    for evidence, draft in drafter.seen:
        for i in range(len(draft.counts)):
            for depth, k in enumerate(draft.nodes(i), start=1):
                q = draft.q.probs[draft.q.row[k]].double()
                race = q / evidence.noise.exponential(i, depth, len(q))
                assert draft.tokens[k] == int(race.argmax())
                judged += 1
    assert judged > 100


def test_behind_a_rejection_the_rows_are_those_of_the_last_pass() -> None:
    """Without history in the parameters the declared rows are the target's own at the old guesses, bit for bit."""
    drafter = Watched(5, MODEL.vocab_size)
    run(drafter)
    compared = 0
    for evidence, draft in drafter.seen:
        for i in range(len(draft.counts)):
            b = evidence.verdict_index[i]
            if b < 0 or not draft.counts[i]:
                continue
            old, accepted = evidence.draft, len(evidence.verdict.path[b])
            behind = [old.row(b, k) for k in list(old.nodes(b))[accepted:]]
            p = torch.softmax(evidence.scores.logits[behind], -1)
            for row, k in zip(p, draft.nodes(i), strict=False):
                assert torch.equal(row, draft.q.probs[draft.q.row[k]])
                compared += 1
    assert compared > 50


def test_a_guess_survives_where_its_distribution_does() -> None:
    """The share of guesses that stay from pass to pass. The distributions of this target depend little on the token before, as in
    flat images: keyed guesses mostly stay, fresh ones do not."""
    noise = torch.Generator().manual_seed(2)
    flat = torch.randn(40, 1, 19, generator=noise) + 0.3 * torch.randn(40, 19, 19, generator=noise)

    def kept(keyed: bool) -> float:
        drafter = Watched(6, 19, keyed=keyed)
        run(drafter, n=38, model=TableTarget(flat))
        before: dict[tuple[int, int], int] = {}
        same = []
        for evidence, draft in drafter.seen:
            for i, view in enumerate(evidence.sequences):
                for depth, k in enumerate(draft.nodes(i)):
                    place = (view.slot, evidence.noise.position[i] + 1 + depth)
                    if place in before:
                        same.append(before[place] == draft.tokens[k])
                    before[place] = draft.tokens[k]
        assert len(same) > 40
        return float(np.mean(same))

    assert kept(True) > 0.5 > 0.4 > kept(False)


def test_the_row_above_starts_a_window() -> None:
    """Places that no pass has seen copy the token one row above, as one-hot rows beside dense ones; in the first row of the image,
    where nothing is above, the nearest distribution."""
    columns, drafter = 6, Watched(4, MODEL.vocab_size, columns=6)
    run(drafter, n=30)
    copies = dense = 0
    for evidence, draft in drafter.seen:
        for i, view in enumerate(evidence.sequences):
            for depth, k in enumerate(draft.nodes(i)):
                q, above = draft.q.probs[draft.q.row[k]], evidence.noise.position[i] + 1 + depth - columns
                one_hot = float(q.max()) == 1.0
                if one_hot:
                    assert above >= view.prompt
                    assert draft.tokens[k] == view.tokens[above] == int(q.argmax())
                copies, dense = copies + one_hot, dense + (not one_hot)
    assert copies > 10
    assert dense > 10


@pytest.mark.parametrize(
    "case", ["keyed", "row above", *(pytest.param(c, marks=pytest.mark.slow) for c in ("fresh", "fresh, block"))]
)
def test_joint_distribution_of_four_tokens(case: str) -> None:
    rule = "block" if "block" in case else "speculative_sampling"
    drafter = Jacobi(3, V, columns=2 if case == "row above" else 0, keyed="fresh" not in case)
    depth = Budgets(lambda s: (s.seed * 7 + len(s.tokens)) % 4)
    engine = Engine(TARGET, drafter, load_rule(rule), depth, slots=512, max_length=32)
    n = 2_000
    value, bound = statistic(collect(engine, n, seed=5, disturb=True), exact_joint() * n)
    assert value < bound
    assert min(engine.counts.accepted, engine.counts.rejected) > 300


def unchecked(drafter: Jacobi, rule: Rule) -> EngineCore:
    """An engine without the check of what fits together."""
    drafter.bind(512, 32)
    parts = Parts(TARGET, TARGET.new_kv(512, 40), LogitsPipeline(V), rule, drafter)
    return EngineCore(parts, Hooks(Budgets(lambda s: 3)), CoreOptions(512, 32))


def test_control_guesses_declared_as_uniform_are_seen() -> None:
    """Negative control: rows that are not what was drawn from, and the same statistic sees it."""

    class Uniform(Jacobi):
        def draft(self, evidence, budget):
            out = super().draft(evidence, budget)
            if out.q is not None:
                out.q.probs.fill_(1.0 / V)
            return out

    n = 2_000
    wrong = unchecked(Uniform(3, V), load_rule("speculative_sampling"))
    value, bound = statistic(collect(wrong, n, seed=5, disturb=False), exact_joint() * n)
    assert value > bound


@pytest.mark.parametrize("rule", ["block", "traversal"])
def test_rules_that_look_below_are_refused(rule: str) -> None:
    with pytest.raises(CapabilityError, match="use speculative_sampling or match, or fresh noise"):
        Engine(MODEL, Jacobi(3, 19), load_rule(rule), Budgets(lambda s: 3), slots=1)
    Engine(MODEL, Jacobi(3, 19, keyed=False), load_rule(rule), Budgets(lambda s: 3), slots=1)
    assert best_exact(Jacobi(3, 19)).name == "speculative_sampling"
    assert best_exact(Jacobi(3, 19, keyed=False)).name == "block"


def test_specs(tmp_path) -> None:
    load = lambda spec, length=8, **more: load_drafter(spec, target=MODEL, length=length, **more)  # noqa: E731
    made = load("jacobi")
    assert (made.max_depth, made.columns, made.keyed) == (8, 0, True)
    made = load("jacobi:5:up16:fresh")
    assert (made.max_depth, made.columns, made.keyed) == (5, 16, False)
    assert load("ngram+jacobi:4").keyed
    raster = {"height": 2, "width": 3, "patch": 1, "classes": {"a": 2}, "null": 3, "colours": [[0], [255]]}
    (tmp_path / "raster.json").write_text(json.dumps(raster))
    assert load("jacobi:5:up", target_path=str(tmp_path)).columns == 3
    for spec, words in (
        ("jacobi:9", "raise the length"),
        ("jacobi:5:up", "no raster.json: write 'up32' for 32"),
        ("jacobi:five", "is written 'jacobi:WINDOW'"),
        ("jacobi:0:fresh:up", "is written"),
    ):
        with pytest.raises(ConfigError, match=words):
            load(spec)
