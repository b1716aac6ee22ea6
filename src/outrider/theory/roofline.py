"""Speed with batch and context: when verification is free, when it is not, and what limits each phase.

A forward of B sequences with n rows each at context S moves the weights once and every sequence's keys and values once, and
computes on every row (the batch and context model of Chen et al., "MagicDec", ICLR 2025, as a roofline):

    time(n) = max( (W + B k S) / bandwidth,  B n (2 N + A S) / compute ) / devices + overhead

W weight bytes (of a mixture of experts, those that B n rows touch: `theory.experts`), k bytes of keys and values per token, N
parameters that a row uses, A attention operations per row and token of context.
One speculative call is `length` draft forwards of one row and one target forward of length + 1 rows. Three regimes follow:

- weight-bound (small B and S): more rows cost nothing, and the draft costs its share of the weights;
- compute-bound (B n above compute / bandwidth): every row costs, rejected drafts are paid in full, speculation loses;
- KV-bound (B k S much above W): rows are free again at any B, and with a draft that attends to a short window
  (`draft_context`) the speed-up grows with the batch.

Over several devices (`link`), tensor parallelism divides bytes and operations and adds two all-reduces a layer; pipeline stages
divide the layers: a forward passes all of them, and with at least as many batches in flight as stages every stage is busy, so
`pipeline` stages multiply the tokens per second and not the speed of one sequence (`theory.links`). Without a link the division is
free: an upper bound.

These are predictions from rates, upper bounds of both plain and speculative speed, unless `efficiency` says what share of the
rates is reached: no kernel, no scheduler. Nothing here is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from outrider.theory.checks import fraction, number, positive_int
from outrider.theory.context_times import least_number
from outrider.theory.hardware import Hardware, Model
from outrider.theory.links import Link, pipeline_seconds, tensor_seconds
from outrider.theory.recurrent import Reread, reread
from outrider.theory.speedup import tokens_per_call

Bottleneck = Literal["weights", "kv", "compute", "link"]
USABLE = 0.9
"""Share of a device's memory that weights and keys and values may take; the rest is activations and the runtime."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is fixed while lengths are compared. context: tokens in the cache of each sequence (on average).

    draft_context: tokens the draft attends to; None: all. element: bytes of a weight and of a key or value (2: bfloat16).
    overhead: seconds added to every forward (launches, host).
    devices: of one copy, tensor-parallel in each of `pipeline` stages; link: between devices of a stage, None: free. between: from
    stage to stage (default: the same). draft_devices: that the draft is split over (default: a stage's). efficiency: share of the
    rates of memory and arithmetic that software reaches. recurrent: the target's state cannot be cut, so that accepted tokens are
    read again after a rejection (`theory.recurrent`).
    """

    hardware: Hardware
    batch: int = 1
    context: int = 1024
    devices: int = 1
    draft_context: int | None = None
    element: float = 2.0
    overhead: float = 0.0
    pipeline: int = 1
    link: Link | None = None
    between: Link | None = None
    draft_devices: int | None = None
    efficiency: float = 1.0
    recurrent: bool = False

    def __post_init__(self) -> None:
        if self.devices % positive_int("pipeline", self.pipeline):
            raise ValueError(f"{self.devices} devices cannot be divided into {self.pipeline} equal stages")
        if self.draft_devices is not None and positive_int("draft_devices", self.draft_devices) > self.devices:
            raise ValueError(f"the draft cannot have {self.draft_devices} of {self.devices} devices")
        if fraction("efficiency", self.efficiency) == 0:
            raise ValueError("efficiency must be positive")
        positive_int("batch", self.batch)
        positive_int("context", self.context, low=0)
        positive_int("devices", self.devices)
        if self.draft_context is not None:
            positive_int("draft_context", self.draft_context, low=0)
        number("overhead", self.overhead, 0.0)
        if number("element", self.element) <= 0:
            raise ValueError(f"bytes of a weight must be positive, got {self.element:g}")


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward: its seconds, what they are spent on, and the share of them that devices wait for each other."""

    seconds: float
    bottleneck: Bottleneck
    communication: float = 0.0


def forward(model: Model, setting: Setting, rows: float = 1, context: int | None = None) -> Forward:
    """A forward of `rows` >= 1 rows (on average) for each sequence of the batch, at `context` (default: the setting's).

    >>> from outrider.theory.hardware import HARDWARE, MODELS
    >>> from outrider.theory.links import link
    >>> f = forward(MODELS["70b"], Setting(HARDWARE["h100"], batch=1, context=0, devices=4))
    >>> round(1000 * f.seconds, 2), f.bottleneck
    (10.53, 'weights')
    >>> split = forward(MODELS["70b"], Setting(HARDWARE["h100"], batch=1, context=0, devices=4, link=link("nvlink4")))
    >>> round(1000 * split.seconds, 2), round(1000 * split.communication, 2)
    (11.51, 0.98)
    """
    return _forward(model, setting, rows, context, setting.devices, setting.pipeline)


def draft_forward(model: Model, setting: Setting) -> Forward:
    """A forward of the draft, which is not split into stages and attends to `draft_context`."""
    context = setting.context if setting.draft_context is None else min(setting.draft_context, setting.context)
    return _forward(model, setting, 1, context, setting.draft_devices or setting.devices // setting.pipeline, 1)


def _forward(model: Model, setting: Setting, rows: float, context: int | None, devices: int, stages: int) -> Forward:
    """Memory and arithmetic of all stages in turn, each on devices / stages of them, and what goes between."""
    n, cached = number("rows", rows, 1.0), setting.context if context is None else context
    weights = model.read_bytes(setting.element, setting.batch * n)
    kv = setting.batch * model.kv_bytes(setting.element) * cached
    moved = (weights + kv) / setting.hardware.bandwidth
    operations = setting.batch * n * (2 * model.active + model.attention_operations * cached)
    computed = operations / setting.hardware.compute
    tensor, waited = devices // stages, 0.0
    if setting.link is not None:
        waited = tensor_seconds(model, setting.batch * n, tensor, setting.link, setting.element)
        over = setting.between or setting.link
        waited += pipeline_seconds(model, setting.batch * n, stages, over, setting.element)
    own = max(moved, computed) / setting.efficiency / tensor
    bottleneck: Bottleneck = (
        "link" if waited > own else "compute" if computed > moved else "kv" if kv > weights else "weights"
    )
    return Forward(own + waited + setting.overhead, bottleneck, waited)


@dataclass(frozen=True, slots=True)
class AtLength:
    """Predicted speed at one draft length; length 0 is plain decoding. read_again: tokens per call that a target whose state cannot
    be cut reads again; verify_seconds contains them."""

    length: int
    tokens_per_call: float
    tokens_per_second: float
    speedup: float
    draft_seconds: float
    verify_seconds: float
    read_again: float = 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted speeds of a pair. tokens per second are of the whole batch, and of a batch for each stage. `predicted` is
    always True: never a measurement.

    best: the row with the largest speed; its length 0 says not to speculate. memory: bytes needed, at the longest length.
    devices_needed: fewest devices whose usable memory holds them. fits: whether the setting's devices do.
    """

    plain: AtLength
    rows: tuple[AtLength, ...]
    best: AtLength
    plain_bottleneck: Bottleneck
    draft_bottleneck: Bottleneck
    verify_bottleneck: Bottleneck
    memory: float
    devices_needed: int
    fits: bool
    predicted: bool = True


def predict(
    target: Model, draft: Model, setting: Setting, acceptance: float, lengths: Sequence[int] = tuple(range(17))
) -> Prediction:
    """Speed by draft length with independent acceptances of probability `acceptance`.

    lengths: draft lengths to compare; 0 is added. The bottleneck of verification is that of the best length, or of the
    shortest draft if none is worth it.

    >>> from outrider.theory.hardware import HARDWARE, MODELS
    >>> small = predict(MODELS["8b"], MODELS["1b"], Setting(HARDWARE["h100"], batch=1), 0.8)
    >>> large = predict(MODELS["8b"], MODELS["1b"], Setting(HARDWARE["h100"], batch=512, context=128), 0.8)
    >>> small.best.length > 0, small.verify_bottleneck, large.best.length, large.verify_bottleneck
    (True, 'weights', 0, 'compute')
    """
    alpha = fraction("acceptance", acceptance)
    wanted = sorted({0, *(positive_int("length", n, low=0) for n in lengths)})
    one, drafting = forward(target, setting), draft_forward(draft, setting)
    rows = []
    for n in wanted:
        again = reread([alpha] * n) if setting.recurrent and n else Reread(0.0, 0.0)
        verify = forward(target, setting, n + 1 + again.rows).seconds + again.forwards * one.seconds
        tokens = tokens_per_call(alpha, n)
        seconds = n * drafting.seconds + verify
        rows.append(
            AtLength(
                n,
                tokens,
                setting.pipeline * setting.batch * tokens / seconds,
                tokens * one.seconds / seconds,
                n * drafting.seconds,
                verify,
                again.rows,
            )
        )
    best = max(rows, key=lambda row: row.tokens_per_second)
    shown = best.length or next((n for n in wanted if n), 0)
    memory = memory_needed(target, draft, setting, wanted[-1])
    needed = max(1, math.ceil(memory / (USABLE * setting.hardware.memory)))
    return Prediction(
        plain=rows[0],
        rows=tuple(rows),
        best=best,
        plain_bottleneck=one.bottleneck,
        draft_bottleneck=drafting.bottleneck,
        verify_bottleneck=forward(target, setting, shown + 1).bottleneck,
        memory=memory,
        devices_needed=needed,
        fits=needed <= setting.devices,
    )


def memory_needed(target: Model, draft: Model, setting: Setting, length: int = 0) -> float:
    """Bytes of both models' weights and of the batch's keys and values, drafts included.

    A draft with a short window still holds that window only.
    """
    short = setting.context if setting.draft_context is None else min(setting.draft_context, setting.context)
    out = 0.0
    for model, context in ((target, setting.context), (draft, short)):
        out += model.weight_bytes(setting.element)
        out += setting.pipeline * setting.batch * model.kv_bytes(setting.element) * (context + length + 1)
    return out


def self_draft_speedup(acceptance: float, length: int, draft: float, verify: float) -> float:
    """Speed-up of a target that drafts for itself over a part of its keys and values (Chen et al., "MagicDec").

    acceptance: of every token, independently. draft: of one drafted token, and verify: of length + 1 rows, both as shares of a
    plain step. With W + B k S bytes a step, drafts over K tokens cost (W + B k K) / (W + B k S).

    >>> round(self_draft_speedup(0.9, 4, 0.25, 1.1), 2)
    1.95
    """
    positive_int("length", length)
    return tokens_per_call(fraction("acceptance", acceptance), length) / (
        length * number("draft", draft, 0.0) + number("verify", verify, 0.0)
    )


def self_draft_crossing(model: Model, setting: Setting, acceptance: float, row: float = 0.02) -> int | None:
    """The least context, in tokens, from which drafting over `draft_context` tokens of one's own cache is faster than plain
    decoding at the best length up to 16; None if it is not below 2^24. row: cost of each further row of a verification, as
    a share of a step, beside the experts that it reads.

    Bytes alone are counted: where rows are bound by arithmetic, speculation loses whatever the context. Below, the planner should
    choose a draft model, or nothing.

    >>> from dataclasses import replace
    >>> from outrider.theory.hardware import HARDWARE, MODELS
    >>> setting = Setting(HARDWARE["h100"], batch=1, draft_context=512)
    >>> one, many = (self_draft_crossing(MODELS["8b"], replace(setting, batch=b), 0.8) for b in (1, 16))
    >>> one > 10 * many
    True
    """
    view = setting.draft_context
    if view is None:
        raise ValueError("the view must have a size: set draft_context")
    weights = [model.read_bytes(setting.element, setting.batch * rows) for rows in range(1, 18)]
    token = setting.batch * model.kv_bytes(setting.element)

    def gains(context: int) -> bool:
        cached = token * context
        step = weights[0] + cached
        draft = (weights[0] + token * min(context, view)) / step
        verify = [(weights[n] + cached) / step + row * n for n in range(1, 17)]
        return any(self_draft_speedup(acceptance, n, draft, v) > 1 for n, v in enumerate(verify, 1))

    return least_number(gains, 0)
