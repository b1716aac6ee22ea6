"""What measured acceptance would be worth on a large target: tokens per second predicted by a roofline, never measured.

The acceptance by position is what was measured here; the time of a step comes from `outrider.theory.roofline`:

    step = passes x forward(drafter) + forward(target, nodes + 1 rows),      speed = tokens per step / step

What a drafter of a large target is made of is an assumption, one per kind (`drafter_of`). Acceptance is carried over as it
is: a drafter trained for the large target will have another one, and the rates are bounds no software reaches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from outrider.evaluate.bench.presets import Spec
from outrider.evaluate.records import Record
from outrider.evaluate.statistics.ratios import Ratio, ratio_of_sums
from outrider.records import Counts
from outrider.theory.hardware import Hardware, Model
from outrider.theory.hardware import model as model_of_size
from outrider.theory.roofline import USABLE, Setting, forward
from outrider.theory.speedup import tokens_per_call_by_position

TARGETS = ("7b", "13b", "70b")
SEQUENCE = 5
"""Square matrices of the target's width that the residual blocks of the shipped sequential heads are as large as."""
OUTPUT_TOKENS = 32_000
"""Rows of a learned drafter's output matrix: the size of the reduced vocabularies of published EAGLE-3 drafters."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What is carried over from a measured arm. tokens: per step, by prompt clusters. nodes: proposed per step.

    share: the drafter's weights over the target's, for a draft model.
    """

    spec: Spec
    acceptance: tuple[float, ...]
    tokens: Ratio
    nodes: float
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Predicted:
    """Predicted tokens per second of one sequence, with what the sampling of prompts makes of it. Never a measurement."""

    arm: str
    target: str
    devices: int
    tokens_per_second: Ratio
    plain: float
    draft_seconds: float
    verify_seconds: float
    predicted: bool = True


def survival(counts: Counts) -> list[float]:
    """Acceptance by position: at depth d, given that the ones before were accepted (depth 1: of all steps).

    1 + the sum of their products is exactly the tokens per step. A step without a draft counts as one that was rejected.
    """
    accepted = [a for a in counts.accepted_at if a > 0]
    return [a / b for a, b in zip(accepted, [max(1, counts.steps), *accepted], strict=False)]


def carry_over(spec: Spec, records: Sequence[Record], share: float = 0.0) -> Measured:
    """What the records of one arm say about acceptance; the interval is over prompt groups."""
    counts = Counts()
    for r in records:
        counts.merge(r.counts)
    groups = sorted({r.group for r in records})
    accepted = np.array([sum(r.counts.accepted for r in records if r.group == g) for g in groups], dtype=float)
    steps = np.array([sum(r.counts.steps for r in records if r.group == g) for g in groups], dtype=float)
    extra = ratio_of_sums(accepted, steps)
    acceptance = tuple(survival(counts))
    value = tokens_per_call_by_position(list(acceptance)) if acceptance else 1.0
    tokens = Ratio(value, 1.0 + max(0.0, extra.low), 1.0 + extra.high)
    return Measured(spec, acceptance, tokens, counts.proposed / max(1, counts.steps), share)


def drafter_of(target: Model, arm: Measured) -> tuple[Model | None, int]:
    """The drafter an arm would have on a large target, as a model of the roofline, and its passes per step.

    model: the measured share of the target's parameters, one pass a token. layer (EAGLE): one of the target's layers and an
    output matrix, one pass a level. block: the same, one pass in all. heads (Medusa): a square matrix a head and one output
    matrix, one pass. sequence (heads one after the other): SEQUENCE square matrices and an output matrix, one pass a level.
    nothing: no weights.
    """
    spec, wide = arm.spec, target.heads * target.head_dim
    output = float(OUTPUT_TOKENS * wide)
    layer = (target.parameters - 2 * output) / target.layers
    if spec.cost == "nothing" or spec.length == 0:
        return None, 0
    if spec.cost == "model":
        return model_of_size(f"{round(arm.share * target.parameters)}"), spec.length
    if spec.cost == "heads":
        return replace(target, name="heads", parameters=spec.length * wide**2 + output, layers=0, source="heads"), 1
    if spec.cost == "sequence":
        small = SEQUENCE * wide**2 + output
        return replace(target, name="sequence", parameters=small, layers=0, source="sequential heads"), spec.length
    one = replace(target, name="layer", parameters=layer + output, layers=1, source="one layer and an output matrix")
    return one, spec.length if spec.cost == "layer" else 1


def devices_for(target: Model, hardware: Hardware, context: int) -> int:
    """Fewest devices whose usable memory holds weights and one sequence."""
    return math.ceil((target.weight_bytes() + target.kv_bytes() * context) / (USABLE * hardware.memory))


def predict_arm(arm: Measured, size: str, hardware: Hardware, *, context: int = 1024) -> Predicted:
    """One bar: `arm` on a target of `size` (such as "70b"), one sequence, bfloat16."""
    target = model_of_size(size)
    setting = Setting(hardware, batch=1, context=context, devices=devices_for(target, hardware, context))
    drafter, passes = drafter_of(target, arm)
    drafting = passes * forward(drafter, setting).seconds if drafter is not None else 0.0
    verify = forward(target, setting, math.ceil(arm.nodes) + 1).seconds
    speed = Ratio(*(t / (drafting + verify) for t in (arm.tokens.value, arm.tokens.low, arm.tokens.high)))
    return Predicted(
        arm.spec.name, size, setting.devices, speed, 1.0 / forward(target, setting).seconds, drafting, verify
    )
