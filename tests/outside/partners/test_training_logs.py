"""Trainings tell TensorBoard and Weights & Biases (offline) what they write as JSON lines: read back from both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few seconds that told both."""
    place = tmp_path_factory.mktemp("training")
    make_checkpoint(place / "target", "llama", tokenizer=True)
    (place / "texts").mkdir()
    for i in range(8):
        lines = "\n".join(f"the {j}th line of text number {i}, {i * j}" for j in range(60))
        (place / "texts" / f"{i}.txt").write_text(lines)
    command = [
        sys.executable, "-m", "outrider", "train", "eagle", "--target", "target", "--data", "texts", "--work", "work",
        "--out", "out", "--rows", "12", "--held-out", "4", "--prompt", "8", "--length", "24", "--steps", "4", "--batch", "4",
        "--levels", "2", "--log", "tensorboard", "--log", "wandb",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=place, env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = (place / "work").rglob("metrics.jsonl")
    return found.parent


def lines_of(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> the value that was written last."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(k, row["step"]): v for row in rows for k, v in row.items() if k != "step"}


def test_tensorboard_reads_the_same_numbers(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    found = {(name, e.step): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}
    written = lines_of(trained)
    assert written and found.keys() == written.keys()
    assert all(found[at] == pytest.approx(value, rel=1e-5, abs=1e-6) for at, value in written.items())


def records(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """The records of a file of wandb's: LevelDB's log format behind a head of seven bytes. wandb 0.31 has no reader in Python."""
    at, part = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]  # behind a checksum
        part = (b"" if kind in (1, 2) else part) + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield part


def test_wandb_keeps_the_same_numbers_offline(trained: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    (path,) = trained.rglob("*.wandb")
    found = dict[tuple[str, int], float]()
    for data in records(path.read_bytes()):
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        found |= {(k, row["_step"]): v for k, v in row.items() if not k.startswith("_")}
    written = lines_of(trained)
    assert written and found.keys() == written.keys()
    assert all(found[at] == pytest.approx(value, rel=1e-6, abs=1e-9) for at, value in written.items())
