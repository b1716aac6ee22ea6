"""Trainings killed by SIGKILL at random moments: `python -m tests.train.killable FOLDER KILLS SEED KIND...`, JSON by kind.

One process imports torch and forks a child for every attempt, so that an attempt costs milliseconds. A child trains from the
newest checkpoint; one that comes to its end starts the next run afresh, and after `KILLS` kills the last one is left alone.
Nothing but files is shared.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.eagle.network import EagleConfig
from outrider.drafters.medusa.format import MedusaConfig, SequentialConfig
from outrider.drafters.mtp.network import MtpConfig
from outrider.drafters.target_tables import output_of
from outrider.files import sha256_of
from outrider.models.hf.fresh import small_llama
from outrider.models.toy import TinyLM
from outrider.train.checkpoint import checkpoints
from outrider.train.distill import Teacher, loss_of, measure_of
from outrider.train.features import Features, hidden_of
from outrider.train.loop import LoopConfig, train
from outrider.train.methods.dflash import Blocks, block_distillation_loss, new_blocks
from outrider.train.methods.draft import new_draft
from outrider.train.methods.eagle import feature_loss, new_features, new_last_features
from outrider.train.methods.hydra import new_sequence
from outrider.train.methods.medusa import new_heads
from outrider.train.methods.mtp import new_head
from outrider.train.methods.registry import METHODS
from outrider.train.slot_losses import objective_named

V, H, LAYERS = 19, 16, (1, 2, 3)
STEPS, BLOCK = 30, 4


def setup(kind: str) -> tuple[Any, Teacher, Features]:
    """A tiny target, its hidden states on 16 rows, and a fresh drafter."""
    target = TinyLM(V, H, 3, seed=1, sharp=3.0, dtype=torch.float32)
    tokens = torch.randint(V, (16, 24), generator=torch.Generator().manual_seed(0))
    hidden = hidden_of(target, tokens, LAYERS)
    data = Features(tokens.numpy().astype(np.uint16), hidden.half().numpy(), LAYERS, rows=4)
    if kind == "medusa":
        return new_heads(MedusaConfig(H, V, 3, 3), target), Teacher.of(target, LAYERS, (3,)), data
    if kind == "hydra":
        shape = SequentialConfig(H, V, (1, 3), 16, 32)
        return new_sequence(shape, target, hidden[:, :, [0, 2]].flatten(0, 1)), Teacher.of(target, LAYERS, (1, 3)), data
    if kind == "draft":
        return new_draft(small_llama(V, 32, 1, 64), target), Teacher.of(target, LAYERS, (3,)), data
    if kind == "dflash":
        shape = DFlashConfig(H, (1, 3), V, 2, 1, 8, 32, BLOCK, mask=0)
        model = new_blocks(shape, target, hidden[:, :, [0, 2]].flatten(0, 1), output_of(target), torch.ones(H))
        return model, Teacher.of(target, LAYERS, (1, 3)), data
    if kind == "eagle1":
        shape = EagleConfig(H, H, (3,), V, 2, 1, 8, 32)
        return new_last_features(shape, target), Teacher.of(target, LAYERS, (3,)), data
    if kind == "mtp":
        return new_head(MtpConfig(H, H, (3,), V, 2, 1, 8, 32), target), Teacher.of(target, LAYERS, (3,)), data
    config = EagleConfig(16, H, (1, 3), V, 2, 1, 8, 32)
    model = new_features(config, target, hidden[:, :, [0, 2]].flatten(0, 1))
    return model, Teacher.of(target, LAYERS, (1, 3)), data


def attempt(kind: str, folder: Path) -> None:
    """Train to the end from wherever the folder is."""
    model, judge, data = setup(kind)
    predict = METHODS[kind].predictor(1 if kind == "draft" else 3)
    config = LoopConfig(steps=STEPS, lr=1e-2, warmup=5, save_every_s=0.01)
    evaluate = partial(lambda f, m: f(m), measure_of(judge, predict, data, rows=4))
    batches, loss = (
        data,
        loss_of(judge, predict, scored=partial(METHODS[kind].scored, levels=1 if kind == "draft" else 3)),
    )
    if kind == "dflash":
        batches, loss = (
            Blocks(data, BLOCK, 6, 2),
            block_distillation_loss(judge.taps, judge.last, judge.target, objective_named("chain", BLOCK)),
        )
    elif kind == "eagle1":
        loss = feature_loss(judge)  # its noise is drawn: the random state is a part of what is continued
    train(model, batches, loss, config, folder, evaluate, report=lambda _: None)


def forked(kind: str, folder: Path, patience: float | None) -> bool:
    """Run `attempt` in a child, killed after `patience` seconds unless None; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            attempt(kind, folder)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if patience is not None:
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)  # no error if it ended just now: it is not yet waited for
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a training failed by itself")
    return os.WIFEXITED(status)


def main(kind: str, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    began = time.monotonic()
    forked(kind, folder / "whole", None)
    whole = time.monotonic() - began
    draw, killed, at, run = random.Random(seed), 0, [], 0
    while killed < kills:
        part = folder / f"part-{run}"
        if forked(kind, part, draw.uniform(0.0, 0.8 * whole)):
            run += 1  # it came to its end before its killer: the next one is a fresh run
            continue
        killed += 1
        at.append(int(checkpoints(part)[-1].name[5:]) if checkpoints(part) else 0)
    forked(kind, folder / f"part-{run}", None)
    ends = [checkpoints(path)[-1] for path in sorted(folder.glob("*"))]
    sums = {sha256_of(path / "model.safetensors") for path in ends}
    return {
        "killed": killed,
        "at": at,
        "runs": run + 1,
        "steps": sorted({p.name for p in ends}),
        "same": len(sums) == 1,
    }


if __name__ == "__main__":
    where, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps({kind: main(kind, where / kind, kills, seed) for kind in sys.argv[4:]}))
