"""From text and a target to a trained drafter in a folder: prepare data, fit, measure, export. Every stage is resumable."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from outrider.build import Engine, build_engine
from outrider.conversations import has_template, whole_text
from outrider.errors import ConfigError
from outrider.models.folder import identity_of, resolve_folder
from outrider.models.load import load_target
from outrider.protocols import Target
from outrider.train import data
from outrider.train.checkpoint import checkpoints, replace_folder
from outrider.train.corpus import read_corpus
from outrider.train.distill import Teacher, measure_of
from outrider.train.features import DataSpec, Features, cut_prompts, read_features, write_hidden, write_tokens
from outrider.train.job import Job
from outrider.train.keyed import hidden_folder, other_products, part_folder, run_folder, shorter_run
from outrider.train.loop import share_computing, slower_norms_unsaid, train
from outrider.train.metrics import loggers

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data on disk. training, held_out: the folders of their text. layers: of the hidden states."""

    training: Path
    held_out: Path
    layers: tuple[int, ...]

    @property
    def parts(self) -> tuple[Path, Path]:
        return self.training, self.held_out


def documents_of(job: Job, report: Report = print, tokenizer: Any = None) -> list[data.Document]:
    """The texts of a training, each once. Conversations are written by the chat template of `tokenizer`, if it has one."""
    render = partial(whole_text, tokenizer) if has_template(tokenizer) else None
    return read_corpus(list(job.data), pattern=job.pattern, skip_bad=job.skip_bad, render=render, report=report)


def texts_of(job: Job, report: Report = print, tokenizer: Any = None) -> dict[str, list[data.Document]]:
    """The documents of both parts: each once, whole files on one side; a single text is split."""
    documents = documents_of(job, report, tokenizer)
    training, held_out = data.split(documents)
    if len(documents) == 1:
        training, held_out = ([part] for part in data.halve(documents[0]))
    elif not training or not held_out:  # few documents: every tenth, at least one
        training, held_out = [d for i, d in enumerate(documents) if i % 10], documents[::10]
    return {"held_out": held_out, "training": training}


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the data before it is written. folder: its place. apart: beginnings that its rows may not have."""

    name: str
    folder: Path
    documents: list[data.Document]
    wanted: DataSpec
    apart: set[tuple[int, ...]]


def parts_of(job: Job, engine: Engine, report: Report = print) -> list[Part]:
    """Both parts: what is written, and where. The same on every machine that has the same target and text."""
    texts, identity = texts_of(job, report, engine.tokenizer), identity_of(resolve_folder(job.target))
    # files may begin with the same text (a licence): prompts of the training are not held out
    begun = {tuple(p) for p in cut_prompts(texts["training"], engine.encode, job.wanted("training"))}
    out = []
    for name, documents in texts.items():
        wanted, apart = job.wanted(name), begun if name == "held_out" else set[tuple[int, ...]]()
        prompts = cut_prompts(documents, engine.encode, wanted, apart)
        folder = part_folder(job.work, name, identity, documents, wanted, prompts)
        out.append(Part(name, folder, documents, wanted, apart))
    return out


def prepare(job: Job, report: Report = print) -> Prepared:
    """Text and hidden states of the training and the held-out part; missing ones are made."""
    engine = engine_of(job)
    for notice in engine.notices:
        report(notice)
    target = engine.parts.target
    layers, folders = layers_of(job, target), dict[str, Path]()
    for part in parts_of(job, engine, report):
        folders[part.name] = part.folder
        tokens = write_tokens(engine, part.documents, part.wanted, part.folder, report, part.apart)
        place, held = hidden_folder(part.folder, layers)
        place.mkdir(exist_ok=True)
        write_hidden(target, tokens, held, place, report=report)
    return Prepared(folders["training"], folders["held_out"], layers)


def layers_of(job: Job, target: Target) -> tuple[int, ...]:
    """The blocks whose hidden states are stored: those that the drafter reads, and the last one, which gives the labels."""
    return tuple(sorted({*job.method.taps(job, target), target.layers}))


def engine_of(job: Job) -> Engine:
    """The engine that writes the target's text, with the target's companion draft if there is one."""
    return build_engine(job.target, slots=job.slots, length=4, max_length=job.length + 8, device=job.device)


def run(job: Job, report: Report = print) -> dict[str, Any]:
    """Run all stages; returns the last measurements on held-out rows. Finished stages are not repeated."""
    ready, method = prepare(job, report), job.method
    target = load_target(job.target, dtype="float32", device=job.device)
    taps = method.taps(job, target)
    held = {p: hidden_folder(p, ready.layers)[0] for p in ready.parts}
    how: dict[str, Any] = {"rows": job.batch, "seed": job.loop.seed, "repeats": job.repeats, "report": report}
    training, held_out = (read_features(p, taps, hidden=held[p], device=target.device, **how) for p in ready.parts)
    model = new_model(job, target, training)
    report(f"{method.name}: {sum(p.numel() for p in model.parameters()):,} parameters, reads layers {taps}")
    judge = Teacher.of(target, training.layers, taps)
    evaluate = measure_of(Teacher.of(target, held_out.layers, taps), method.predictor(job.levels), held_out)
    batches, loss = method.fit_inputs(job, judge, model, training)
    folder = run_folder(job.work, method.name, ready.parts, job.choices(taps))
    if not checkpoints(folder) and (shorter := shorter_run(folder)) is not None:
        copied = folder / f".tmp-{shorter.name}-{os.getpid()}"
        shutil.copytree(shorter, copied)
        copied.rename(folder / shorter.name)  # whole or not there, as every checkpoint
    elif not checkpoints(folder) and (other := other_products(folder)) is not None:
        flag = "--no-autocast" if job.loop.autocast else "--autocast"
        report(f"this starts afresh; {flag} goes on with a training that multiplies otherwise, from {other.name}")
    logs = loggers(folder, job.log, job.choices(taps))
    with slower_norms_unsaid():
        state = train(model, batches, loss, job.loop, folder, evaluate, report, logs)
    export(model, job, report)
    spent = {"seconds": state["seconds"], "computing": share_computing(state)}
    return {"drafter": method.name, "steps": state["step"], **spent, **state["history"][-1]}


def new_model(job: Job, target: Target, training: Features) -> nn.Module:
    """The drafter before its first step: with the weights of `job.start`, or initialised with a few rows of the training data."""
    columns = [training.layers.index(layer) for layer in job.method.taps(job, target)]
    _, hidden = training.take(list(range(min(8, len(training.tokens)))))
    model = job.method.new_model(job, target, hidden[:, :, columns].flatten(0, 1))
    if job.start is not None:
        started: Any = job.method.load(resolve_folder(job.start), target)
        if started.config != model.config:
            raise ConfigError(
                f"{job.start} has other sizes than this training ({_differs(started.config, model.config)}): give the same"
            )
        model.load_state_dict(started.state_dict())
    return model.to(target.device)


def _differs(theirs: Any, ours: Any) -> str:
    """The first field in which two configurations of drafters differ."""
    names = (f.name for f in fields(theirs) if getattr(theirs, f.name) != getattr(ours, f.name))
    name = next(names, "its kind")
    return f"{name}: {getattr(theirs, name, theirs)} and {getattr(ours, name, ours)}"


def export(model: nn.Module, job: Job, report: Report = print) -> None:
    """Replace `job.out` with the drafter, atomically."""
    job.out.parent.mkdir(parents=True, exist_ok=True)
    built = job.out.with_name(f".tmp-{job.out.name}-{os.getpid()}")
    shutil.rmtree(built, ignore_errors=True)
    job.method.save(model, job, built)
    for card in job.out.glob("*.md"):  # a model card belongs to the place
        shutil.copy(card, built)
    replace_folder(built, job.out)
    report(f"written: {job.out}")
