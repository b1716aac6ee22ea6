"""Estimates the disk, memory and time of a training from a few rows of each stage, timed on this machine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from outrider.build import Engine
from outrider.models.load import inspect_checkpoint, load_target
from outrider.params import SamplingParams
from outrider.train.distill import Teacher
from outrider.train.features import Features, hidden_of
from outrider.train.job import Job
from outrider.train.loop import slower_norms_unsaid
from outrider.train.pipeline import documents_of, engine_of, layers_of, new_model


def estimate(job: Job) -> dict[str, Any]:
    """The needs of `pipeline.run`: disk and memory in bytes, time in seconds."""
    engine = engine_of(job)
    documents = documents_of(job, lambda _: None, engine.tokenizer)
    target = engine.parts.target
    layers = layers_of(job, target)
    rows = job.rows + job.held_out
    probe = np.full((min(4, job.slots), job.length), 1, dtype=np.int64)
    started = time.perf_counter()
    hidden = hidden_of(target, torch.from_numpy(probe), layers)
    capture = (time.perf_counter() - started) / len(hidden) * rows
    write = _seconds_of_text(job, engine, documents[0].text) * (job.length - job.prompt) * rows
    step, parameters, vocab_size = _seconds_of_step(
        job, Features(probe, hidden.half().cpu().numpy(), layers, device=target.device)
    )
    activations = job.batch * job.method.predictions(job) * vocab_size * 4 * 8
    parts = [job.wanted(p).bytes(len(layers), target.hidden_size, target.vocab_size) for p in ("training", "held_out")]
    seconds = {"text": write, "hidden states": capture, "training": step * job.loop.steps}
    weights = inspect_checkpoint(job.target).parameters
    return {
        "documents": len(documents),
        "rows": rows,
        "parameters": parameters,
        "disk_bytes": sum(parts) + 2 * 12 * parameters,
        "memory_bytes": 16 * parameters + activations,
        "seconds": seconds,
        "hours": sum(seconds.values()) / 3600,
        "pays": pays(parameters, weights, job.method.passes(job), job.levels),
    }


def pays(drafter: int, target: int, passes: int, levels: int) -> str:
    """What a drafter of so many parameters can gain at most, as a sentence: every forward costs what its weights cost to read.

    All its drafts accepted, a step makes levels + 1 tokens in the time of one pass of the target and `passes` of the drafter;
    at 70% of the tokens accepted (each if those before it were), (1 - 0.7^(levels + 1)) / 0.3.

    >>> pays(10**8, 8 * 10**9, 4, 4)
    'at best 4.76 times as fast, 2.64 times where 70% of the drafted tokens are accepted'
    >>> pays(10**9, 10**9, 4, 4)
    'cannot pay: its 4 passes for a draft of 4 cost 4.0 passes of this target, so at best 1.00 times as fast; make it smaller'
    """
    cost = passes * drafter / max(1, target)
    best, usual = (n / (1 + cost) for n in (levels + 1, (1 - 0.7 ** (levels + 1)) / 0.3))
    if best <= 1:
        return (
            f"cannot pay: its {passes} passes for a draft of {levels} cost {cost:.1f} passes of this target, so at best "
            f"{best:.2f} times "
            "as fast; make it smaller"
        )
    doubt = "" if usual > 1 else ", which does not pay: make it smaller"
    return f"at best {best:.2f} times as fast, {usual:.2f} times where 70% of the drafted tokens are accepted{doubt}"


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
    exact = load_target(job.target, dtype="float32", device=job.device)
    model, judge = new_model(job, exact, held), Teacher.of(exact, held.layers, job.method.taps(job, exact))
    batches, loss = job.method.fit_inputs(job, judge, model, replace(held, rows=1))
    started = time.perf_counter()
    rounded = torch.autocast(exact.device.type, dtype=torch.bfloat16, enabled=job.loop.autocast)
    with slower_norms_unsaid(), rounded:
        value = loss(model, batches(0), 0.0)
    value.backward()
    seconds = (time.perf_counter() - started) * job.batch
    return seconds, sum(p.numel() for p in model.parameters()), exact.vocab_size
