"""A plan on paper for models larger than one device: layouts x lengths by data sheets, with every assumption said.

A layout divides the GPUs into copies of the target, each of `pipeline` stages of `tensor` GPUs. The roofline and its communication
are those of `theory.roofline` and `theory.links`; nothing is measured, and nothing here is the speed of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.errors import ConfigError
from outrider.theory.hardware import Hardware, Model
from outrider.theory.links import Link, handover_seconds, link, usual
from outrider.theory.roofline import Prediction, Setting, forward, predict

BOX = 8
"""GPUs of a machine, which `link` joins; `between` joins machines."""


@dataclass(frozen=True, slots=True)
class Paper:
    """What is planned. context: tokens in the cache of a sequence, and of its prompt. output: tokens of an answer.

    disaggregated: prompts are read on as many other GPUs, and their keys and values are sent over `between`.
    recurrent: the target's state cannot be cut, so that accepted tokens are read again after a rejection (`theory.recurrent`).
    """

    target: Model
    draft: Model
    hardware: Hardware
    gpus: int
    link: Link
    between: Link
    acceptance: float
    context: int
    output: int
    efficiency: float
    disaggregated: bool = False
    recurrent: bool = False


@dataclass(frozen=True, slots=True)
class PaperEntry:
    """One layout at one number of sequences. tokens_per_second: of all copies, while nothing but decoding is done; served: with the
    reading of prompts, per GPU of all that are used. speedup: over plain decoding of this layout.
    """

    sequences: int
    copies: int
    tensor: int
    pipeline: int
    draft_devices: int
    length: int
    tokens_per_second: float
    per_sequence: float
    plain: float
    speedup: float
    communication: float
    bottleneck: str
    first_token: float
    served_per_gpu: float
    memory_per_gpu: float

    @property
    def name(self) -> str:
        stages = f" x {self.pipeline} stages" if self.pipeline > 1 else ""
        copies = f"{self.copies} copies of " if self.copies > 1 else ""
        return f"{copies}tensor {self.tensor}{stages}"


def usual_link(machine: str, name: str | None) -> Link:
    """The link of a name, or the usual one of a machine. Raises ConfigError where there is none, ValueError for an unknown name."""
    found = usual(machine) if name is None else link(name)
    if found is None:
        raise ConfigError(f"no usual link between devices of {machine!r} is known: add --link")
    return found


def layouts(gpus: int) -> Iterator[tuple[int, int, int]]:
    """Every (copies, tensor, pipeline) whose product is `gpus`."""
    for tensor in (t for t in range(1, gpus + 1) if gpus % t == 0):
        rest = gpus // tensor
        for pipeline in (p for p in range(1, rest + 1) if rest % p == 0):
            yield rest // pipeline, tensor, pipeline


def plan_on_paper(paper: Paper, sequences: Sequence[int], lengths: Sequence[int]) -> dict[int, list[PaperEntry]]:
    """Number of sequences -> the layouts that hold the models and have work for every stage, the fastest first.

    Raises ConfigError if no layout holds them.
    """
    out: dict[int, list[PaperEntry]] = {}
    for total in sequences:
        found = [e for shape in layouts(paper.gpus) if (e := _entry(paper, total, lengths, *shape)) is not None]
        if not found:
            need = (paper.target.weight_bytes() + paper.draft.weight_bytes()) / 1e9
            raise ConfigError(
                f"{paper.gpus} x {paper.hardware.name} cannot hold {need:.0f} GB of weights and the cache of {total} sequences of "
                f"{paper.context} tokens in any layout: raise --gpus, or lower --batches or --context"
            )
        out[total] = sorted(found, key=lambda e: -e.tokens_per_second)
    return out


def _entry(
    paper: Paper, total: int, lengths: Sequence[int], copies: int, tensor: int, pipeline: int
) -> PaperEntry | None:
    """The best length of a layout; None if it does not fit or leaves a copy or a stage without a sequence."""
    if total < copies * pipeline:
        return None
    batch = -(-total // (copies * pipeline))
    found: tuple[Setting, Prediction] | None = None
    for devices in sorted({1, tensor}):
        setting = _setting(paper, batch, tensor, pipeline, devices)
        made = predict(paper.target, paper.draft, setting, paper.acceptance, lengths)
        if made.fits and (found is None or made.best.tokens_per_second > found[1].best.tokens_per_second):
            found = setting, made
    if found is None:
        return None
    setting, made = found
    best, verifying = made.best, forward(paper.target, setting, made.best.length + 1)
    speed = copies * best.tokens_per_second
    prompt = forward(paper.target, _setting(paper, 1, tensor, pipeline, 1), max(1, paper.context), paper.context // 2)
    first, served, used = prompt.seconds, speed, paper.gpus
    if paper.disaggregated:
        first += handover_seconds(paper.target, paper.context, paper.between, devices=tensor * pipeline)
        used *= 2
    else:  # prompts and decoding take turns on the same GPUs
        served = 1.0 / (1.0 / speed + prompt.seconds / (copies * pipeline * paper.output))
    return PaperEntry(
        total, copies, tensor, pipeline, setting.draft_devices or tensor, best.length, speed, speed / total,
        copies * made.plain.tokens_per_second, best.speedup, verifying.communication / verifying.seconds,
        made.verify_bottleneck, first, served / used, made.memory / (tensor * pipeline),
    )  # fmt: skip


def _setting(paper: Paper, batch: int, tensor: int, pipeline: int, draft: int) -> Setting:
    within = paper.link if tensor <= BOX else paper.between
    across = paper.link if tensor * pipeline <= BOX else paper.between
    return Setting(
        paper.hardware, batch, paper.context, tensor * pipeline, pipeline=pipeline, link=within, between=across,
        draft_devices=draft, efficiency=paper.efficiency, recurrent=paper.recurrent,
    )  # fmt: skip


def _parts(m: Model) -> str:
    """Dense, or its experts."""
    e = m.mixture
    return "dense" if e is None else f"{e.used} of {e.count} experts a row, all equally likely and chosen independently"


def assumptions(paper: Paper) -> list[str]:
    """Everything that the numbers rest on, a sentence each."""
    h, out = paper.hardware, []
    kind = "measured" if h.measured else "peak"
    out.append(
        f"{h.name}: {h.bandwidth / 1e12:g} TB/s, {h.compute / 1e12:g} TFLOP/s, {h.memory / 1e9:.0f} GB ({kind}, {h.source}); "
        f"software reaches {paper.efficiency:.0%} of the rates"
    )
    for place, one in (("within a machine of 8", paper.link), ("between machines", paper.between)):
        out.append(
            f"{place}: {one.name}, {one.bandwidth / 1e9:g} GB/s one way ({one.source}); "
            f"{1e6 * one.latency:g} us a message (assumed)"
        )
    for role, m in (("target", paper.target), ("draft", paper.draft)):
        out.append(
            f"{role}: {m.source}, {m.parameters / 1e9:.3g}e9 parameters in bfloat16, {m.layers} layers, {_parts(m)}"
        )
    out.append(
        f"a judged draft token is accepted with probability {paper.acceptance:g}, independently; a chain, verified in one forward"
    )
    if paper.recurrent:
        out.append(
            "the target's state cannot be cut: what was accepted before a rejection is read again with the next draft"
        )
    out.append(
        "tensor parallel: two all-reduces a layer, none hidden behind arithmetic; the draft on 1 GPU or on all of them"
    )
    out.append("pipeline: as many batches in flight as stages, all stages busy; a sequence waits for all of them")
    out.append(
        f"prompts of {paper.context} and answers of {paper.output} tokens; "
        + (
            "prompts are read on as many other GPUs, keys and values sent once"
            if paper.disaggregated
            else "prompts and decoding take turns on the same GPUs"
        )
    )
    return out


def paper_document(
    paper: Paper, sequences: Sequence[int], lengths: Sequence[int], price: float | None
) -> dict[str, Any]:
    """The plan with its assumptions. price: of a GPU per hour."""
    from dataclasses import asdict

    found = plan_on_paper(paper, sequences, lengths)
    rows = []
    for entries in found.values():
        for e in entries:
            cost = None if price is None else price / 3600 / e.served_per_gpu * 1e6
            rows.append({"name": e.name, **asdict(e), "cost_per_million_tokens": cost})
    return {"predicted": True, "gpus": paper.gpus, "choices": rows, "assumptions": assumptions(paper)}
