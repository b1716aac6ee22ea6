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
import sysconfig
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import left_to_right_longer as longer
import left_to_right_report as report
import numpy as np
import torch
from torch import Tensor

from outrider.assets import shipped
from outrider.build import Engine, build_engine
from outrider.control.fixed import Fixed
from outrider.drafters.dflash.drafter import DFlashDrafter
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.files import write_whole
from outrider.models.load import load_target
from outrider.params import SamplingParams
from outrider.protocols import Target
from outrider.train import data
from outrider.train.distill import Teacher
from outrider.train.features import NGRAM, DataSpec, Features, read_features, write_hidden, write_tokens
from outrider.train.job import Job
from outrider.train.loop import LoopConfig, train
from outrider.train.pipeline import layers_of, new_model
from outrider.train.walk import most_likely, sampled, walk

HERE = Path(__file__).resolve().parent
STAGES = ("data", "tune", "runs", "check", "report")
"""Of `all`; `longer` is a stage beside them, whose results the next report shows."""
ARMS = ("uniform", "decay", "focal", "chain", "dpace")
TUNED = {"uniform": "uniform", "decay": "uniform", "focal": "chain", "chain": "chain", "dpace": "chain"}
"""Both ends of the comparison are tuned; an arm between them takes the learning rate of the end it is nearer to."""
AS_WRITTEN = ("uniform", "chain")
LONGER = ("uniform", "chain")
"""Arms that are trained once more, with `Config.longer` times the steps, to see whether the gain grows or shrinks."""
PARTS = ("training", "as_written", "validation", "greedy", "sampled")


@dataclass(frozen=True)
class Config:
    """The whole experiment. Rows have `length` tokens, of which `prompt` were given; `prompts` rows are measured on."""

    work: Path = HERE.parent / "runs" / "left_to_right"
    docs: Path | None = HERE.parent / "docs"
    target: Path | None = None  # None: the shipped one
    source: Path = Path(sysconfig.get_paths()["stdlib"])
    pattern: str = "*.py"
    rows: int = 512
    prompts: int = 128
    prompt: int = 48
    length: int = 192
    temperature: float = 0.8  # at which the target writes what is trained on
    steps: int = 480
    longer: int = 4  # times as many, in the stage `longer`
    batch: int = 2
    anchors: int = 32
    blocks: tuple[int, ...] = (4, 8)
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    tuned_block: int = 8
    command: str = "python recipes/left_to_right.py all"  # that makes the page from nothing

    @property
    def path(self) -> Path:
        return self.target or shipped("target")

    def job(self, arm: str, block: int, rate: float, seed: int, folder: Path) -> Job:
        """The training of one run."""
        loop = LoopConfig(
            steps=self.steps, lr=rate, warmup=max(1, self.steps // 25), final_lr_ratio=0.1, weight_decay=0.01, seed=seed,
            save_every_s=60.0, log_every=max(1, self.steps // 4),
        )  # fmt: skip
        return Job(
            kind="dflash", target=self.path, data=(self.source,), work=folder, out=folder / "drafter", loop=loop,
            rows=self.rows, prompt=self.prompt, length=self.length, batch=self.batch, levels=block - 1,
            anchors=self.anchors, objective=arm, labels="tokens",
        )  # fmt: skip


# --- 1. data ---------------------------------------------------------------------------------------------------------


def wanted(config: Config, part: str) -> DataSpec:
    """What the rows of a part are: the target's own text but for `as_written`, training rows or prompts."""
    few = max(4, config.prompts // 2)
    return {
        "training": DataSpec(config.rows, config.prompt, config.length, config.temperature, 0),
        "as_written": DataSpec(config.rows, config.length, config.length, config.temperature, 0),
        "validation": DataSpec(few, config.prompt, config.length, 0.0, 1),
        "greedy": DataSpec(config.prompts, config.prompt, config.length, 0.0, 2),
        "sampled": DataSpec(config.prompts, config.prompt, config.length, 1.0, 2),
    }[part]


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


def stored(config: Config, target: Target) -> tuple[int, ...]:
    """Layers whose hidden states are kept: those that are read, and the last."""
    return layers_of(config.job("uniform", 4, 1e-3, 0, config.work), target)


def features(config: Config, target: Target, part: str, seed: int = 0) -> Features:
    """Rows of a part without those that go in circles."""
    return read_features(config.work / "data" / part, stored(config, target), rows=config.batch, seed=seed)


def add_seconds(config: Config, stage: str, seconds: float) -> None:
    """Keep what a stage has cost in all: seconds of processor time, which other programs do not lengthen."""
    path = config.work / "seconds.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    held[stage] = held.get(stage, 0.0) + seconds
    write_whole(path, (json.dumps(held) + "\n").encode())


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


@torch.no_grad()
def measure(config: Config, model: DFlashNetwork, judge: Teacher, part: str, how: str) -> dict[str, Any]:
    """Rounds over the rows of a part: emitted tokens and rounds of every prompt, judged and accepted slots by depth."""
    tokens, hidden = measured_rows(config, part)
    accepts = most_likely if how == "most likely" else sampled(log_p_of(judge, tokens, hidden), uniforms(tokens))
    runs = walk(model, tokens, hidden[:, :, list(judge.taps)], config.prompt, accepts)
    runs = [before(e, r, config.prompt, model.config.block) for e, r in zip(ends(tokens), runs, strict=True)]
    depth = model.config.block - 1
    return {
        "emitted": [sum(r) + len(r) for r in runs],
        "rounds": [len(r) for r in runs],
        "judged_at": [sum(a >= d for r in runs for a in r) for d in range(depth)],
        "accepted_at": [sum(a > d for r in runs for a in r) for d in range(depth)],
    }


def measured_rows(config: Config, part: str) -> tuple[Tensor, Tensor]:
    """All rows of a part, and their hidden states."""
    folder = config.work / "data" / part
    tokens, hidden = (np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in ("tokens", "hidden"))
    return Features(tokens, hidden, (), rows=config.batch).take(list(range(len(tokens))))


def ends(tokens: Tensor) -> list[int]:
    """Where every row begins to go in circles: the end of its first 8-gram that occurred in it before, or the row's own end.

    Greedy text of a small model does so soon, and a drafter that has seen the circle once would be measured on little else.
    """
    out = []
    for row in tokens.tolist():
        seen: set[tuple[int, ...]] = set()
        end = len(row)
        for i in range(len(row) - NGRAM + 1):
            gram = tuple(row[i : i + NGRAM])
            if gram in seen:
                end = i + NGRAM
                break
            seen.add(gram)
        out.append(end)
    return out


def before(end: int, runs: list[int], first: int, size: int) -> list[int]:
    """The rounds of a row whose blocks lie before `end`. first: position of the first anchor. size: slots of a block."""
    at, kept = first, []
    for run in runs:
        if at + size > end:
            break
        kept.append(run)
        at += run + 1
    return kept


def log_p_of(judge: Teacher, tokens: Tensor, hidden: Tensor) -> Tensor:
    """log p of every token of the rows under the target at temperature 1 (0 for the first ones)."""
    out = torch.zeros(tokens.shape)
    for r in range(len(tokens)):
        distributions = torch.log_softmax(judge.distributions(hidden[r : r + 1]).float(), -1)[0, :-1]
        out[r, 1:] = distributions.gather(-1, tokens[r, 1:, None])[:, 0]
    return out


def uniforms(tokens: Tensor) -> Tensor:
    """One number in (0, 1) for each token, the same in every run."""
    return torch.rand(tokens.shape, generator=torch.Generator().manual_seed(11)).clamp(min=1e-12)


def tau(found: dict[str, Any]) -> float:
    """Tokens per round, a ratio of sums."""
    return sum(found["emitted"]) / max(1, sum(found["rounds"]))


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


def best_rate(config: Config, arm: str) -> float:
    """The tuned learning rate of an arm's end."""
    tried = [json.loads(p.read_text()) for p in sorted((config.work / "tune").glob(f"{TUNED[arm]}-*/result.json"))]
    if not tried:
        raise SystemExit("nothing is tuned yet: run the stage 'tune' first")
    return max(tried, key=lambda r: r["tau"])["rate"]


def planned(config: Config) -> list[tuple[str, int, int, str]]:
    """(arm, block, seed, part of the data) of every run: whole seeds first, so that an early stop leaves complete pairs."""
    out = [(arm, block, seed, "training") for seed in config.seeds for block in config.blocks for arm in ARMS]
    return out + [(arm, max(config.blocks), seed, "as_written") for seed in config.seeds for arm in AS_WRITTEN]


def planned_longer(config: Config) -> list[tuple[str, int, int, str]]:
    """The same for the stage `longer`: the largest blocks."""
    return [(arm, max(config.blocks), seed, "training") for seed in config.seeds for arm in LONGER]


def folder_of(config: Config, arm: str, block: int, seed: int, part: str, stage: str = "runs") -> Path:
    return config.work / stage / f"{part}-{block}-{arm}-{seed}"


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


def stage_check(config: Config) -> None:
    """The engine with the drafters of the first seed, on measured prompts at temperature 0: its rounds against the walk's."""
    began, found = time.process_time(), []
    engine = build_engine(config.path, "none", slots=8, max_length=config.length + 32)
    layers = stored(config, engine.parts.target)
    tokens, hidden = (x[:24] for x in measured_rows(config, "greedy"))
    for arm in ("uniform", "chain"):
        for block in config.blocks:
            folder = folder_of(config, arm, block, config.seeds[0], "training") / "drafter"
            if not folder.exists():
                continue
            model = DFlashNetwork.load(folder, engine.parts.target, str(config.path))
            columns = [layers.index(t) for t in model.config.taps]
            runs = walk(model, tokens, hidden[:, :, columns], config.prompt, most_likely)
            rounds, emitted = engine_rounds(engine, model, tokens, config)
            walked = (sum(map(len, runs)), sum(map(sum, runs)) + sum(map(len, runs)))
            found.append({"arm": arm, "block": block, "engine": [rounds, emitted], "walk": list(walked)})
            print(f"{arm}, blocks of {block}: engine {emitted}/{rounds}, walk {walked[1]}/{walked[0]} tokens/rounds")
    write_whole(config.work / "check.json", (json.dumps(found) + "\n").encode())
    add_seconds(config, "check", time.process_time() - began)


def engine_rounds(engine: Engine, model: DFlashNetwork, tokens: Tensor, config: Config) -> tuple[int, int]:
    """Rounds and emitted tokens of the engine after the prompts of `tokens`, as far as a round ends within the rows."""
    size = model.config.block
    drafter = DFlashDrafter(model, Levels(levels((1,) * (size - 1)), engine.parts.target.vocab_size))
    one = Engine(
        engine.parts.target, drafter, engine.parts.rule, Fixed(size - 1), slots=8, max_length=config.length + 32
    )
    more = config.length - config.prompt + size
    params = SamplingParams(temperature=0.0, max_tokens=more, ignore_eos=True)
    names = [one.submit(row[: config.prompt], params) for row in tokens.tolist()]
    at = dict.fromkeys(names, -1)
    rounds = emitted = 0
    while one.scheduler.running or one.scheduler.waiting:
        for event in one.step():
            place = at[event.request]
            if place >= 0 and place + size <= config.length:
                rounds, emitted = rounds + 1, emitted + len(event.tokens)
            at[event.request] = config.prompt if place < 0 else place + len(event.tokens)
    return rounds, emitted


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


def unfinished(config: Config) -> str:
    """A sentence for the page about runs that are planned and not there; nothing if there are none."""
    gone = [folder_of(config, *run, "runs") for run in planned(config)]
    names = [f"{f.parent.name}/{f.name}" for f in gone if not (f / "result.json").exists()]
    return f"\nThe command was not run to its end; missing: {', '.join(names)}.\n" if names else ""


QUICK = {
    "rows": 24, "prompts": 8, "prompt": 16, "length": 48, "steps": 8, "batch": 4, "anchors": 6, "seeds": (0, 1),
    "rates": (2e-3, 4e-3), "docs": None,
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
            "data": stage_data, "tune": stage_tune, "runs": stage_runs, "longer": stage_longer, "check": stage_check,
            "report": stage_report,
        }[stage](config)  # fmt: skip


if __name__ == "__main__":
    main()
