"""Does training for left-to-right verification lengthen accepted drafts? The experiment, from nothing to the table.

    python recipes/left_to_right.py all                 # data, tuning, every run, the page docs/left_to_right.md
    python recipes/left_to_right.py all --quick         # the same in small, for a look at the machinery; writes no docs
    python recipes/left_to_right.py runs --blocks 8     # one stage
    python recipes/left_to_right.py longer              # two arms with four times the steps; then `report`

A block drafter proposes several tokens at once, and the target keeps the leading run of correct ones. Objectives that know this
weigh early slots more (Whalen et al. 2026, arXiv 2606.11552; D-PACE, arXiv 2605.18810). Here five of them are compared on one
target: same initial weights, same rows, same blocks, same steps; only the weights of the slots differ. Two more arms are
trained on text as it was written instead of on text the target wrote, and some are trained four times as long.

Every run has a folder of its own and is skipped when its result is there; a run that was killed continues. Acceptance is
measured by walking over finished text (`outrider.train.walk`): the text is the target's in every arm, so arms are paired
prompt by prompt, and no arm pays for the target's forwards. The stage `check` lets the engine decode with some of the drafters.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import left_to_right_longer as longer
import left_to_right_report as report
import numpy as np
from left_to_right_measure import check, ends, measure, measured_rows, tau
from left_to_right_setting import (
    ARMS,
    PARTS,
    QUICK,
    TUNED,
    Config,
    add_seconds,
    best_rate,
    features,
    folder_of,
    planned,
    planned_longer,
    stored,
    unfinished,
    wanted,
)

from outrider.build import build_engine
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.files import write_whole
from outrider.models.load import load_target
from outrider.protocols import Target
from outrider.train import data
from outrider.train.distill import Teacher
from outrider.train.features import write_hidden, write_tokens
from outrider.train.job import Job
from outrider.train.loop import train
from outrider.train.pipeline import new_model

STAGES = ("data", "tune", "runs", "check", "report")
"""Of `all`; `longer` is a stage beside them, whose results the next report shows."""

# --- 1. data ---------------------------------------------------------------------------------------------------------


def stage_data(config: Config) -> None:
    """Text and hidden states of every part. Whole files are held out: validation and measured prompts come from those."""
    began = time.process_time()
    training, held_out = data.split(data.deduplicate(data.find_documents(config.source, config.pattern)), one_in=20)
    engine = build_engine(config.path, slots=16, length=4, max_length=config.length + 8)
    target = engine.parts.target
    layers = stored(config, target)
    for part in PARTS:
        folder = config.work / "data" / part
        documents = {"validation": held_out[::2], "greedy": held_out[1::2], "sampled": held_out[1::2]}.get(
            part, training
        )
        tokens = write_tokens(engine, documents, wanted(config, part), folder, print)
        write_hidden(target, tokens, layers, folder)
    add_seconds(config, "data", time.process_time() - began)


# --- 2. a run --------------------------------------------------------------------------------------------------------


def fit(config: Config, target: Target, job: Job, part: str) -> tuple[DFlashNetwork, Teacher, float]:
    """Train one drafter, or continue; its seconds of training."""
    training = features(config, target, part, job.loop.seed)
    model = new_model(job, target, training)
    assert isinstance(model, DFlashNetwork)
    judge = Teacher.of(target, training.layers, model.config.taps)
    batches, loss = job.method.fit_inputs(job, judge, model, training)
    state = train(model, batches, loss, job.loop, job.work)
    return model.eval(), judge, state["seconds"]


# --- 3. tuning and the runs ------------------------------------------------------------------------------------------


def stage_tune(config: Config) -> None:
    """The learning rate of both ends, on validation rows: greedy tokens per round decide."""
    target, began = load_target(config.path, dtype="float32"), time.process_time()
    for end in sorted(set(TUNED.values())):
        for rate in config.rates:
            folder = config.work / "tune" / f"{end}-{rate:g}"
            if (folder / "result.json").exists():
                continue
            print(f"--- tune {end} at {rate:g}")
            job = config.job(end, config.tuned_block, rate, 100, folder)
            model, judge, _ = fit(config, target, job, "training")
            found = measure(config, model, judge, "validation", "most likely")
            finish(folder, {"arm": end, "rate": rate, "tau": tau(found)})
    add_seconds(config, "tune", time.process_time() - began)


def stage_runs(config: Config) -> None:
    """Every run of the comparison."""
    make_runs(config, "runs", planned(config))


def stage_longer(config: Config) -> None:
    """Some of them with more steps; everything else is the same, and the learning rate is not tuned again."""
    make_runs(replace(config, steps=config.longer * config.steps), "longer", planned_longer(config))


def make_runs(config: Config, stage: str, todo: list[tuple[str, int, int, str]]) -> None:
    """Every run of `todo` that has no result yet: train, measure on greedy text and on sampled text, keep the numbers."""
    target = load_target(config.path, dtype="float32")
    for number, (arm, block, seed, part) in enumerate(todo):
        folder = folder_of(config, arm, block, seed, part, stage)
        if (folder / "result.json").exists():
            continue
        print(
            f"--- run {number + 1}/{len(todo)}: {arm}, blocks of {block}, seed {seed}, {part}, {config.steps} steps",
            flush=True,
        )
        began, rate = time.process_time(), best_rate(config, arm)
        model, judge, seconds = fit(config, target, config.job(arm, block, rate, seed, folder), part)
        result = {
            "arm": arm, "block": block, "seed": seed, "part": part, "rate": rate, "steps": config.steps,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad), "training_seconds": seconds,
            "greedy": measure(config, model, judge, "greedy", "most likely"),
            "temperature 1, most likely": measure(config, model, judge, "sampled", "most likely"),
            "temperature 1, sampled": measure(config, model, judge, "sampled", "sampled"),
        }  # fmt: skip
        model.save(folder / "drafter", str(config.path.name))
        finish(folder, result)
        print(f"    {tau(result['greedy']):.3f} tokens per round, greedy")
        add_seconds(config, stage, time.process_time() - began)


def finish(folder: Path, result: dict[str, Any]) -> None:
    """The result last of all; then the checkpoints are not needed any more."""
    write_whole(folder / "result.json", (json.dumps(result) + "\n").encode())
    for old in folder.glob("step-*"):
        shutil.rmtree(old)


# --- 4. check and report ---------------------------------------------------------------------------------------------


def stage_report(config: Config) -> None:
    """The table, the figure and the page from the results that are there."""
    report.write(config.work, config.docs or config.work, describe(config))


def describe(config: Config) -> dict[str, Any]:
    """What the page says about the setting, read from what was made."""
    target = load_target(config.path, dtype="float32")
    tune = [json.loads(p.read_text()) for p in sorted((config.work / "tune").glob("*/result.json"))]
    check = config.work / "check.json"
    kept = len(features(config, target, "training").tokens)
    short, long, block = report.read(config.work), report.read(config.work, "longer"), max(config.blocks)
    spans = {
        part: float(np.mean(ends(measured_rows(config, part)[0]))) - config.prompt for part in ("greedy", "sampled")
    }
    return {
        "target": {"layers": target.layers, "hidden": target.hidden_size, "vocabulary": target.vocab_size},
        "rows": config.rows, "prompts": config.prompts, "prompt": config.prompt, "length": config.length,
        "temperature": config.temperature, "steps": config.steps, "times": config.longer,
        "batch": config.batch, "anchors": config.anchors, "tuned_block": config.tuned_block,
        "tune": tune, "rates": {arm: best_rate(config, arm) for arm in ARMS},
        "kept": kept, "spans": spans,
        "seconds": json.loads((config.work / "seconds.json").read_text()),
        "check": json.loads(check.read_text()) if check.exists() else [],
        "longer": longer.section(short, long, block, config.longer), "longer_verdict": longer.verdict(short, long, block),
        "command": config.command, "unfinished": unfinished(config),
    }  # fmt: skip


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=("all", *STAGES, "longer"))
    parser.add_argument("--quick", action="store_true", help="small sizes; results stay in the work folder")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--target", type=Path, help="folder of the target; default: the shipped one")
    parser.add_argument("--source", type=Path, help="folder of text; default: the standard library")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--blocks", help="as 4,8,16")
    parser.add_argument("--seeds", type=int, help="how many")
    given = parser.parse_args()
    config = replace(Config(), **QUICK) if given.quick else Config()
    changes: dict[str, Any] = {
        k: v for k in ("work", "target", "source", "steps") if (v := getattr(given, k)) is not None
    }
    if given.quick and given.work is None:
        changes["work"] = config.work.with_name("left_to_right_quick")
    if given.blocks:
        changes["blocks"] = tuple(int(b) for b in given.blocks.split(","))
    if given.seeds:
        changes["seeds"] = tuple(range(given.seeds))
    said = {k: v for k in ("quick", "steps", "blocks", "seeds") if (v := getattr(given, k))}
    for name, value in said.items():
        config = replace(config, command=f"{config.command} --{name}" + f" {value}" * (value is not True))
    run(replace(config, **changes), STAGES if given.stage == "all" else (given.stage,))


def run(config: Config, stages: tuple[str, ...]) -> None:
    """The stages, in order."""
    for stage in stages:
        print(f"=== {stage}", flush=True)
        {
            "data": stage_data, "tune": stage_tune, "runs": stage_runs, "longer": stage_longer, "check": check,
            "report": stage_report,
        }[stage](config)  # fmt: skip


if __name__ == "__main__":
    main()
