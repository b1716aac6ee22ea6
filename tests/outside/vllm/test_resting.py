"""A drafter of vLLM that rests at length 0 drafts afterwards what one drafts that read every token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.vllm_inside import FOLDERS

from .servers import environment

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("method", list(FOLDERS))
def test_a_rested_drafter_is_accepted_as_often(method: str) -> None:
    command = [sys.executable, "-m", "tests.outside.vllm.resting", method]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(None), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["rests"]["accepted"] == found["reads"]["accepted"], "step by step, sequence by sequence"
    assert found["rests"]["texts"] == found["reads"]["texts"] == found["forgets"]["texts"], "exact whatever is drafted"
    # the control: a cache with holes is noticed
    assert found["forgets"]["accepted"] != found["reads"]["accepted"]
