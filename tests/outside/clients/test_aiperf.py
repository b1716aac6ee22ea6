"""AIPerf measures a server of the shipped pair: every request completes, streamed, with the tokens that it asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.outside.clients.conftest import PAIR


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_aiperf(pair_url: str, kind: str, tmp_path: Path) -> None:
    command = [
        Path(sys.executable).with_name("aiperf"), "profile", "--url", pair_url, "--model", "pycode", "--endpoint-type", kind,
        "--streaming", "--tokenizer", PAIR, "--prompt-input-tokens-mean", "32", "--prompt-output-tokens-mean", "8",
        "--extra-inputs", "ignore_eos:true", "--request-count", "4", "--concurrency", "2", "--ui-type", "none",
        "--artifact-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    # with it AIPerf takes no folder
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (tmp_path / "out").rglob("profile_export_aiperf.json")
    found = json.loads(path.read_text())
    assert found["request_count"]["avg"] == 4 and not found.get("error_request_count", {}).get("avg")
    assert found["output_token_count"]["avg"] == pytest.approx(8, abs=1)  # it counts tokens of the text, encoded anew
    assert 0 < found["time_to_first_token"]["avg"] < found["request_latency"]["avg"]
