"""How `left_to_right.py` measures a drafter: rounds of a walk over finished text, and, as a check, those of the engine."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from left_to_right_setting import Config, add_seconds, folder_of, stored
from torch import Tensor

from outrider.build import Engine, build_engine
from outrider.control.fixed import Fixed
from outrider.drafters.dflash.drafter import DFlashDrafter
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.files import write_whole
from outrider.params import SamplingParams
from outrider.train.distill import Teacher
from outrider.train.features import NGRAM, Features
from outrider.train.walk import most_likely, sampled, walk


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


def check(config: Config) -> None:
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
