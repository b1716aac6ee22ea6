"""A drafter of vLLM that rests at length 0 drafts afterwards what one drafts that read every token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .servers import environment

SCRIPT = Path(__file__).parent / "resting.py"


@pytest.mark.parametrize(("method", "folder"), [("eagle3", "eagle"), ("draft_model", "draft"), ("dflash", "dflash")])
def test_a_rested_drafter_is_accepted_as_often(method: str, folder: str) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, method, folder], capture_output=True, text=True, env=environment(None)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["rests"]["accepted"] == found["reads"]["accepted"], "step by step, sequence by sequence"
    assert found["rests"]["texts"] == found["reads"]["texts"] == found["forgets"]["texts"], "exact whatever is drafted"
    # the control: a cache with holes is noticed
    assert found["forgets"]["accepted"] != found["reads"]["accepted"]
