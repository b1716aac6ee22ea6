"""A training killed by SIGKILL at random moments loses nothing: the same bits in the end as one that was left alone (CPU, float32).

Six kills of every kind of trainer; the nightly form kills each of them thirty times, three times over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ("medusa", "eagle", "eagle1", "dflash", "draft")
ROOT = Path(__file__).resolve().parents[2]


def killed(kind: str, folder: Path, kills: int, seed: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.killable", kind, str(folder), str(kills), str(seed)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_six_kills_change_no_bit(kind: str, tmp_path: Path) -> None:
    found = killed(kind, tmp_path, 6, seed=7)
    assert found["same"], found
    assert found["steps"] == ["step-00000030"]
    assert found["killed"] == 6  # whether they hit different moments is asked of thirty: make test-slow


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_thirty_kills_change_no_bit(kind: str, seed: int, tmp_path: Path) -> None:
    found = killed(kind, tmp_path, 30, seed)
    assert found["same"], found
