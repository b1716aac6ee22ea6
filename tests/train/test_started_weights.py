"""A training that starts from a trained drafter: its weights are the first ones, and another training in the work folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from outrider.errors import ConfigError
from outrider.train.loop import LoopConfig
from outrider.train.pipeline import run
from tests.train.test_old_work import OLD, job

STILL = LoopConfig(steps=1, lr=1e-12, warmup=1, save_every_s=0.0)
"""A step that moves no weight by as much as bfloat16 shows."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.parametrize("kind", ["eagle", "medusa", "dflash"])
def test_the_first_weights_are_the_trained_ones(kind: str, folder: Path) -> None:
    first, said = job(kind, folder), list[str]()
    run(first, said.append)
    again = replace(first, start=first.out, out=folder / "again", loop=STILL)
    run(again, said.append)
    fresh = replace(again, start=None, out=folder / "fresh")
    run(fresh, said.append)
    trained, started, other = (load_file(f / "model.safetensors") for f in (first.out, again.out, fresh.out))
    assert trained.keys() == started.keys()
    assert all(torch.equal(trained[n], started[n]) for n in trained)
    assert any(not torch.equal(trained[n], other[n]) for n in trained)
    assert first.choices(()) != again.choices(()) != fresh.choices(())


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    first = job("eagle", folder)
    run(first, lambda _: None)
    with pytest.raises(ConfigError, match="has other sizes than this training"):
        run(replace(first, start=first.out, width=32), lambda _: None)
    for kind in ("draft", "mtp"):  # said before any work
        with pytest.raises(
            ConfigError, match=f"{kind} does not read start; medusa, hydra, eagle, eagle1, dflash would"
        ):
            replace(job("medusa", folder), kind=kind, start=first.out)
    with pytest.raises(ConfigError, match="repeats is a share"):
        replace(first, repeats=1.5)
