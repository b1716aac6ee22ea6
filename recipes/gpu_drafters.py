"""Train the shipped pair's learned drafters longer, on a GPU: one command that fits into the minutes it is given.

    python recipes/gpu_drafters.py --minutes 9 --out runs/gpu-drafters
    python recipes/gpu_drafters.py --minutes 3 --rows 16 --length 96 --batch 4 --device cpu --out runs/try      # a rehearsal

The target writes text (prompts from Python's own library, files of the held-out part apart; every other row at temperature 0, the
others at 1), thousands of rows at a time and in several processes, since a model of this size leaves a GPU idle between its
operators; then all drafters of DRAFTERS are trained beside each other, each from the shipped weights where its sizes are theirs.
Written to `--out`: a folder for each drafter, and report.json with the expected tokens of a step on held-out text at both
temperatures, before and after. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drafters import Config

from outrider.models.load import load_target, load_tokenizer
from outrider.train.distill import Teacher, measure_of
from outrider.train.features import DataSpec, Features, cut_prompts, hidden_of
from outrider.train.job import Job
from outrider.train.loop import LoopConfig, train
from outrider.train.measure import sample
from outrider.train.pipeline import layers_of, new_model, texts_of

WRITERS = 4
BATCH = 2048
"""Rows that one process writes at a time."""
HELD_OUT = 256
MEASURED = 128
"""Rows of each temperature that drafters are measured on, before and after."""
TEMPERATURES = (0.0, 1.0)
ENDING = 25.0
"""Seconds that the last measurement and the files are given."""
CAPTURED = 128
"""Rows of one pass for hidden states."""


@dataclass(frozen=True)
class Drafter:
    """One training: the name of its folder, its kind, its highest learning rate, and what differs from the
    shipped one's training. fresh: whether it begins with new weights, as other sizes must."""

    name: str
    kind: str
    lr: float
    options: dict[str, Any]
    fresh: bool = False


DRAFTERS = (
    Drafter("eagle", "eagle", 1.5e-3, {"levels": 5}),
    Drafter("eagle-wide", "eagle", 2e-3, {"levels": 5, "width": 224}, fresh=True),
    Drafter("medusa", "medusa", 1.5e-3, {}),
    Drafter("dflash", "dflash", 1.5e-3, {}),
    Drafter("dflash-two", "dflash", 2e-3, {"blocks": 2}, fresh=True),
)


def main() -> None:
    """Text, trainings, report."""
    options = read_options()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    with stage("prompts", started):
        write_prompts(options)
    with stage("text", started):
        run_all([(write_text, (options, part)) for part in range(WRITERS)])
    left = options.minutes * 60 - (time.monotonic() - started)
    chosen = [d for d in DRAFTERS if not options.only or d.name in options.only]
    with stage("trainings", started):
        run_all([(train_one, (options, drafter, time.time() + left)) for drafter in chosen])
    report = {d.name: json.loads((options.out / d.name / "measured.json").read_text()) for d in chosen}
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole command")
    parser.add_argument("--rows", type=int, default=24576, help="rows of training text")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", help="names of DRAFTERS")
    parser.add_argument("--autocast", action="store_true", help="multiply in bfloat16")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-drafters"))
    return parser.parse_args()


@contextmanager
def stage(name: str, started: float) -> Iterator[None]:
    """Say when a stage ends."""
    yield
    print(f"{name}: done after {time.monotonic() - started:.0f} s", flush=True)


def run_all(calls: list[tuple[Callable[..., None], tuple]]) -> None:
    """Every call in a process of its own; a failure of one ends the command when all are through."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=call, args=args) for call, args in calls]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a process failed: its error is above")


# --- text ------------------------------------------------------------------------------------------------------------


def write_prompts(options: argparse.Namespace) -> None:
    """Beginnings of all rows, those of the held-out part from files that the training does not see."""
    config = Config()
    job, tokenizer = config.job("eagle"), load_tokenizer(str(config.assets / "target"))
    texts = texts_of(job)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    spec = DataSpec(options.rows, config.prompt, options.length)
    training = cut_prompts(texts["training"], encode, spec)
    begun = {tuple(row) for row in training}
    held_out = cut_prompts(texts["held_out"], encode, replace(spec, rows=min(HELD_OUT, options.rows)), begun)
    np.save(options.out / "prompts.npy", np.asarray(held_out + training, dtype=np.uint16), allow_pickle=False)


def write_text(options: argparse.Namespace, part: int) -> None:
    """Every WRITERS-th row, continued by the target: row i at temperature TEMPERATURES[i // WRITERS % 2]."""
    from transformers import AutoModelForCausalLM

    config = Config()
    kind = torch.bfloat16 if options.device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(config.assets / "target", dtype=kind).to(options.device).eval()
    prompts = np.load(options.out / "prompts.npy", allow_pickle=False)[part::WRITERS]
    tokens = np.empty((len(prompts), options.length), dtype=np.uint16)
    for which, temperature in enumerate(TEMPERATURES):
        mine = np.arange(which, len(prompts), 2)
        for first in range(0, len(mine), BATCH):
            rows, began = mine[first : first + BATCH], time.monotonic()
            given = torch.from_numpy(prompts[rows].astype(np.int64)).to(options.device)
            more = options.length - config.prompt
            with torch.inference_mode():
                text = sample(model, given, more, temperature, seed=1000 * part + 2 * first + which)
            tokens[rows] = text.cpu().numpy()
            speed = len(rows) * more / (time.monotonic() - began)
            print(f"writer {part}: {len(rows)} rows at temperature {temperature:g}, {speed:,.0f} tokens/s", flush=True)
    np.save(options.out / f"text-{part}.npy", tokens, allow_pickle=False)


def read_text(out: Path) -> np.ndarray:
    """All rows in the order of their prompts."""
    parts = [np.load(out / f"text-{part}.npy", allow_pickle=False) for part in range(WRITERS)]
    tokens = np.empty((sum(map(len, parts)), parts[0].shape[1]), dtype=parts[0].dtype)
    for part, rows in enumerate(parts):
        tokens[part::WRITERS] = rows
    return tokens


# --- training --------------------------------------------------------------------------------------------------------


def train_one(options: argparse.Namespace, drafter: Drafter, until: float) -> None:
    """One drafter, until the clock says so, into its folder; with what it earned before and after."""
    torch.set_float32_matmul_precision("high")
    job = job_of(options, drafter)
    target = load_target(job.target, dtype="float32", device=options.device)
    held = layers_of(job, target)
    tokens = read_text(options.out)
    hidden = capture(target, tokens, held, job.method.name)
    apart = min(HELD_OUT, len(tokens) // 2)
    features = Features(tokens[apart:], hidden[apart:], held, job.batch, job.loop.seed, target.device)
    at = np.arange(apart) // WRITERS % 2
    held_out = [
        Features(tokens[:apart][at == t], hidden[:apart][torch.from_numpy(at == t)], held, device=target.device)
        for t in range(2)
    ]
    model, taps = new_model(job, target, features), job.method.taps(job, target)
    judge = Teacher.of(target, held, taps)
    batches, loss = job.method.fit_inputs(job, judge, model, features)
    measures = [measure_of(judge, job.method.predictor(job.levels), h, rows=MEASURED) for h in held_out]
    measure = lambda _: {  # noqa: E731
        f"{k} T={t:g}": v for t, m in zip(TEMPERATURES, measures, strict=True) for k, v in m(model).items()
    }
    with torch.no_grad():
        before = {} if drafter.fresh else measure(model)
    steps = steps_until(model, batches, loss, until - ENDING)
    say = lambda line: print(f"{drafter.name}: {line}", flush=True)  # noqa: E731
    loop = replace(job.loop, steps=steps)
    state = train(model, batches, loss, loop, options.out / "checkpoints" / drafter.name, measure, say)
    job.method.save(model, job, options.out / drafter.name)
    about = {
        "steps": state["step"],
        "tokens": state["tokens"],
        "seconds": state["seconds"],
        "rows": len(features.tokens),
    }
    document = {"before": before, "after": state["history"][-1], **about}
    (options.out / drafter.name / "measured.json").write_text(json.dumps(document, indent=1) + "\n")


def job_of(options: argparse.Namespace, drafter: Drafter) -> Job:
    """The shipped drafter's training with other data, more of it, and from its weights."""
    config = Config()
    loop = LoopConfig(
        steps=1,
        lr=drafter.lr,
        warmup=100,
        final_lr_ratio=0.02,
        save_every_s=150.0,
        log_every=200,
        autocast=options.autocast,
    )
    shipped = replace(
        config.job(drafter.kind),
        loop=loop,
        batch=options.batch,
        device=options.device,
        repeats=1.0,
        length=options.length,
    )
    start = None if drafter.fresh else config.assets / drafter.kind
    return replace(shipped, start=start, **drafter.options)


def capture(target: Any, tokens: np.ndarray, layers: tuple[int, ...], name: str) -> torch.Tensor:
    """Hidden states [M, L, T, H] float16 of all rows, on the target's device."""
    began = time.monotonic()
    shape = (*tokens.shape, len(layers), target.hidden_size)
    hidden = torch.empty(shape, dtype=torch.float16, device=target.device)
    for first in range(0, len(tokens), CAPTURED):
        part = torch.from_numpy(tokens[first : first + CAPTURED].astype(np.int64))
        hidden[first : first + CAPTURED] = hidden_of(target, part, layers).half()
    print(f"{name}: hidden states of {len(tokens)} rows in {time.monotonic() - began:.0f} s", flush=True)
    return hidden


def steps_until(model: Any, batches: Any, loss: Any, until: float, probes: int = 12) -> int:
    """Steps that fit before `until` (of `time.time`), from the time of a few that change no weight."""
    times = []
    for step in range(probes):
        began = time.monotonic()
        loss(model, batches(step), 0.9).backward()
        model.zero_grad(set_to_none=True)
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    each = 1.1 * sorted(times)[len(times) // 2]
    print(f"{each * 1e3:.1f} ms a step", flush=True)
    return max(20, int((until - time.time()) / each))


if __name__ == "__main__":
    main()
