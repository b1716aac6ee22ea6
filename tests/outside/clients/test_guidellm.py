"""guidellm measures a server of the shipped pair: every request completes, and its counts are those that it asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.outside.clients.conftest import PAIR


def test_guidellm(pair_url: str, tmp_path: Path) -> None:
    command = [
        Path(sys.executable).with_name("guidellm"), "run", "--backend", f"kind=openai_http,target={pair_url},model=pycode",
        "--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=3", "--tokenizer", f"kind=hf_auto,model={PAIR}",
        "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8", "--output", "kind=json,path=out.json",
        "--disable-progress",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (run,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    asked = run["requests"]
    assert len(asked["successful"]) == 3 and not asked["errored"]
    assert all(one["output_tokens"] == 8 for one in asked["successful"])
