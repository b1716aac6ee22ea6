"""Lengths per sequence change no distribution: the joint distribution of four tokens, and texts that may not change at all.

Step times are scripted: a pass takes time by its rows, so lengths are a function of the counts alone. False-alarm probability 1e-9
(chi-square, no reruns).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from outrider.build import Engine
from outrider.control.bass import Bass
from outrider.control.fixed import Fixed
from outrider.control.per_sequence import PerSequence
from outrider.drafters.model.drafter import ModelDrafter
from outrider.params import SamplingParams
from outrider.records import StepRecord
from outrider.verify import load_rule
from tests.contract.test_joint_law import DRAFT, PROMPT, TARGET, collect, exact_joint, statistic

LONGEST = 4


class Timed(PerSequence):
    """Told that a pass takes a time by its rows, and a level of a draft another."""

    def __init__(self, invariant: bool = True) -> None:
        super().__init__(2, LONGEST, invariant=invariant)
        self.asked: set[tuple[int, ...]] = set()

    def budget(self, sequences):
        out = super().budget(sequences)
        self.asked.add(tuple(out))
        return out

    def observe(self, record: StepRecord) -> None:
        seconds = {"target": 0.01 + 0.0002 * record.rows, "rule": 0.0, "host": 0.0, "draft": 0.0002 * self._deepest}
        super().observe(replace(record, seconds=seconds))


def engine(controller, rule: str = "speculative_sampling") -> Engine:
    return Engine(TARGET, ModelDrafter(DRAFT, LONGEST), load_rule(rule), controller, slots=6)


@pytest.mark.parametrize("rule", ["speculative_sampling", pytest.param("block", marks=pytest.mark.slow)])
def test_the_joint_distribution_is_the_targets(rule) -> None:
    """Seeded requests whose lengths follow the counts, with strangers that come, go and are preempted. A control: the distribution
    at another temperature is told from it."""
    controller = Timed()
    mine = engine(controller, rule)
    count = collect(mine, 600, seed=3, disturb=True)
    assert not mine.defects, "the controller never failed"
    value, bound = statistic(count, exact_joint() * count.sum())
    assert value < bound
    value, bound = statistic(count, exact_joint(0.6) * count.sum())
    assert value > bound, "the control"
    assert len({x for lengths in controller.asked for x in lengths}) >= 3, "lengths differ"


@pytest.mark.parametrize("make", [Timed, lambda: Bass(2, LONGEST, invariant=True)])
@pytest.mark.parametrize(("rule", "temperature"), [("match", 1.0), ("speculative_sampling", 0.0)])
def test_texts_that_do_not_depend_on_lengths_stay(make, rule, temperature) -> None:
    texts = []
    for controller in (Fixed(0), make()):
        mine = engine(controller, rule)
        params = [SamplingParams(temperature=temperature, max_tokens=30, seed=i) for i in range(9)]
        texts.append([r.outputs[0].token_ids for r in mine.generate([[*PROMPT, i % 5] for i in range(9)], params)])
        assert not mine.defects
    assert texts[0] == texts[1]


def test_a_seed_fixes_a_text_whatever_its_neighbours_do() -> None:
    """Without a rule that makes lengths invisible, a sampled request with its own seed keeps one length."""
    texts = []
    for neighbours in (0, 5):
        mine = engine(Timed(invariant=False))
        params = [SamplingParams(max_tokens=30, seed=7), *[SamplingParams(max_tokens=60)] * neighbours]
        texts.append(mine.generate([PROMPT] * len(params), params)[0].outputs[0].token_ids)
        assert not mine.defects
    assert texts[0] == texts[1]


def test_the_record_of_a_step_counts_every_sequence() -> None:
    records: list[StepRecord] = []
    mine = Engine(
        TARGET,
        ModelDrafter(DRAFT, LONGEST),
        load_rule("speculative_sampling"),
        Fixed(3),
        slots=3,
        sinks=(records.append,),
    )
    mine.generate([PROMPT] * 7, SamplingParams(max_tokens=20, ignore_eos=True))
    for record in records:
        assert len(record.each) == record.scored == len({one.slot for one in record.each})
        assert sum(one.proposed for one in record.each) == record.counts.proposed
        assert sum(one.judged for one in record.each) == record.counts.judged
        assert sum(one.accepted for one in record.each) == record.counts.accepted + record.counts.dropped
