"""What `left_to_right.py` compares and where its results lie: the configuration, the parts of the data, the planned runs."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from outrider.assets import shipped
from outrider.files import write_whole
from outrider.protocols import Target
from outrider.train.features import DataSpec, Features, read_features
from outrider.train.job import Job
from outrider.train.loop import LoopConfig
from outrider.train.pipeline import layers_of

HERE = Path(__file__).resolve().parent
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


QUICK = {
    "rows": 24, "prompts": 8, "prompt": 16, "length": 48, "steps": 8, "batch": 4, "anchors": 6, "seeds": (0, 1),
    "rates": (2e-3, 4e-3), "docs": None,
}  # fmt: skip


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


def stored(config: Config, target: Target) -> tuple[int, ...]:
    """Layers whose hidden states are kept: those that are read, and the last."""
    return layers_of(config.job("uniform", 4, 1e-3, 0, config.work), target)


def features(config: Config, target: Target, part: str, seed: int = 0) -> Features:
    """Rows of a part without those that go in circles."""
    return read_features(config.work / "data" / part, stored(config, target), rows=config.batch, seed=seed)


def planned(config: Config) -> list[tuple[str, int, int, str]]:
    """(arm, block, seed, part of the data) of every run: whole seeds first, so that an early stop leaves complete pairs."""
    out = [(arm, block, seed, "training") for seed in config.seeds for block in config.blocks for arm in ARMS]
    return out + [(arm, max(config.blocks), seed, "as_written") for seed in config.seeds for arm in AS_WRITTEN]


def planned_longer(config: Config) -> list[tuple[str, int, int, str]]:
    """The same for the stage `longer`: the largest blocks."""
    return [(arm, max(config.blocks), seed, "training") for seed in config.seeds for arm in LONGER]


def folder_of(config: Config, arm: str, block: int, seed: int, part: str, stage: str = "runs") -> Path:
    return config.work / stage / f"{part}-{block}-{arm}-{seed}"


def best_rate(config: Config, arm: str) -> float:
    """The tuned learning rate of an arm's end."""
    tried = [json.loads(p.read_text()) for p in sorted((config.work / "tune").glob(f"{TUNED[arm]}-*/result.json"))]
    if not tried:
        raise SystemExit("nothing is tuned yet: run the stage 'tune' first")
    return max(tried, key=lambda r: r["tau"])["rate"]


def unfinished(config: Config) -> str:
    """A sentence for the page about runs that are planned and not there; nothing if there are none."""
    gone = [folder_of(config, *run, "runs") for run in planned(config)]
    names = [f"{f.parent.name}/{f.name}" for f in gone if not (f / "result.json").exists()]
    return f"\nThe command was not run to its end; missing: {', '.join(names)}.\n" if names else ""


def add_seconds(config: Config, stage: str, seconds: float) -> None:
    """Keep what a stage has cost in all: seconds of processor time, which other programs do not lengthen."""
    path = config.work / "seconds.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    held[stage] = held.get(stage, 0.0) + seconds
    write_whole(path, (json.dumps(held) + "\n").encode())
