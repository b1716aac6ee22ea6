"""The program `llm`, with a model of its extra-openai-models.yaml."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def test_llm(url: str, tmp_path: Any) -> None:
    lines = f'- model_id: scripted\n  model_name: scripted\n  api_base: "{url}/v1"\n  supports_tools: true\n'
    (tmp_path / "extra-openai-models.yaml").write_text(lines)
    env = os.environ | {"OPENAI_API_KEY": "unused"} | {"LLM_USER_PATH": str(tmp_path)}
    command = [sys.executable, "-m", "llm", "-m", "scripted", "hi", "-o", "temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.strip() == "Hello there!", done.stderr
