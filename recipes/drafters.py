"""Train the shipped pair's sequential heads, EAGLE drafter and block drafter from nothing, and measure every shipped drafter.

    python recipes/drafters.py all                 # data, all trainings, cards, the table of docs/drafters.md
    python recipes/drafters.py eagle --steps 50    # one stage
    python recipes/drafters.py measure cards       # measure again what lies there

Stages: data -> medusa -> eagle -> dflash -> measure -> cards. The target writes the text (prompts from Python's own library, files
of the held-out part apart), its hidden states are kept on disk, all drafters read the same ones. Every stage can be killed at any
moment and continued by the same command. `measure` decodes held-out prompts with every drafter that lies beside the target,
at temperature 0 and 1, interleaved; what it finds goes to the cards and to the page.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sysconfig
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from outrider.assets import shipped_prompts
from outrider.build import build_engine
from outrider.evaluate.bench.chart import measured
from outrider.evaluate.bench.presets import arms_of, preset
from outrider.evaluate.measure import machine, run_arms
from outrider.evaluate.records import summarise
from outrider.files import write_whole
from outrider.params import SamplingParams
from outrider.train.checkpoint import load_latest, replace_folder
from outrider.train.distill import MEASURED
from outrider.train.job import Job
from outrider.train.loop import LoopConfig, share_computing
from outrider.train.methods.base import Method
from outrider.train.methods.registry import method_named
from outrider.train.pipeline import prepare, run

HERE = Path(__file__).resolve().parent
KINDS = ("medusa", "eagle", "dflash")
"""Folders beside the target."""
METHOD = {"medusa": "hydra"}
"""The method that trains what lies in a folder, where it has another name."""
STAGES = ("data", *KINDS, "measure", "cards")
TEMPERATURES = (0.0, 1.0)
BEGIN, END = "<!-- measured: recipes/drafters.py -->", "<!-- end -->"
"""The place of the table in docs/drafters.md."""


@dataclass(frozen=True)
class Config:
    """The whole recipe. Rows have `length` tokens, of which `prompt` were given; the target writes the rest."""

    work: Path = HERE.parent / "runs" / "drafters-shipped"
    assets: Path = HERE.parent / "src" / "outrider" / "assets" / "pycode"
    docs: Path | None = HERE.parent / "docs" / "drafters.md"
    source: Path = Path(sysconfig.get_paths()["stdlib"])
    rows: int = 1600
    held_out: int = 64
    prompt: int = 64
    length: int = 256
    temperature: float = 1.0
    batch: int = 4  # rows of a step
    width: int = 160  # of the feature drafter and the heads
    blocks: int = 2  # residual blocks of a head
    levels: int = 4  # of heads and feature drafter
    slots: int = 7  # that the block drafter drafts
    anchors: int = 32  # blocks of a row and step
    objective: str = "chain"  # of the block drafter, see docs/train.md
    medusa: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=4500, lr=3e-3, warmup=100, final_lr_ratio=0.02, save_every_s=180.0)
    )
    eagle: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=4500, lr=2e-3, warmup=100, final_lr_ratio=0.02, save_every_s=180.0)
    )
    dflash: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=4500, lr=2e-3, warmup=100, final_lr_ratio=0.02, save_every_s=180.0)
    )
    count: int = 16  # prompts that are measured on
    tokens: int = 96
    repeats: int = 2

    def job(self, kind: str) -> Job:
        """The training of one drafter."""
        return Job(
            kind=unnamed(METHOD.get(kind, kind)),
            target=self.assets / "target",
            data=(self.source,),
            pattern="*.py",
            work=self.work,
            out=self.assets / kind,
            rows=self.rows,
            held_out=self.held_out,
            prompt=self.prompt,
            length=self.length,
            temperature=self.temperature,
            batch=self.batch,
            levels=self.depth(kind),
            loop=getattr(self, kind),
            **self.own(kind),
        )

    def own(self, kind: str) -> dict[str, Any]:
        """What only one kind of drafter reads."""
        return {
            "medusa": {"width": self.width, "blocks": self.blocks},
            "eagle": {"width": self.width},
            "dflash": {"anchors": self.anchors, "objective": self.objective},
        }.get(kind, {})

    def depth(self, kind: str) -> int:
        """Tokens that a drafter can draft."""
        return self.slots if kind == "dflash" else self.levels


def unnamed(kind: str) -> Method:
    """The method of this name, but what it writes names no path of this machine: a shipped target lies beside its drafters."""
    return type(kind, (type(method_named(kind)),), {"names_target": False})()


def stage_data(config: Config) -> None:
    """Text and hidden states: all drafters read the same layers."""
    prepare(config.job("eagle"))


def stage_train(config: Config, kind: str) -> None:
    """One drafter, put in its place beside the target."""
    report = run(config.job(kind))
    print(json.dumps(report, indent=1))


# --- measuring -------------------------------------------------------------------------------------------------------


def stage_measure(config: Config) -> None:
    """Decode held-out prompts with every drafter there is; keep the rows."""
    specs, found = preset("chart"), {}
    engine = build_engine(config.assets / "target", "none", slots=1, max_length=512)
    texts = [engine.encode(p) for p in shipped_prompts()[: config.count]]
    arms, absent = arms_of(engine, specs)
    for name, why in absent.items():
        print(f"{name}: absent ({why})")
    for temperature in TEMPERATURES:
        params = SamplingParams(temperature=temperature, max_tokens=config.tokens, ignore_eos=True)
        records = run_arms(arms, texts, params, repeats=config.repeats)
        summaries = {s.name: s for s in summarise(records, arms[0].name)}
        for row in measured(specs, records):
            speedup = summaries[row.name].speedup
            found[f"{temperature:g} {row.name}"] = {
                "temperature": temperature,
                "name": row.name,
                "length": interval(row.acceptance_length),
                "draft_ms": row.draft_ms,
                "speed": interval(row.tokens_per_second),
                "speedup": None if speedup is None else interval(speedup),
                "acceptance": row.acceptance,
            }
    document = {"machine": machine(), "prompts": config.count, "tokens": config.tokens, "rows": list(found.values())}
    write_whole(config.work / "measured.json", (json.dumps(document, indent=1) + "\n").encode())
    print(table(document))


def interval(ratio: Any) -> list[float]:
    return [ratio.value, ratio.low, ratio.high]


def table(document: dict[str, Any]) -> str:
    """The rows as a table for people. Accepted per ms of draft time: (tokens per step - 1) / draft ms per step."""
    lines = [
        "| drafter | T | tokens per step | draft ms per step | accepted per draft ms | tokens/s | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    show = lambda r, d: f"{r[0]:.{d}f} ({r[1]:.{d}f} to {r[2]:.{d}f})"  # noqa: E731
    for row in document["rows"]:
        plain = row["speedup"] is None
        rate = "" if plain else f"{(row['length'][0] - 1) / max(1e-9, row['draft_ms']):.2f}"
        cells = (
            row["name"], f"{row['temperature']:g}", "1" if plain else show(row["length"], 2),
            "" if plain else f"{row['draft_ms']:.2f}", rate, show(row["speed"], 0), "base" if plain else show(row["speedup"], 2),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    m = document["machine"]
    lines += [
        "",
        f"{document['prompts']} held-out prompts, {document['tokens']} tokens each, one at a time; intervals are 95% over prompts. "
        f"{m['cpu']}, {m['threads']} threads, torch {m['versions']['torch']}.",
    ]
    return "\n".join(lines)


# --- cards and page --------------------------------------------------------------------------------------------------

TITLES = {"medusa": "Medusa heads", "eagle": "EAGLE-3 drafter", "dflash": "block-diffusion drafter"}
ARMS = {"medusa": ("Medusa",), "eagle": ("EAGLE, chain", "EAGLE, dynamic tree"), "dflash": ("block diffusion",)}
ENGINE = "In the engine:"
STAGED = "KL, then total variation with a tenth of KL"
LOSS = {
    "medusa": STAGED,
    "eagle": STAGED,
    "dflash": "cross-entropy, then -log of the acceptance with a tenth of it; objective `chain`",
}
WHAT = {
    "medusa": "Heads one after the other (Hydra: Ankner et al. 2024): two residual blocks and one output matrix for all levels, on "
    "four fused hidden states and the tokens above; the table of tokens is the target's, not the folder's.",
    "eagle": "One decoder layer on three fused hidden states, trained through its own outputs (Li et al. 2025), in the "
    "`speculators` layout of EAGLE-3.",
    "dflash": "One bidirectional layer over blocks of 8 slots, hidden states of three of the target's blocks injected as keys and "
    "values (DFlash, arXiv 2602.06036), in the `speculators` layout; the token tables are the target's and not in the folder.",
}


def stage_cards(config: Config) -> None:
    """A model card beside each drafter, and the table of the page."""
    document = json.loads((config.work / "measured.json").read_text())
    for kind in KINDS:
        write_card(config, kind, document)
    if config.docs is not None:
        page = config.docs.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN, 1)
        after = rest.split(END, 1)[1]
        write_whole(config.docs, f"{before}{BEGIN}\n{table(document)}\n{END}{after}".encode())


def write_card(config: Config, kind: str, document: dict[str, Any]) -> None:
    """Put README.md into a drafter's folder, hashes included. What a card says of a training that is not at hand, or not at its
    end, is kept."""
    folder = config.assets / kind
    runs = sorted((config.work / METHOD.get(kind, kind)).glob("*/"), key=lambda run: run.stat().st_mtime)
    checkpoint, old = load_latest(runs[-1]) if runs else None, folder / "README.md"
    if checkpoint is not None and checkpoint.state["step"] == getattr(config, kind).steps:
        made = describe(config, kind, checkpoint.state)
    elif old.is_file() and ENGINE in old.read_text(encoding="utf-8"):
        made = old.read_text(encoding="utf-8").split(ENGINE)[0]
    else:
        raise SystemExit(f"nothing in {config.work / kind}: run the stage {kind!r} first")
    mine = {**document, "rows": [r for r in document["rows"] if r["name"] in ARMS[kind]]}
    card = f"{made}{ENGINE}\n\n{table(mine)}\n\nFor demonstrations and tests. Licence: Apache-2.0.\n"
    built = folder.with_name(f".tmp-card-{kind}-{os.getpid()}")
    shutil.copytree(folder, built, ignore=shutil.ignore_patterns("manifest.json"))
    (built / "README.md").write_text(card, encoding="utf-8")
    replace_folder(built, folder)


def describe(config: Config, kind: str, state: dict[str, Any]) -> str:
    """The part of a card that comes of the training: `state` of its last checkpoint."""
    job, size = config.job(kind), (config.assets / kind / "model.safetensors").stat().st_size
    last, levels = state["history"][-1], range(1, config.depth(kind) + 1)
    command = "python recipes/drafters.py all" + " --autocast" * state["config"]["autocast"]
    return f"""# pycode: {TITLES[kind]}

For the target `pycode/target`. {WHAT[kind]} {size / 2**20:.1f} MiB, bfloat16.

Made by `{command}`: {job.rows} rows of {job.length} tokens, {job.prompt} of them from the standard library of
Python, the others written by the target at temperature {job.temperature:g}; labels are the target's distributions ({LOSS[kind]}).
{state["step"]} steps, {state["tokens"] / 1e6:.1f}M tokens seen, {state["seconds"] / 60:.0f} minutes,
{share_computing(state):.0%} of them in model computation.

On {min(MEASURED, job.held_out)} held-out rows (files of the held-out part of the same library):

| level | {" | ".join(map(str, levels))} |
|---|{"---|" * len(levels)}
| acceptance, sum min(p, q), temperature 1 | {" | ".join(f"{last[f'accept_{d}']:.3f}" for d in levels)} |
| same most likely token | {" | ".join(f"{last[f'same_{d}']:.3f}" for d in levels)} |

"""


# --- the command line ------------------------------------------------------------------------------------------------


def main(config: Config, stages: tuple[str, ...]) -> None:
    """Run `stages` in order."""
    for stage in stages:
        print(f"--- {stage}", flush=True)
        if stage in KINDS:
            stage_train(config, stage)
        else:
            {"data": stage_data, "measure": stage_measure, "cards": stage_cards}[stage](config)


def parse(arguments: list[str] | None = None) -> tuple[Config, tuple[str, ...]]:
    """Command line -> configuration and stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="+", choices=(*STAGES, "all"), help="what to do, in this order")
    parser.add_argument("--work", type=Path, help="folder for everything intermediate (default runs/drafters-shipped)")
    parser.add_argument(
        "--assets", type=Path, help="folder of the pair: target/ is read, drafters are written beside it"
    )
    parser.add_argument("--rows", type=int, help="rows of training text")
    parser.add_argument("--steps", type=int, help="steps of every training")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 products (AVX512_BF16 or AMX): twice as fast")
    parser.add_argument("--no-docs", action="store_true", help="leave docs/drafters.md alone")
    given = parser.parse_args(arguments)
    changes = {k: getattr(given, k) for k in ("work", "assets", "rows") if getattr(given, k) is not None}
    config = replace(Config(), **changes, **({"docs": None} if given.no_docs else {}))
    if given.steps is not None:
        loops = {k: replace(getattr(config, k), steps=given.steps, warmup=min(30, given.steps)) for k in KINDS}
        config = replace(config, **loops)
    if given.autocast:
        config = replace(config, **{k: replace(getattr(config, k), autocast=True) for k in KINDS})
    return config, STAGES if "all" in given.stage else tuple(given.stage)


if __name__ == "__main__":
    main(*parse())
