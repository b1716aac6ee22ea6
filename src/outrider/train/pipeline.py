"""From text and a target to a trained drafter in a folder: prepare data, fit, measure, export. Every stage is resumable."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from outrider.drafters.feature import FeatureConfig, FeatureModel
from outrider.drafters.heads import HeadsConfig, MedusaHeads
from outrider.engine.build import build_engine
from outrider.engine.engine import Engine
from outrider.errors import ConfigError, unknown_name
from outrider.protocols import Target
from outrider.target.checkpoint import Checkpoint
from outrider.target.config import Unsupported
from outrider.target.folder import resolve_folder
from outrider.target.load import load_target
from outrider.train import data
from outrider.train.checkpoint import replace_folder
from outrider.train.corpus import read_corpus
from outrider.train.drafter import Judge, loss_of, measure_of, new_features, new_heads, predictor
from outrider.train.features import Features, Wanted, hidden_of, read_features, write_hidden, write_tokens
from outrider.train.loop import LoopConfig, train

KINDS = ("medusa", "eagle")
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One training run.

    target: folder or Hub name. data: files and folders of text. work: what can be resumed; out: the finished drafter.
    rows, held_out: rows of training and held-out data. levels: heads, or levels of the training-time test. width: of a
    feature drafter, 0 for the target's. taps: blocks a feature drafter reads, () for EAGLE-3's choice.
    """

    kind: str
    target: Path | str
    data: tuple[Path, ...]
    work: Path
    out: Path
    loop: LoopConfig
    pattern: str = "*"
    skip_bad: bool = False
    rows: int = 800
    held_out: int = 64
    prompt: int = 64
    length: int = 256
    temperature: float = 1.0
    batch: int = 8
    levels: int = 4
    blocks: int = 1
    width: int = 0
    taps: tuple[int, ...] = ()
    slots: int = 16

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(unknown_name("drafter to train", self.kind, KINDS))
        if self.levels < 1 or self.length <= self.levels + 1:
            raise ConfigError(f"levels must be >= 1 and well below the rows' length, got {self.levels}, {self.length}")

    def wanted(self, part: str) -> Wanted:
        """The data of a part, "training" or "held_out"."""
        rows = self.rows if part == "training" else self.held_out
        return Wanted(rows, self.prompt, self.length, self.temperature, self.loop.seed)


def taps_of(job: Job, target: Target) -> tuple[int, ...]:
    """Blocks whose outputs the drafter reads; for features by default those of EAGLE-3: 2, L / 2, L - 3."""
    if job.kind == "medusa":
        return (target.layers,)
    middle = {2, target.layers // 2, target.layers - 3}
    taps = job.taps or tuple(sorted(t for t in middle if 0 < t <= target.layers))
    if any(not 0 <= t <= target.layers for t in taps):
        raise ConfigError(f"taps {taps} are not blocks of a target with {target.layers}")
    return taps


def prepare(job: Job, report: Report = print) -> None:
    """Text and hidden states of the training and the held-out part, continued where they are not there yet."""
    documents = read_corpus(list(job.data), pattern=job.pattern, skip_bad=job.skip_bad, report=report)
    training, held_out = data.split(documents)
    if not training or not held_out:  # few documents: every tenth, at least one
        training, held_out = [d for i, d in enumerate(documents) if i % 10], documents[::10]
    engine = engine_of(job)
    target = engine.parts.target
    layers = tuple(sorted({*taps_of(job, target), target.layers}))
    for part, texts in (("held_out", held_out), ("training", training or held_out)):
        folder = job.work / "data" / part
        tokens = write_tokens(engine, texts, job.wanted(part), folder, report)
        held = folder / "hidden.json"
        if not (held.exists() and set(layers) <= set(json.loads(held.read_text())["layers"])):
            write_hidden(target, tokens, layers, folder, report=report)
        else:
            write_hidden(target, tokens, tuple(json.loads(held.read_text())["layers"]), folder, report=report)


def engine_of(job: Job) -> Engine:
    """What writes the target's own text: with the target's companion draft, where there is one."""
    return build_engine(job.target, slots=job.slots, length=4, max_length=job.length + 8)


def run(job: Job, report: Report = print) -> dict[str, Any]:
    """Everything; the last measures on held-out rows. Finished stages are not done again."""
    prepare(job, report)
    target = load_target(job.target, dtype="float32")
    taps = taps_of(job, target)
    parts = {
        p: read_features(job.work / "data" / p, taps, rows=job.batch, seed=job.loop.seed, report=report)
        for p in ("training", "held_out")
    }
    model = new_model(job, target, parts["training"])
    report(f"{job.kind}: {sum(p.numel() for p in model.parameters()):,} parameters, reads layers {taps}")
    judge = Judge.of(target, parts["training"].layers, taps)
    predict = predictor(model, job.levels)
    evaluate = measure_of(judge, predict, parts["held_out"])
    state = train(model, parts["training"], loss_of(judge, predict), job.loop, job.work / job.kind, evaluate, report)
    export(model, job, report)
    return {"drafter": job.kind, "steps": state["step"], "seconds": state["seconds"], **state["history"][-1]}


def new_model(job: Job, target: Target, training: Features) -> nn.Module:
    """The drafter before its first step."""
    taps = taps_of(job, target)
    if job.kind == "medusa":
        config = HeadsConfig(target.hidden_size, target.vocab_size, job.levels, target.layers, job.blocks)
        return new_heads(config, target, final_norm(job.target), job.loop.seed)
    width = job.width or target.hidden_size
    if width % 32:
        raise ConfigError(f"the width of a feature drafter must be a multiple of 32 (its heads), got {width}")
    inner = -(-8 * width // 3 // 32) * 32
    config = FeatureConfig(width, target.hidden_size, taps, target.vocab_size, width // 32, width // 32, 32, inner)
    _, hidden = training.take(list(range(min(8, len(training.tokens)))))
    columns = [training.layers.index(t) for t in taps]
    return new_features(config, target, hidden[:, :, columns].flatten(0, 1), job.loop.seed)


def final_norm(target: Path | str) -> Tensor | None:
    """Weights of the target's final norm, where our own reader knows where they are."""
    try:
        return Checkpoint(resolve_folder(target)).read(torch.float32, torch.device("cpu")).norm
    except Unsupported:
        return None


def export(model: nn.Module, job: Job, report: Report = print) -> None:
    """Put the drafter in the place of `job.out`, atomically."""
    job.out.parent.mkdir(parents=True, exist_ok=True)
    built = job.out.with_name(f".tmp-{job.out.name}-{os.getpid()}")
    shutil.rmtree(built, ignore_errors=True)
    assert isinstance(model, MedusaHeads | FeatureModel)
    model.save(built)
    for card in job.out.glob("*.md"):  # a model card belongs to the place
        shutil.copy(card, built)
    replace_folder(built, job.out)
    report(f"written: {job.out}")


def estimate(job: Job) -> dict[str, Any]:
    """What `run` would need: disk and memory in bytes, time in seconds, from a few rows of each stage on this machine."""
    documents = read_corpus(list(job.data), pattern=job.pattern, skip_bad=job.skip_bad, report=lambda _: None)
    engine = engine_of(job)
    target = engine.parts.target
    layers = tuple(sorted({*taps_of(job, target), target.layers}))
    rows = job.rows + job.held_out
    probe = np.full((job.slots, job.length), 1, dtype=np.int64)
    started = time.perf_counter()
    probe_hidden = hidden_of(target, torch.from_numpy(probe[: min(4, job.slots)]), layers)
    capture = (time.perf_counter() - started) / len(probe_hidden) * rows
    from outrider.sampling.params import SamplingParams

    tokens = min(32, job.length - job.prompt)
    write = 0.0
    if tokens:
        prompts = [engine.encode(documents[0].text[:2000])[: job.prompt] or [1]] * job.slots
        started = time.perf_counter()
        engine.generate(
            prompts, SamplingParams(temperature=job.temperature, max_tokens=tokens, ignore_eos=True, seed=0)
        )
        write = (time.perf_counter() - started) / (job.slots * tokens) * (job.length - job.prompt) * rows
    held = Features(probe.astype(np.uint16)[:4], probe_hidden.half().cpu().numpy(), layers)
    exact = load_target(job.target, dtype="float32")
    model = new_model(job, exact, held)
    judge = Judge.of(exact, layers, taps_of(job, exact))
    started = time.perf_counter()
    loss_of(judge, predictor(model, job.levels))(model, held.take([0]), 0.0).backward()
    step = (time.perf_counter() - started) * job.batch
    parameters = sum(p.numel() for p in model.parameters())
    activations = job.batch * job.length * job.levels * exact.vocab_size * 4 * 8
    return {
        "documents": len(documents),
        "rows": rows,
        "parameters": parameters,
        "disk_bytes": sum(job.wanted(p).bytes(len(layers), target.hidden_size) for p in ("training", "held_out"))
        + 2 * 12 * parameters,
        "memory_bytes": 16 * parameters + activations,
        "seconds": {"text": write, "hidden states": capture, "training": step * job.loop.steps},
    }
