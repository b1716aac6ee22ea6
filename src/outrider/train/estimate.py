"""Estimates the disk, memory and time of a training from a few rows of each stage, timed on this machine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from outrider.build import Engine
from outrider.models.load import load_target
from outrider.params import SamplingParams
from outrider.train.corpus import read_corpus
from outrider.train.distill import Teacher
from outrider.train.features import Features, hidden_of
from outrider.train.job import Job
from outrider.train.pipeline import engine_of, layers_of, new_model


def estimate(job: Job) -> dict[str, Any]:
    """The needs of `pipeline.run`: disk and memory in bytes, time in seconds."""
    documents = read_corpus(list(job.data), pattern=job.pattern, skip_bad=job.skip_bad, report=lambda _: None)
    engine = engine_of(job)
    target = engine.parts.target
    layers = layers_of(job, target)
    rows = job.rows + job.held_out
    probe = np.full((min(4, job.slots), job.length), 1, dtype=np.int64)
    started = time.perf_counter()
    hidden = hidden_of(target, torch.from_numpy(probe), layers)
    capture = (time.perf_counter() - started) / len(hidden) * rows
    write = _seconds_of_text(job, engine, documents[0].text) * (job.length - job.prompt) * rows
    step, parameters, vocab_size = _seconds_of_step(job, Features(probe, hidden.half().cpu().numpy(), layers))
    activations = job.batch * job.method.predictions(job) * vocab_size * 4 * 8
    parts = [job.wanted(p).bytes(len(layers), target.hidden_size, target.vocab_size) for p in ("training", "held_out")]
    return {
        "documents": len(documents),
        "rows": rows,
        "parameters": parameters,
        "disk_bytes": sum(parts) + 2 * 12 * parameters,
        "memory_bytes": 16 * parameters + activations,
        "seconds": {"text": write, "hidden states": capture, "training": step * job.loop.steps},
    }


def _seconds_of_text(job: Job, engine: Engine, text: str) -> float:
    """Seconds per token that the target writes, with all slots busy."""
    tokens = min(32, job.length - job.prompt)
    if not tokens:
        return 0.0
    prompts = [engine.encode(text[:2000])[: job.prompt] or [1]] * job.slots
    started = time.perf_counter()
    temperature = job.wanted("training").temperatures[0]
    engine.generate(prompts, SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, seed=0))
    return (time.perf_counter() - started) / (job.slots * tokens)


def _seconds_of_step(job: Job, held: Features) -> tuple[float, int, int]:
    """Seconds of a step, parameters of the drafter, and tokens of the vocabulary."""
    exact = load_target(job.target, dtype="float32")
    model, judge = new_model(job, exact, held), Teacher.of(exact, held.layers, job.method.taps(job, exact))
    batches, loss = job.method.fit_inputs(job, judge, model, replace(held, rows=1))
    started = time.perf_counter()
    loss(model, batches(0), 0.0).backward()
    seconds = (time.perf_counter() - started) * job.batch
    return seconds, sum(p.numel() for p in model.parameters()), exact.vocab_size
